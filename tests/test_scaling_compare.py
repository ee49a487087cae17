"""scaling compare: the paper's statements beside numbers that closed forms give."""

import json
import math

import numpy as np
import pytest
from scaling_fits import CHINCHILLA, flops_for, one_fit, optimum, write

from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.errors import PixseqError, UsageError
from pixseq.studies import compare
from pixseq.studies.fits import measure

LAWS = {
    ("loss", 32): CHINCHILLA,
    ("accuracy", 32): (0.1, 14, 0.26, 30, 0.23),
    ("frechet_distance", 32): (4.0, 3000, 0.42, 9e4, 0.30),
}


def pick(numbers, what, metric=None):
    return [row for row in numbers["rows"] if row["what"].startswith(what) and metric in (None, row["metric"])]


def ratio_of(numbers):
    return pick(numbers, "ratio of data exponents", "frechet_distance / accuracy")


def test_exponents_ratio_and_tokens_per_parameter_are_those_of_the_laws(tmp_path):
    numbers = compare.run(write(tmp_path / "fit.json", LAWS), budget=5e18)
    for (metric, _), law in LAWS.items():
        (a, kn), (b, kd) = optimum(law)
        (row,) = pick(numbers, "tokens exponent", metric)
        assert row["value"] == pytest.approx(b) and row["ci"][0] < b < row["ci"][1]
        assert pick(numbers, "params exponent", metric)[0]["value"] == pytest.approx(a)
        (row,) = pick(numbers, "tokens per parameter", metric)
        assert row["value"] == pytest.approx(kd / kn * 5e18 ** (b - a)) and row["ci"][0] < row["value"] < row["ci"][1]
        assert "200-400 (secondary)" in row["paper"] and "10-20 times that of language" in row["paper"]
    ratio, against_loss = pick(numbers, "ratio of data exponents")
    generation, classification, loss = (optimum(LAWS[name, 32])[1] for name in ("frechet_distance", "accuracy", "loss"))
    assert ratio["value"] == pytest.approx(generation[0] / classification[0])
    assert ratio["metric"] == "frechet_distance / accuracy"
    assert "3-5 times faster (abstract)" in ratio["paper"] and "an interpretation" in ratio["paper"]
    assert against_loss["metric"] == "frechet_distance / loss"
    assert against_loss["value"] == pytest.approx(generation[0] / loss[0]) and "Fig. 1" in against_loss["paper"]
    more = {row["metric"]: row["value"] for row in pick(numbers, "ratio of optimal tokens at 5e+18 FLOPs (6nd)")}
    at = {name: b[1] * 5e18 ** b[0] for name, b in (("g", generation), ("c", classification), ("l", loss))}
    assert more == pytest.approx(
        {"frechet_distance / loss": at["g"] / at["l"], "frechet_distance / accuracy": at["g"] / at["c"]}
    )
    assert all(row.keys() == {"what", "metric", "resolution", "value", "ci", "paper"} for row in numbers["rows"])
    json.dumps(numbers, allow_nan=False)


def test_the_ratio_takes_both_exponents_from_the_same_resample(tmp_path):
    fits = [one_fit(*where, law, spread=0.2) for where, law in LAWS.items()]
    _, lower, upper = fits
    upper["draws"]["tokens_exponent"] = [3 * value for value in lower["draws"]["tokens_exponent"]]
    upper["tokens_exponent"] = 3 * lower["tokens_exponent"]
    (row,) = ratio_of(compare.run(write(tmp_path / "fit.json", LAWS, fits)))
    assert row["value"] == pytest.approx(3) and row["ci"] == pytest.approx([3, 3])

    for name in upper["draws"]:  # resamples of one fit failed: nothing tells which
        upper["draws"][name] = upper["draws"][name][7:]
    numbers = compare.run(write(tmp_path / "lost.json", LAWS, fits))
    (row,) = ratio_of(numbers)
    assert row["ci"][0] < 2.5 and row["ci"][1] > 3.5
    assert any("resamples failed" in remark for remark in numbers["remarks"])


def test_a_classification_exponent_that_may_be_zero_bounds_no_ratio(tmp_path):
    fits = [one_fit(*where, law) for where, law in LAWS.items()]
    fits[1]["draws"]["tokens_exponent"] = np.linspace(-0.1, 0.9, 100).tolist()
    numbers = compare.run(write(tmp_path / "fit.json", LAWS, fits))
    (row,) = ratio_of(numbers)
    assert row["value"] is not None and row["ci"][0] > 0 and row["ci"][1] is None
    assert any("no upper bound" in remark for remark in numbers["remarks"])
    fits[1]["tokens_exponent"] = -0.1
    (row,) = ratio_of(compare.run(write(tmp_path / "none.json", LAWS, fits)))
    assert row["value"] is None and row["ci"] is None


