"""The document of a scaling fit: what is written is read back whole, and what nobody could use is refused in a line."""

import copy
import json

import pytest
from scaling_fits import CHINCHILLA, numbers_of, one_fit, write

from pixseq.artifacts.fit import StudyFit
from pixseq.artifacts.metrics import write_metrics
from pixseq.cli.scaling import _fit_tables
from pixseq.errors import PixseqError
from pixseq.studies import compare, fit, forecast


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The numbers of a fit of three metrics with seeds, outliers, a floor and a refusal, as they are written."""
    path = tmp_path_factory.mktemp("fit") / "runs.csv"
    lines = ["params,tokens,flops,resolution,seed,loss,accuracy,frechet_distance,frechet_floor,frechet_n,odd"]
    for run in numbers_of({("loss", 16): CHINCHILLA})["runs"]:
        for seed in (0, 1):
            loss = run["loss"] * (1 + 1e-3 * seed) * (2 if not len(lines) % 9 else 1)
            sizes = f"{run['params']},{run['tokens']},{run['flops']},16,{seed}"
            lines.append(f"{sizes},{loss},{1 - loss / 20},{loss - 1},1.5,500,{1 if len(lines) > 2 else ''}")
    path.write_text("\n".join(lines) + "\n")
    return fit.run(path, path.with_name("fit.json"), resamples=20)


def test_what_holds_for_several_methods_is_told_once(made):
    lines = _fit_tables(made).splitlines()
    flags = {(one["metric"], flag) for one in made["fits"] for flag in one["flags"]}
    for metric, flag in flags:
        assert sum(line.startswith(f"{metric} at 16 (") and line.endswith(f"): {flag}") for line in lines) == 1
    assert sum(len(one["flags"]) for one in made["fits"]) > len(flags) > 2


def test_a_fit_is_read_as_it_was_written_key_for_key(made):
    assert any(one["outliers"] for one in made["fits"]) and any(one["refused"] for one in made["fits"])
    assert any(one["floor"] for one in made["fits"]) and made["excluded"]
    again = StudyFit.from_json(made).to_json()
    assert json.dumps(again) == json.dumps(made)


def test_a_fit_from_before_a_key_was_known_still_opens(tmp_path):
    old = numbers_of({("loss", 16): CHINCHILLA}, [one_fit("loss", 16, CHINCHILLA)])
    assert "floor" not in old["fits"][0] and "tokens_per_image" not in old
    assert StudyFit.from_json(old).fits[0].floor is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fits", 0, "params_coefficient"), -1.0),
        (("fits", 0, "params_exponent"), None),
        (("fits", 0, "E"), "much"),
        (("fits", 0, "transform"), "loss"),
        (("fits", 0, "draws"), {"params_exponent": [1.0]}),
        (("fits", 0, "draws", "E"), [1.0]),
        (("fits", 0, "budgets"), {"flops": 1}),
        (("fits", 0, "budgets", 0, "flops"), 0),
        (("fits", 0), ["loss"]),
        (("fits",), "loss"),
        (("fits", 0, "resolution"), 48),
        (("runs", 0, "budget"), None),
        (("runs", 0, "loss"), [1]),
        (("bootstrap", "level"), 3),
        (("bootstrap",), []),
        (("disagreements",), [1]),
        (("tokens_per_image",), {"x": 1}),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(tmp_path, place, value):
    numbers = copy.deepcopy(numbers_of({("loss", 16): CHINCHILLA}))
    inner = numbers
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "fit.json"
    write_metrics(path, "scaling fit", {}, {}, numbers)
    for use in (compare.run, lambda path: forecast.run(path, 4.5, 1e20, [16])):
        with pytest.raises(PixseqError, match=r"fit.json is no usable fit: ") as caught:
            use(path)
        assert "\n" not in caught.value.message and caught.value.hint == "make it again"


def test_other_numbers_are_no_fit(tmp_path):
    write(tmp_path / "fit.json", {("loss", 16): CHINCHILLA})
    compare.run(tmp_path / "fit.json", out=tmp_path / "compare.json")
    with pytest.raises(PixseqError, match="holds the numbers of scaling compare, not of a scaling fit"):
        compare.run(tmp_path / "compare.json")


def test_a_law_is_carried_as_far_as_anyone_asks(tmp_path):
    """Beyond what a float holds there is no number, and no bug either."""
    laws = {("loss", 16): CHINCHILLA, ("accuracy", 16): CHINCHILLA, ("frechet_distance", 16): CHINCHILLA}
    fits = [one_fit(*where, law) for where, law in laws.items()]
    fits[2]["tokens_exponent"] = 30.0
    path = write(tmp_path / "fit.json", laws, fits)
    found = compare.run(path, budget=1e300, images=1e6, start_flops=1e300)
    ratios = [row for row in found["rows"] if row["what"].startswith("ratio of optimal tokens")]
    assert len(ratios) == 2 and all(row["value"] is None for row in ratios)
