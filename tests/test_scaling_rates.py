"""Several seeds a cell, and learning rates that are swept at the smallest budget and fitted."""

from dataclasses import asdict

import numpy as np
import pytest
from conftest import write_tokens

from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.metrics import write_metrics
from pixseq.config import GridFile, as_dict, effective, restored
from pixseq.errors import PixseqError, UsageError
from pixseq.studies import cell as one
from pixseq.studies import plan, rates, run
from pixseq.studies.study import open_study

SMALL = "budgets: [1.0e+9, 2.0e+9, 4.0e+9]\nbatch: {steps: 12, smallest: 4}\ncompletions: {count: 0}\n"
SMALL += "probe: {c: '0.1', layers: '1'}\nsizes_per_budget: 3\n"


@pytest.fixture
def planned(tmp_path):
    def make(text, folder="plan"):
        (tmp_path / "g.yaml").write_text(f"data: {{train: {tmp_path}/t.zarr, val: {tmp_path}/v.zarr}}\n{SMALL}{text}")
        plan.run(tmp_path / "g.yaml", tmp_path / folder, timed=False)
        return open_study(tmp_path / folder)

    write_tokens(tmp_path / "t.zarr", count=96)
    write_tokens(tmp_path / "v.zarr", count=48, seed=1)
    return make


# ---- seeds


def test_a_cell_of_several_seeds_is_run_so_often_and_the_first_keeps_its_id(planned):
    single, several = planned(""), planned("seeds: 3\n", "plan3")
    assert [c for c in several.cells if not c.seed] == single.cells and len(several.cells) == 27
    ids = [cell.id for cell in several.cells]
    assert ids[:4] == ["r6-b0-s0", "r6-b0-s0-k1", "r6-b0-s0-k2", "r6-b0-s1"]
    losses = []
    for id in ids[:2]:
        losses.append(one.run(several, several.cell(id), "cpu", "fp32")["loss"])
        made = open_checkpoint(several.folder(several.cell(id)) / "model").manifest
        assert made["config"]["train"]["seed"] == several.cell(id).seed
    assert losses[0] != losses[1]
    assert [one.cell.seed for one in several.results()[:4]] == [0, 1, 2, 0]
    assert len({one.cell.params for one in several.results()[:3]}) == 1


# ---- rates


def swept(study, best, exponent, noise=0.0, diverged=()):
    """Results of a sweep whose best rate is `best` at width 64 and falls with width by a power."""
    rng = np.random.default_rng(0)
    for cell in rates.sweep_of(study, 6):
        off = np.log(cell.lr / (best * (cell.d_model / 64) ** -exponent))
        numbers = {"status": "done", "reason": None, "loss": 2 + 0.1 * off**2 + noise * rng.standard_normal()}
        if cell.id in diverged:
            numbers = {"status": "diverged", "reason": "too fast"}
        write_metrics(study.folder(cell) / "result.json", "scaling run", cell.to_json(), {}, numbers)


def test_the_rule_is_fitted_to_the_sweep_and_used_by_every_other_cell(planned):
    study = planned("rates: {sweep: [0.25, 0.5, 1.0, 2.0, 4.0]}\n")
    sweep = rates.sweep_of(study, 6)
    assert len(sweep) == 15 and {cell.budget for cell in sweep} == {1e9}
    assert sweep[0].id == "r6-b0-s0-f0" and sweep[0].lr == pytest.approx(study.cells[0].lr / 4, rel=1e-3)
    swept(study, best=0.008, exponent=0.8, diverged=("r6-b0-s2-f4",))
    rule = rates.settle(study, 6)
    assert rule.lr == pytest.approx(0.008, rel=0.02) and rule.exponent == pytest.approx(0.8, abs=0.02)
    again = open_study(study.path)
    for cell in again.measured:
        assert cell.lr == pytest.approx(0.008 * (cell.d_model / 64) ** -0.8, rel=0.03)
    assert again.manifest["summary"]["rates"]["6"] == asdict(rule) and rule.at_edge == 0
    assert [cell for cell in again.cells if cell.sweep is not None] == sweep
    assert rates.settle(again, 6) is None


def test_cells_wait_for_the_sweep_and_rows_are_of_cells_alone(planned):
    study = planned("rates: {sweep: [0.5, 1.0, 2.0]}\n")
    assert len(study.results()) == 9 and len(study.cells) == 18
    with pytest.raises(PixseqError, match="waits for the sweep"):
        one.run(study, study.cells[0])
    rows = run.run(study.path, budget_limit=1e9, device="cpu", precision="fp32")["cells"]
    assert [row["status"] for row in rows] == ["done"] * 3 + ["waiting"] * 6
    after = open_study(study.path)
    made = after.folder(rates.sweep_of(after, 6)[0])
    assert (made / "loss.json").exists() and not (made / "probe.json").exists()
    rule = rates.rule_of(after, 6)
    for row in rows:
        assert row["lr"] == pytest.approx(rule.lr * (row["d_model"] / 64) ** -rule.exponent, rel=1e-3)
    made = open_checkpoint(after.path / "cells" / rows[0]["id"] / "model").manifest
    assert made["config"]["train"]["lr"] == rows[0]["lr"]


def test_a_best_rate_at_the_end_of_the_sweep_is_said_and_a_wild_exponent_is_bound(planned):
    study = planned("rates: {sweep: [0.5, 1.0, 2.0]}\n")
    swept(study, best=1.0, exponent=5.0)
    rule = rates.settle(study, 6)
    assert rule.at_edge == 3 and rule.exponent <= 1.5 and "widen rates.sweep" in rates.in_words(6, rule)


def test_a_sweep_in_which_all_diverged_is_an_error(planned):
    study = planned("rates: sweep\n")
    swept(study, 0.01, 0.5, diverged=[cell.id for cell in rates.sweep_of(study, 6)])
    with pytest.raises(PixseqError, match="no width with 3 runs"):
        rates.settle(study, 6)


@pytest.mark.parametrize(
    "text, words",
    [
        ("seeds: 0\n", "seeds is 0"),
        ("rates: {sweep: [1.0, 2.0]}\n", "three different"),
        ("rates: {sweep: [-1.0, 1.0, 2.0]}\n", "above 0"),
        ("rates: {sweep: often}\n", "not a number"),
        ("rates: often\n", "not a section"),
    ],
)
def test_seeds_and_sweeps_that_cannot_be_are_refused(planned, text, words):
    with pytest.raises(UsageError) as fault:
        planned(text)
    assert words in f"{fault.value.message} {fault.value.hint}"


def test_a_grid_is_restored_as_it_was(tmp_path):
    (tmp_path / "g.yaml").write_text("data: {train: t, val: v}\nbudgets: 1.0\nrates: sweep\n")
    config = effective(GridFile, file=tmp_path / "g.yaml")
    assert config.rates.sweep == (0.25, 0.5, 1.0, 2.0, 4.0)
    listed = as_dict(config) | {"rates": as_dict(config)["rates"] | {"sweep": list(config.rates.sweep)}}
    listed |= {"data": list(listed["data"]), "budgets": list(config.budgets)}  # as JSON keeps them
    assert restored(GridFile, listed) == config