def test_a_refused_fit_is_shown_with_its_reason(tmp_path):
    fits = [one_fit(*where, law) for where, law in LAWS.items()]
    fits[2] = one_fit("frechet_distance", 32, None, refused="0 budgets have an inside optimum")
    numbers = compare.run(write(tmp_path / "fit.json", LAWS, fits))
    rows = [row for row in numbers["rows"] if "frechet" in row["metric"]]
    assert len(rows) == 7 and all(row["value"] is None and row["ci"] is None for row in rows)
    assert "frechet_distance at 32x32: no fit: 0 budgets have an inside optimum" in numbers["remarks"]


def test_how_exponents_move_with_resolution(tmp_path):
    laws = {("loss", side): (1.7, 400, 0.3 + 0.02 * k, 400, 0.3) for k, side in enumerate((16, 32, 64))}
    numbers = compare.run(write(tmp_path / "fit.json", laws))
    exponents = [optimum(law)[0][0] for law in laws.values()]
    (row,) = pick(numbers, "params exponent, change")
    assert row["value"] == pytest.approx((exponents[2] - exponents[0]) / 2)  # the slope over three even places
    assert row["ci"][0] < row["value"] < row["ci"][1] and "much faster than data" in row["paper"]
    assert pick(numbers, "tokens exponent, change")[0]["value"] == pytest.approx(-row["value"])
    assert {row["resolution"] for row in pick(numbers, "tokens per")} == {16, 32, 64}
    assert any("needs one of each" in remark for remark in numbers["remarks"])


def test_the_budget_is_the_largest_studied_and_another_is_called_extrapolated(tmp_path):
    path = write(tmp_path / "fit.json", LAWS)
    numbers = compare.run(path)
    assert numbers["budget"] == 1e19 and not any("extrapolated" in remark for remark in numbers["remarks"])
    assert any("extrapolated to 7e+19" in remark for remark in compare.run(path, 7e19)["remarks"])


def test_without_resamples_there_are_values_and_no_intervals(tmp_path):
    fits = [one_fit(*where, law, draws=0) for where, law in LAWS.items()]
    numbers = compare.run(write(tmp_path / "fit.json", LAWS, fits))
    assert numbers["rows"] and all(row["ci"] is None and row["value"] is not None for row in numbers["rows"])
    assert any("no intervals" in remark for remark in numbers["remarks"])


@pytest.mark.parametrize(
    ("metric", "role"),
    [
        ("loss", "loss"),
        ("val_loss", "loss"),
        ("nats_per_token", "loss"),
        ("bits per dim", "loss"),
        ("MSE", "loss"),
        ("accuracy", "classification"),
        ("top1", "classification"),
        ("Top-1", "classification"),
        ("acc", "classification"),
        ("frechet_distance", "generation"),
        ("FID50k", "generation"),
        ("fd_dino", "generation"),
        ("kid", "generation"),
        ("confidence", None),
        ("seconds", None),
    ],
)
def test_a_metric_plays_its_part_by_its_name(metric, role):
    assert measure(metric) == role


def test_metrics_of_no_part_are_shown_all_the_same(tmp_path):
    numbers = compare.run(write(tmp_path / "fit.json", {("confidence", None): CHINCHILLA}))
    assert pick(numbers, "tokens exponent", "confidence")[0]["value"] == pytest.approx(0.34 / 0.62)
    assert any("neither loss" in remark for remark in numbers["remarks"])


def test_the_table_is_written_as_metrics(tmp_path):
    path = write(tmp_path / "fit.json", LAWS)
    numbers = compare.run(path, out=tmp_path / "compare.json")
    record, stored = read_metrics(tmp_path / "compare.json")
    assert stored == numbers and record["stage"] == "scaling compare"
    assert record["inputs"]["fit"]["id"] == read_metrics(path)[0]["id"]
    with pytest.raises(PixseqError, match="already exists"):
        compare.run(path, out=tmp_path / "compare.json")
    compare.run(path, out=tmp_path / "compare.json", overwrite=True)


def test_what_cannot_be_compared_is_refused(tmp_path):
    path = write(tmp_path / "fit.json", LAWS)
    for options in ({"method": "magic"}, {"budget": 0.0}, {"budget": math.nan}, {"budget": math.inf}):
        with pytest.raises(UsageError):
            compare.run(path, **options)
    with pytest.raises(PixseqError, match="no fits by isoflop") as caught:
        compare.run(path, method="isoflop")
    assert "varpro" in caught.value.hint
    write_metrics(tmp_path / "probe.json", "probe", {}, {}, {"layers": []})
    with pytest.raises(PixseqError, match="numbers of probe, not of a scaling fit"):
        compare.run(tmp_path / "probe.json")
    with pytest.raises(PixseqError, match="does not exist"):
        compare.run(tmp_path / "nothing.json")


# ---- the paper's statements


def verdicts(numbers, words):
    return {(each["metric"], each["resolution"]): each for each in numbers["statements"] if words in each["statement"]}


def law_with(exponent, level=1.0):
    """A law whose tokens exponent is `exponent`; `level` moves the optimum towards data."""
    return (0.5, 400.0, 0.6 * exponent, 400.0 * level, 0.6 * (1 - exponent))


