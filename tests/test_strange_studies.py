"""Plans, results and fits of another hand: each is told by the place that is wrong, before anything rests on it."""

import json

import pytest
from scaling_fits import CHINCHILLA, one_fit, write

from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.plan import NUMBERS, _id, write_plan
from pixseq.bounded import forms
from pixseq.config import GridFile, as_dict, effective
from pixseq.errors import PixseqError
from pixseq.studies import cell as one
from pixseq.studies import compare, forecast
from pixseq.studies.study import check_parents, open_study

LAWS = {("loss", 32): CHINCHILLA, ("accuracy", 32): (0.1, 40.0, 0.4, 60.0, 0.35)}


def edited(path, *keys, value):
    """A JSON file with another value in one place; ... stands for one that is removed."""
    found = json.loads(path.read_text())
    place = found
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    "keys, value, told",
    [
        (("fits", 0, "draws", "E", 3), "x", r"fits\[0\].draws.E\[3\] is 'x', not a number"),
        (("fits", 0, "draws", "E", 3), 10**30, "not a number"),
        (("fits", 0, "draws", "E"), [1.0], "draws of several lengths"),
        (("fits", 0, "draws"), "x", "fits.0..draws is 'x', not keys and values"),
        (("fits", 0, "params_exponent"), [], r"params_exponent is \[\], not a number"),
        (("fits", 0, "params_exponent_ci"), [0.5], "not a list of 2"),
        (("fits", 0, "metric"), 3.5, "metric is 3.5, not text"),
        (("fits", 0, "flags"), 1, "flags is 1, not a list"),
        (("fits", 0, "resolution"), 48, "loss at 48x48 has a fit and no run"),
        (("fits", 1, "transform"), "x - y", "not a ceiling minus a metric"),
        (("fits", 0), None, "fits.0. is None"),
        (("runs", 0, "budget"), None, "budget is None, not a positive number"),
        (("runs", 0), 7, "runs.0. is 7"),
        (("bootstrap", "level"), 95, "between 0 and 1"),
        (("disagreements",), [{"text": 1}], "disagreements.0. has no metric"),
        (("tokens_per_image",), {"32": 0}, "tokens_per_image.32 is 0"),
        (("counting",), ..., "it has no counting"),
    ],
)
def test_a_fit_is_told_by_the_place_that_is_wrong(tmp_path, keys, value, told):
    path = write(tmp_path / "fit.json", LAWS, [one_fit(*where, law, draws=24) for where, law in LAWS.items()])
    compare.run(path)
    edited(path, *keys, value=value)
    for read in (compare.run, lambda path: forecast.run(path, 4.5, 1e20, "32")):
        with pytest.raises(PixseqError, match=told):
            read(path)


def test_a_fit_whose_numbers_went_beyond_counting_is_refused_alone(tmp_path):
    """The stage writes null for what no float holds."""
    path = write(tmp_path / "fit.json", LAWS)
    edited(path, "fits", 0, "tokens_coefficient", value=None)
    rows = compare.run(path)["rows"]
    assert any(row["value"] is None for row in rows if row["metric"] == "loss")
    assert all(row["value"] for row in rows if row["metric"] == "accuracy" and "exponent" in row["what"])


CELL = {"id": "r8-b0-s0", "resolution": 8, "data": 0, **dict.fromkeys(NUMBERS, 1)}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "g.yaml").write_text("data: {train: t, val: v}\nbudgets: [1.0e+9, 2.0e+9, 4.0e+9]\n")
    grid = as_dict(effective(GridFile, file=tmp_path / "g.yaml"))
    inputs = {f"{role} 0": {"path": role, "id": "sha256:1"} for role in ("train", "val")}
    write_plan(tmp_path / "plan", grid, inputs, [CELL], {})
    return tmp_path / "plan"


def signed(plan):
    """With the content id that its cells have now."""
    record = json.loads((plan / "manifest.json").read_text())
    edited(plan / "manifest.json", "id", value=_id(record["cells"]))


@pytest.mark.parametrize(
    "keys, value, told",
    [
        (("cells", 0, "data"), 10**30, "data is 1000000"),
        (("cells", 0, "data"), 1, "data is 1, not a whole number from 0 to 0"),
        (("cells", 0, "data"), ..., "it has no data"),
        (("cells", 0, "d_model"), 10**12, "d_model is 1000000000000, not a whole number"),
        (("cells", 0, "steps"), 2.5, "steps is 2.5"),
        (("cells", 0, "seed"), "x", "seed is 'x'"),
        (("config", "data"), [], "data"),
        (("config", "budgets"), [], "budgets is empty"),
        (("config", "budgets"), [-1.0], "budgets are .-1.0., they must be positive"),
        (("config", "completions"), 1, "completions"),
        (("config", "sizes_per_budget"), 10**30, "sizes_per_budget is 1000"),
        (("config", "train", "lr"), -1.0, "train.lr is -1.0"),
        (("summary", "rates"), {"8": {"lr": 1}}, "rates.8 has no width"),
        (("inputs", "train 0"), {"path": "t"}, "train 0 has no id"),
    ],
)
def test_a_plan_is_told_by_the_place_that_is_wrong(plan, keys, value, told):
    open_study(plan)
    edited(plan / "manifest.json", *keys, value=value)
    signed(plan)
    with pytest.raises(PixseqError, match=told) as caught:
        open_study(plan)
    assert str(plan) in caught.value.message and caught.value.code == 1  # nobody typed it


def test_a_plan_that_does_not_tell_a_parent_is_damaged(plan):
    edited(plan / "manifest.json", "inputs", "val 0", value=...)
    edited(plan / "manifest.json", "inputs", "train 0", value=...)
    with pytest.raises(PixseqError, match="does not tell the id of t, its train 0"):
        check_parents(open_study(plan))


@pytest.mark.parametrize("key, value", [("status", "x"), ("status", ...), ("loss", "2"), ("frechet_extractor", 1)])
def test_the_result_of_a_cell_is_told_by_the_place_that_is_wrong(plan, key, value):
    study = open_study(plan)
    path = study.folder(study.cells[0]) / "result.json"
    path.parent.mkdir(parents=True)
    write_metrics(path, "scaling run", {}, {}, {"status": "done", "reason": None, "loss": 2.0})
    assert study.results()[0]["loss"] == 2.0
    edited(path, key, value=value)
    with pytest.raises(PixseqError, match=f"result.json: .*{key}"):
        study.results()


def test_what_a_cell_takes_from_its_products_is_told_where_it_is_wrong(tmp_path):
    write_metrics(tmp_path / "x.json", "probe", {}, {}, {"test_accuracy": "x"})
    for key, told in (("test_accuracy", "test_accuracy is 'x', not a number"), ("best_layer", "it has no best_layer")):
        with pytest.raises(PixseqError, match=told):
            one._numbers(tmp_path / "x.json", {key: forms.number})
