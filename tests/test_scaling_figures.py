"""The figures of a scaling study: four pictures with manifests, for any fit, whatever is missing from it."""

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scaling_fits import CHINCHILLA, numbers_of, one_fit, write

from pixseq.artifacts import manifest
from pixseq.artifacts.fit import StudyFit
from pixseq.drawing import page as panels
from pixseq.drawing import scaling as figures
from pixseq.errors import PixseqError
from pixseq.studies import forecast

LAWS = {("accuracy", 16): (0.1, 14, 0.26, 30, 0.23)}
REASON = "0 budgets have an inside optimum, three are needed; not so: 1e+17 (edge), 1e+18 (edge), 1e+19 (edge)"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(path):
    """The share of a picture that is not white."""
    return (pixels(path) < 250).any(axis=2).mean()


def test_a_fit_makes_a_sheet_and_its_figures_with_manifests(tmp_path):
    fits = [one_fit(*where, law, method) for where, law in LAWS.items() for method in figures.METHODS]
    fits += [one_fit("accuracy", 32, None, method, refused=REASON) for method in figures.METHODS]
    fits[0]["budgets"][0] |= {"params_opt": None, "tokens_opt": None, "value_opt": None, "status": "edge"}
    fits[1]["budgets"][2]["status"] = "outside"
    numbers = numbers_of(LAWS, fits)
    numbers["runs"].append({**numbers["runs"][0], "resolution": 32})
    figures.save_fit(
        tmp_path / "fit.png", StudyFit.from_json(numbers), {"seed": 0}, {"runs": {"path": "runs.csv", "id": "sha256:1"}}
    )
    names = ["fit.png", "fit.isoflop.png", "fit.optimum.png", "fit.tokens-per-parameter.png"]
    assert [path.name for path in figures.fit_targets(tmp_path / "fit.png")] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        record = manifest.expect(tmp_path / name, "picture")
        assert record["stage"] == "scaling fit" and record["inputs"]["runs"]["id"] == "sha256:1"
        assert record["summary"]["dpi"] == panels.DPI
        assert drawn(tmp_path / name) > 0.02
    columns = [pixels(tmp_path / name).shape[1] / panels.DPI for name in names]
    assert columns == pytest.approx([3 * 3.5, 3.5, 3.5, 3.5])


def test_one_metric_without_resolution_and_without_resamples(tmp_path):
    fits = [one_fit("loss", None, CHINCHILLA, method, draws=0) for method in figures.METHODS]
    figures.save_fit(tmp_path / "fit.png", StudyFit.from_json(numbers_of({("loss", None): CHINCHILLA}, fits)), {}, {})
    assert all(drawn(path) > 0.02 for path in figures.fit_targets(tmp_path / "fit.png"))


def test_nothing_fitted_and_nothing_measured_still_draws(tmp_path):
    odd = "cost_$x$_日本\n"
    fits = [one_fit(metric, None, None, refused=REASON) for metric in ("loss", odd)]
    numbers = numbers_of({("loss", None): CHINCHILLA}, fits)
    for run in numbers["runs"]:
        run[odd] = None
    figures.save_fit(tmp_path / "fit.png", StudyFit.from_json(numbers), {}, {})
    assert all(drawn(path) > 0.01 for path in figures.fit_targets(tmp_path / "fit.png"))


def test_the_same_numbers_make_the_same_picture_under_any_settings(tmp_path):
    path = write(tmp_path / "fit.json", {("loss", 16): CHINCHILLA, ("loss", 32): (1.69, 600, 0.34, 410.7, 0.28)})
    options = {"targets": {"loss": 2.0}, "resolutions": [16, 32, 64]}
    forecast.run(path, 4.5, 1e20, plot=tmp_path / "one.png", **options)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        forecast.run(path, 4.5, 1e20, plot=tmp_path / "two.png", **options)
        assert matplotlib.rcParams["font.size"] == 30
    one, two = (manifest.expect(tmp_path / name, "picture") for name in ("one.png", "two.png"))
    assert one["id"] == two["id"] and one["stage"] == "scaling forecast" and "fit" in one["inputs"]
    assert pixels(tmp_path / "one.png").shape[1] == 3.5 * panels.DPI and drawn(tmp_path / "one.png") > 0.02


def test_a_forecast_out_of_reach_draws_too(tmp_path):
    path = write(tmp_path / "fit.json", {("loss", 16): CHINCHILLA})
    forecast.run(path, 4.5, 1e20, [16, 64], targets={"loss": 1.0}, plot=tmp_path / "f.png")
    forecast.run(path, 4.5, 1e20, [16], targets={"loss": 1.69001}, plot=tmp_path / "g.png")
    assert drawn(tmp_path / "f.png") > 0.02 and drawn(tmp_path / "g.png") > 0.02


def test_a_figure_in_the_way_is_found_before_anything_is_drawn(tmp_path):
    (tmp_path / "fit.optimum.png").write_bytes(b"mine")
    with pytest.raises(PixseqError, match=r"fit.optimum.png already exists"):
        figures.save_fit(tmp_path / "fit.png", StudyFit.from_json(numbers_of({("loss", None): CHINCHILLA})), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["fit.optimum.png"]


def test_ticks_are_round_and_few():
    assert panels.log_ticks(0.9e6, 1.1e8, 3) == [1e6, 1e7, 1e8]
    assert panels.log_ticks(0.9e6, 1.1e8, 5) == [1e6, 3e6, 1e7, 3e7, 1e8]
    for low, high in ((3.1, 3.3), (1e-5, 1e60), (7e9, 8.5e9)):
        ticks = panels.log_ticks(low, high, 4)
        assert 1 <= len(ticks) <= 4 and all(low <= tick <= high for tick in ticks)


def test_numbers_are_spelt_as_people_read_them():
    assert [panels.count(value) for value in (20, 1500, 2e7, 3e9, 1e13)] == ["20", "1.5k", "20M", "3B", "10T"]
    assert [panels.power(value) for value in (1e18, 3e18, 9.99e17, 1e-4)] == ["10¹⁸", "3·10¹⁸", "10¹⁸", "10⁻⁴"]


def test_seeds_have_error_bars_and_a_distance_its_floor(tmp_path):
    where = ("frechet_distance", 32)
    fits = [one_fit(*where, CHINCHILLA, method) for method in figures.METHODS]
    numbers = numbers_of({where: CHINCHILLA}, fits)
    plain = figures.Panels(StudyFit.from_json(numbers))
    assert plain.runs(*where)[:, 3].max() == 0 and not plain.replicated()
    runs = [
        {**run, "frechet_distance": run["frechet_distance"] + 0.1 * k, "seed": k}
        for run in numbers["runs"]
        for k in (0, 1, 2)
    ]
    several = figures.Panels(StudyFit.from_json(numbers | {"runs": runs}))
    cells = several.runs(*where)
    assert len(cells) == len(numbers["runs"]) and several.replicated()
    assert cells[:, 3] == pytest.approx(0.1) and cells[:, 2] == pytest.approx(plain.runs(*where)[:, 2] + 0.1)

    figures.save_fit(tmp_path / "plain.png", StudyFit.from_json(numbers), {}, {})
    for fit in fits:
        fit["floor"] = {"floor": 2.5}
        fit["outliers"] = [{"params": runs[4]["params"], "value": runs[4]["frechet_distance"]}]
    figures.save_fit(tmp_path / "fit.png", StudyFit.from_json(numbers | {"runs": runs}), {}, {})
    before, after = (pixels(tmp_path / name) for name in ("plain.isoflop.png", "fit.isoflop.png"))
    assert before.shape != after.shape or (before != after).any()