def test_every_statement_stands_beside_what_is_found_with_a_verdict_and_why(tmp_path):
    numbers = compare.run(write(tmp_path / "fit.json", LAWS))
    for each in numbers["statements"]:
        assert each.keys() == {"statement", "metric", "resolution", "here", "verdict", "why"}
        assert each["verdict"] in ("agrees", "disagrees", "cannot tell") and each["why"]
    for words in ("3-5 times faster", "more data than loss", "200-400", "model size", "five years", "bottleneck"):
        assert verdicts(numbers, words), words
    assert {each["verdict"] for each in verdicts(numbers, "bottleneck").values()} == {"cannot tell"}
    assert all("--images" in each["why"] for each in verdicts(numbers, "bottleneck").values())


@pytest.mark.parametrize(
    ("side", "generation", "classification", "spread", "verdict"),
    [
        (32, 0.8, 0.2, 0.002, "agrees"),
        (32, 0.6, 0.5, 0.002, "disagrees"),
        (32, 0.8, 0.25, 0.2, "cannot tell"),
        (16, 0.8, 0.2, 0.002, "cannot tell"),
    ],
)
def test_three_to_five_times_faster(tmp_path, side, generation, classification, spread, verdict):
    laws = {("fid", side): law_with(generation), ("top1", side): law_with(classification)}
    fits = [one_fit(*where, law, spread=spread, seed=k) for k, (where, law) in enumerate(laws.items())]
    (found,) = verdicts(compare.run(write(tmp_path / "fit.json", laws, fits)), "3-5 times faster").values()
    assert found["verdict"] == verdict and "interpretation" in found["why"]


@pytest.mark.parametrize(("level", "verdict"), [(30.0, "agrees"), (1 / 30, "disagrees"), (1.0, "cannot tell")])
def test_generation_needs_more_data_than_loss(tmp_path, level, verdict):
    laws = {("fid", 32): law_with(0.5, level), ("loss", 32): law_with(0.5)}
    fits = [one_fit(*where, law, spread=0.01, seed=k) for k, (where, law) in enumerate(laws.items())]
    found = verdicts(compare.run(write(tmp_path / "fit.json", laws, fits)), "more data than loss")
    assert found["fid / loss", 32]["verdict"] == verdict


@pytest.mark.parametrize(
    ("exponents", "verdict"),
    [((0.5, 0.3), "agrees"), ((0.3, 0.5), "disagrees"), ((0.7, 0.6), "disagrees"), ((0.5, 0.5), "cannot tell")],
)
def test_model_size_grows_faster_than_data_as_resolution_rises(tmp_path, exponents, verdict):
    laws = {("loss", side): law_with(exponent) for side, exponent in zip((16, 32), exponents)}
    fits = [one_fit(*where, law, spread=0.005, seed=k) for k, (where, law) in enumerate(laws.items())]
    (found,) = verdicts(compare.run(write(tmp_path / "fit.json", laws, fits)), "model size").values()
    assert found["verdict"] == verdict


@pytest.mark.parametrize(("base", "verdict"), [(1.0, "agrees"), (5.0**5, "cannot tell"), (1e9, "disagrees")])
def test_within_five_years_at_the_papers_pace(tmp_path, base, verdict):
    path = write(tmp_path / "fit.json", {("loss", 32): CHINCHILLA}, [one_fit("loss", 32, CHINCHILLA, spread=0.002)])
    needed = flops_for(CHINCHILLA, 1.69 * 1.05)
    (found,) = verdicts(compare.run(path, start_flops=needed / base / 0.99), "five years").values()
    assert found["verdict"] == verdict and "as given" in found["why"]
    assert "the paper's largest runs" in verdicts(compare.run(path), "five years")["loss", 32]["why"]


def test_whether_data_suffice_is_told_by_the_images_that_there_are(tmp_path):
    path = write(tmp_path / "fit.json", {("loss", 32): CHINCHILLA})
    _, (b, kd) = optimum(CHINCHILLA)
    needed = kd * (1e18 * 4.5**5) ** b / 1024
    for images, verdict in ((needed * 100, "agrees"), (needed / 1000, "disagrees"), (needed / 4, "cannot tell")):
        (found,) = verdicts(compare.run(path, images=images, start_flops=1e18), "bottleneck").values()
        assert found["verdict"] == verdict
    for options in ({"images": 0.0}, {"start_flops": math.nan}):
        with pytest.raises(UsageError):
            compare.run(path, **options)


def test_what_methods_disagree_on_decides_nothing(tmp_path):
    fits = [one_fit("loss", 32, CHINCHILLA), one_fit("loss", 32, (1.2, *CHINCHILLA[1:]), "direct")]
    path = write(tmp_path / "fit.json", {("loss", 32): CHINCHILLA}, fits)
    (found,) = verdicts(compare.run(path, start_flops=1e30), "five years").values()
    assert found["verdict"] == "cannot tell" and "disagree" in found["why"]
