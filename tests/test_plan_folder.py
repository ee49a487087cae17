"""A plan folder of any hand: its cells lie in it, and one process at a time writes it."""

import json
from dataclasses import replace

import pytest

from pixseq.artifacts import layout, locking, owning
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.plan import NUMBERS, Cell, _id, read_plan, write_plan
from pixseq.errors import PixseqError
from pixseq.studies import judge
from pixseq.studies import plan as planning
from pixseq.studies.study import DIVERGED, WAITING, Study

CELL = Cell(id="r8-b0-s0", resolution=8, data=0, **dict.fromkeys(NUMBERS, 1))


@pytest.fixture
def plan(tmp_path):
    write_plan(tmp_path / "plan", {}, {}, [CELL, replace(CELL, id="r8-b0-s1")], {})
    return tmp_path / "plan"


def altered(plan, **change):
    """The plan with another first cell, and the content id that goes with it."""
    record = json.loads((plan / "manifest.json").read_text())
    record["cells"][0] |= change
    record["id"] = _id(record["cells"])
    (plan / "manifest.json").write_text(json.dumps(record))


ESCAPES = ["../../x", "/tmp/x", "", ".", "..", "a/b", "a\\b", "a..b", "-x", ".x", "x\n", "x\0", "x.partial", "a" * 200]


@pytest.mark.parametrize("id", [*ESCAPES, 3, None, "r8-b0-s1", "R8-B0-S1"], ids=repr)
def test_a_cell_id_is_a_name_of_its_own_in_the_plan(plan, id):
    altered(plan, id=id)
    with pytest.raises(PixseqError, match=f"{plan} has"):
        read_plan(plan)


@pytest.mark.parametrize("side", ["8/../../../x", None, 8.0, 0, True], ids=repr)
def test_a_resolution_is_a_side(plan, side):
    altered(plan, resolution=side)
    with pytest.raises(PixseqError, match="of the resolution"):
        read_plan(plan)


WRONG = {"data": -1, "seed": 0.5, "sweep": 0, "seconds": "1", "epochs": None, "lr": 0}


@pytest.mark.parametrize("key", WRONG)
def test_a_cell_has_usable_numbers(plan, key):
    altered(plan, **{key: WRONG[key]})
    with pytest.raises(PixseqError, match=f"r8-b0-s0: {key} is"):
        read_plan(plan)


def test_a_cell_is_read_as_it_was_written(plan):
    swept = replace(CELL, id="r8-b0-s0-f1", seed=2, sweep=0.5, seconds=1.5)
    for cell in (CELL, swept):
        assert Cell.from_json(cell.to_json()) == cell
    assert "seed" not in CELL.to_json() and list(swept.to_json())[3:5] == ["data", "seed"]


@pytest.mark.parametrize("link", ["cells", "reference", "cells/r8-b0-s1", "reference/r8"])
def test_nothing_is_made_through_a_link(plan, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    if link == "cells":
        (plan / "cells").rmdir()
    (plan / link).parent.mkdir(exist_ok=True)
    (plan / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PixseqError, match=f"{link} is a link"):
        read_plan(plan)


def test_cells_are_those_of_the_id(plan):
    text = (plan / "manifest.json").read_text()
    (plan / "manifest.json").write_text(text.replace('"resolution": 8', '"resolution": 9', 1))
    with pytest.raises(PixseqError, match="not those of its id"):
        read_plan(plan)
    (plan / "manifest.json").write_text(text.replace('"resolution": 8', '"resolution": NaN', 1))
    with pytest.raises(PixseqError, match="it holds NaN"):
        read_plan(plan)


def test_a_diverged_cell_is_forgotten_and_nothing_else(plan):
    record, cells = read_plan(plan)
    study = Study(plan, record, cells, None)
    folder = study.folder(CELL)
    folder.mkdir()
    with owning.own(folder / "model", False, "pretrain", resumable=True) as partial:
        (partial / "log.jsonl").write_text("{}")
    write_metrics(folder / "result.json", "scaling run", {}, {}, {"status": DIVERGED})
    (partial / "thesis.txt").write_text("x")
    with pytest.raises(PixseqError, match=r"thesis\.txt"):
        study.forget(CELL)
    assert study.status(CELL) == DIVERGED
    (partial / "thesis.txt").rename(folder / "thesis.txt")
    study.forget(CELL)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    write_metrics(folder / "result.json", "scaling run", {}, {}, {"status": DIVERGED})
    study.forget(CELL)
    assert study.status(CELL) == WAITING


@pytest.mark.parametrize("command, resumable", [("scaling plan", False), ("pretrain", True)])
def test_what_a_killed_plan_left_is_tidied_and_nothing_else(plan, monkeypatch, command, resumable):
    monkeypatch.setattr(planning, "_check_replaceable", lambda out, overwrite: None)
    partial = layout.partial_path(plan)
    partial.mkdir()
    locking.write_owner(partial, {"command": command, "resumable": resumable})
    (partial / "log.jsonl").write_text("{}")
    with planning._holding(plan, True):
        assert partial.exists() == resumable


def test_references_of_a_plan_that_is_replaced_go_and_nothing_else(plan):
    for name in ("prompts.zarr", "others.features.zarr"):
        folder = plan / "reference" / "r8" / name
        folder.mkdir(parents=True)
        (folder / "zarr.json").write_text("{}")
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(PixseqError, match=r"thesis\.txt"):
        judge.forget(plan)
    (folder / "thesis.txt").rename(plan / "reference" / "r8" / "thesis.txt")
    judge.forget(plan)
    assert [path.name for path in (plan / "reference").rglob("*")] == ["r8", "thesis.txt"]


def test_other_cells_of_another_process_are_taken_over(plan):
    ours, theirs = (Study(plan, *read_plan(plan), None) for _ in range(2))
    theirs.rewrite([CELL])
    ours.rewrite([replace(CELL, id="late")])
    assert ours.cells == theirs.cells == read_plan(plan)[1] == [CELL]
    ours.rewrite([replace(CELL, id="next")])
    assert read_plan(plan)[1][0].id == "next" and layout.foreign(plan, "plan") is None
