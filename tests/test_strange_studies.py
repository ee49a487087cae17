"""Plans and results of another hand: each is told by the place that is wrong, before anything rests on it."""

import json

import pytest

from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.plan import NUMBERS, Cell, _id, write_plan
from pixseq.bounded import forms
from pixseq.config import GridFile, as_dict, effective
from pixseq.errors import PixseqError
from pixseq.studies import cell as one
from pixseq.studies.study import check_parents, open_study


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


CELL = {"id": "r8-b0-s0", "resolution": 8, "data": 0, **dict.fromkeys(NUMBERS, 1)}


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "g.yaml").write_text("data: {train: t, val: v}\nbudgets: [1.0e+9, 2.0e+9, 4.0e+9]\n")
    grid = as_dict(effective(GridFile, file=tmp_path / "g.yaml"))
    inputs = {f"{role} 0": {"path": role, "id": "sha256:1"} for role in ("train", "val")}
    write_plan(tmp_path / "plan", grid, inputs, [Cell.from_json(CELL)], {})
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
        (("config", "budgets"), [-1.0], "budgets is -1.0, it must be above 0"),
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
    assert study.results()[0].loss == 2.0
    edited(path, key, value=value)
    with pytest.raises(PixseqError, match=f"result.json: .*{key}"):
        study.results()


def test_what_a_cell_takes_from_its_products_is_told_where_it_is_wrong(tmp_path):
    write_metrics(tmp_path / "x.json", "probe", {}, {}, {"test_accuracy": "x"})
    for key, told in (("test_accuracy", "test_accuracy is 'x', not a number"), ("best_layer", "it has no best_layer")):
        with pytest.raises(PixseqError, match=told):
            one._numbers(tmp_path / "x.json", {key: forms.number})
