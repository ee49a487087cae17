"""A scaling study end to end on small tokens: the grid, its cells, an interruption, and what is refused."""

import json

import numpy as np
import pytest
from conftest import write_pixels, write_tokens
from program import ended, forked, until

from pixseq.artifacts import manifest
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.plan import NUMBERS, Cell, read_plan
from pixseq.config import GridFile, effective
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import build, shape_from
from pixseq.runtime import Machine
from pixseq.stages import pretrain
from pixseq.studies import calibrate, fit, ladder, plan, run
from pixseq.studies import cell as one
from pixseq.studies.study import open_study

SMALL = "completions: {count: 40}\nprobe: {c: '0.1', layers: '1'}\nbatch: {steps: 12, smallest: 4}\n"


@pytest.fixture
def grid(tmp_path):
    """A grid file of two stores in a folder of its own; cells take a moment."""
    write_tokens(tmp_path / "t.zarr", count=96)
    write_tokens(tmp_path / "v.zarr", count=48, seed=1)
    return grid_file(tmp_path, "budgets: [1.0e+9, 2.0e+9, 4.0e+9]\n")


def grid_file(folder, text, name="grid.yaml"):
    data = f"data: {{train: {folder}/t.zarr, val: {folder}/v.zarr}}\n"
    (folder / name).write_text(data + SMALL + text)
    return folder / name


def planned(grid, **options):
    made = plan.run(grid, grid.parent / "plan", timed=False, **options)
    return [Cell.from_json(cell) for cell in made["cells"]]


@pytest.mark.parametrize(("have", "known", "said"), [(0.05, 15, "told by smaller ones"), (0.0005, 0, "not known")])
def test_shapes_larger_than_memory_are_not_built_to_time_them(grid, monkeypatch, have, known, said):
    built, grid = [], grid_file(grid.parent, "budgets: [1.0e+13, 1.0e+14, 1.0e+15]\n")
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: int(have * 1e9))
    monkeypatch.setattr(calibrate, "flop_rate", lambda where, grid, train, cell: built.append(cell) or 1e9)
    made = plan.run(grid, grid.parent / "plan", timed=True, device="cpu")
    assert all(cell.memory_gigabytes <= have for cell in built) and bool(built) == bool(known)
    assert sum(cell["seconds"] is not None for cell in made["cells"]) == known
    assert any(said in remark for remark in made["remarks"])


def test_cells_spend_their_budget_and_say_exactly_how_much(grid):
    cells = planned(grid)
    assert len(cells) == 15 and len({cell.id for cell in cells}) == 15
    study = open_study(grid.parent / "plan")
    for cell in cells:
        config = ladder.recipe(study.grid, cell.d_model, cell.steps, cell.batch_size, cell.lr)
        from pixseq.artifacts.arrays import open_store

        shape = pretrain.model_shape(config, open_store(study.data(cell).train, "tokens"))
        assert cell.tokens == cell.steps * cell.batch_size * 36
        assert cell.flops == cell.tokens * shape.flops_per_token("exact")
        assert abs(cell.flops / cell.budget - 1) < 0.6 / cell.steps + 1e-9
        assert cell.params == sum(p.numel() for p in build(shape).parameters())
        assert cell.epochs == pytest.approx(cell.steps * cell.batch_size / 96, abs=1e-3)
    for budget in (1e9, 2e9, 4e9):
        sizes = [cell.params for cell in cells if cell.budget == budget]
        assert sizes == sorted(set(sizes)) and len(sizes) == 5


def test_two_budgets_are_the_ends_of_a_range(tmp_path):
    for text in ("[1.0e+12, 1.0e+14]", "{from: 1.0e+12, to: 1.0e+14}"):
        (tmp_path / "g.yaml").write_text(f"data: {{train: t, val: v}}\nbudgets: {text}\n")
        budgets = plan.checked(effective(GridFile, file=tmp_path / "g.yaml")).budgets
        assert np.allclose(np.log10(budgets), [12, 12.5, 13, 13.5, 14])


@pytest.mark.parametrize("counting", ["exact", "exact-causal", "6nd"])
@pytest.mark.parametrize("params", ["total", "non-embedding"])
def test_the_estimate_has_the_tokens_a_parameter_that_were_asked_for(grid, counting, params):
    config = effective(GridFile, file=grid, sets=[f"flops={counting}", f"params={params}", "tokens_per_param=30"])
    codec = Codec("palette", 16, 16, 512)
    rungs = ladder.ladder(config, codec)
    middle = ladder.centre(config, rungs, 1e15)
    nearest = min(rungs, key=lambda shape: abs(np.log(ladder.size(config, shape) / middle)))
    ratio = 1e15 / nearest.flops_per_token(counting) / ladder.size(config, nearest)
    assert 20 < ratio < 45


@pytest.mark.parametrize("key, value", [("d_model", 10**5), ("batch_size", 10**9), ("steps", 10**14)])
def test_a_cell_of_numbers_that_no_run_has_is_refused(grid, key, value):
    cell = Cell(
        **dict.fromkeys((*NUMBERS, "resolution"), 8) | {"id": "a", "data": 0, "d_model": 16, "lr": 0.1, key: value}
    )
    with pytest.raises(UsageError, match="n_layer" if key == "d_model" else key):  # a wide model is deep
        ladder.recipe_of(effective(GridFile, file=grid), cell)


def test_the_ladder_climbs_in_small_steps_and_heads_divide_the_width(grid):
    config = effective(GridFile, file=grid)
    rungs = ladder.ladder(config, Codec("palette", 32, 32, 512))
    sizes = np.array([shape.trunk_count() for shape in rungs])
    assert (np.diff(sizes) > 0).all() and (sizes[1:] / sizes[:-1]).max() < 2
    assert all(shape.d_model % shape.n_head == 0 for shape in rungs)
    published = next(shape for shape in rungs if shape.d_model == 512)
    assert (published.n_head, published.d_model // published.n_head) == (8, 64)


def test_sizes_reach_as_far_from_the_estimate_as_is_asked_for(grid):
    for reach in (2.0, 8.0):
        config = effective(GridFile, file=grid, sets=[f"size_range={reach}"])
        rungs = ladder.ladder(config, Codec("palette", 32, 32, 512))
        sizes = [ladder.size(config, shape) / 1e7 for shape in ladder.around(config, rungs, 1e7)]
        assert np.allclose(np.log([sizes[0], sizes[-1]]) / np.log(reach), [-1, 1], atol=0.5)


def test_other_pictures_may_be_probed_than_are_trained_and_scored_on(grid):
    folder = grid.parent
    for seed, name in enumerate("ab", 2):
        write_tokens(folder / f"{name}.zarr", count=40, seed=seed)
    names = {"train": "t", "val": "v", "probe_train": "a", "probe_test": "b"}
    stores = {role: f"{folder}/{name}.zarr" for role, name in names.items()}
    grid.write_text(f"data: {json.dumps(stores)}\n{SMALL}budgets: [1.0e+9]\n")
    cell = planned(grid)[0]
    study = open_study(folder / "plan")
    one.run(study, cell, "cpu")
    made = {"probe_train": "train.features.zarr", "probe_test": "test.features.zarr", "val": "loss.json"}
    for role, name in made.items():
        assert manifest.read(study.folder(cell) / name)["inputs"]["tokens"]["id"] == manifest.read(stores[role])["id"]


def test_a_study_runs_once_is_kept_and_can_be_fitted(grid, monkeypatch):
    grid_file(grid.parent, "budgets: [1.0e+9, 2.0e+9, 4.0e+9]\nsizes_per_budget: 3\n")
    planned(grid)
    folder = grid.parent / "plan"
    for cell in open_study(folder).cells[:-2]:
        one.run(open_study(folder), cell)
    monkeypatch.chdir(grid.parent.parent)  # from another folder than it was planned in
    rows = run.run(folder, jobs=2)["cells"]
    assert [row["status"] for row in rows] == ["done"] * 9
    for row in rows:
        assert 0 < row["loss"] < np.log(16) + 1 and 0 <= row["accuracy"] <= 1 and row["frechet_distance"] >= 0
    study = open_study(folder)
    made = study.folder(study.cells[0])
    for name in ("model", "loss.json", "probe.json", "completions.zarr", "frechet.json", "result.json"):
        assert manifest.read(made / name)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run.run(folder)["cells"] == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    fitted = fit.run(folder, resamples=0)
    assert {f["metric"] for f in fitted["fits"]} == {"loss", "accuracy", "frechet_distance"}
    with pytest.raises(PixseqError, match="9 cells have begun"):
        planned(grid, overwrite=True)


def test_a_cell_trains_in_the_machines_precision_and_is_measured_in_float32(grid, monkeypatch):
    monkeypatch.setattr("pixseq.runtime._has_bf16_units", lambda where: True)
    cell = planned(grid)[0]
    study = open_study(grid.parent / "plan")
    one.run(study, cell, "cpu")
    measured = ("loss.json", "test.features.zarr", "train.features.zarr")
    made = {name: manifest.read(study.folder(cell) / name) for name in ("model", *measured)}
    used = {name: found["config"]["precision"] for name, found in made.items()}
    assert used == {"model": "bf16"} | dict.fromkeys(measured, "fp32")


def test_a_cell_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(grid):
    grid_file(grid.parent, "budgets: [1.0e+9, 2.0e+9, 4.0e+10]\nrecentre: false\n")
    planned(grid)
    study = open_study(grid.parent / "plan")
    longest = max(study.cells, key=lambda cell: cell.steps)
    running = forked("scaling", "run", study.path, "--cell", longest.id, "--quiet")
    log = study.folder(longest) / "model.partial" / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > 1, running.is_alive)
    running.terminate()
    assert ended(running) == 130 and study.status(longest) == "begun"
    numbers = one.run(study, longest)
    assert numbers["status"] == "done"
    fresh = study.folder(longest)
    config = ladder.recipe(study.grid, longest.d_model, longest.steps, longest.batch_size, longest.lr)
    again = pretrain.run(study.data(longest).train, grid.parent / "again", config)
    assert again["id"] == open_checkpoint(fresh / "model").manifest["id"]


def test_a_diverged_cell_is_recorded_and_reported_not_dropped(grid):
    grid_file(grid.parent, "budgets: [1.0e+9, 2.0e+9, 4.0e+9]\ntrain: {lr: 1.0e+30, warmup_epochs: null}\n")
    planned(grid)
    study = open_study(grid.parent / "plan")
    assert one.run(study, study.cells[0])["status"] == "diverged"
    found = study.results()[0]
    assert found.status == "diverged" and "gradient norm" in str(found.reason) and found.loss is None


def test_budgets_not_begun_move_to_where_those_below_point(grid):
    cells = planned(grid)
    study = open_study(grid.parent / "plan")
    from pixseq.artifacts.metrics import write_metrics

    for cell in cells:
        if cell.budget < 4e9:  # the largest size is best by far
            loss = {"status": "done", "reason": None, "loss": 5 - np.log(cell.params) / 10}
            write_metrics(study.folder(cell) / "result.json", "scaling run", cell.to_json(), {}, loss)
    assert not plan.move(study, 6, 1e9) and plan.move(study, 6, 4e9)
    moved = [cell for cell in open_study(study.path).cells if cell.budget == 4e9]
    before = [cell for cell in cells if cell.budget == 4e9]
    assert [cell.id for cell in moved] == [cell.id for cell in before]
    assert np.median([c.params for c in moved]) > np.median([c.params for c in before])
    assert not plan.move(study, 6, 4e9)  # already there
    assert [c for c in open_study(study.path).cells if c.budget < 4e9] == [c for c in cells if c.budget < 4e9]


def test_patch_models_have_studies_too(tmp_path):
    write_pixels(tmp_path / "t.zarr"), write_pixels(tmp_path / "v.zarr", count=48, seed=1)
    grid = grid_file(tmp_path, "budgets: [1.0e+9]\nshapes: {family: aim, patch_size: 2, head_depth: 1}\n")
    cell = planned(grid)[0]
    study = open_study(tmp_path / "plan")
    numbers = one.run(study, cell)
    assert numbers["loss_unit"] == "normalized_mse" and numbers["frechet_distance"] is None
    shape = shape_from(open_checkpoint(study.folder(cell) / "model").shape)
    assert cell.params == shape.trunk_count() < shape.parameter_count()


def test_a_time_is_expected_from_measured_steps(grid):
    cells = plan.run(grid, grid.parent / "plan")["cells"]
    assert all(0 < cell["seconds"] < 60 for cell in cells)


@pytest.mark.parametrize(
    "text, words",
    [
        ("budgets: []\n", "budgets"),
        ("", "budgets is not given"),
        ("budgets: [-1.0]\n", "budgets is -1.0, it must be above 0"),
        ("budgets: [1.0e+3]\n", "below one step of the smallest model"),
        ("budgets: [1.0e+9]\nsizes_per_budget: 1\n", "sizes_per_budget"),
        ("budgets: [1.0e+9]\nsize_per_budget: 5\n", "sizes_per_budget"),
        ("budgets: [many]\n", "a number"),
        ("budgets: [1.0e+9]\nflops: 7nd\n", "6nd"),
        ("budgets: [1.0e+9]\nshapes: {family: aim}\n", "pixels"),
    ],
)
def test_grids_that_plan_nothing_are_refused(grid, text, words):
    grid_file(grid.parent, text)
    with pytest.raises((PixseqError, UsageError)) as fault:
        planned(grid)
    assert words in f"{fault.value.message} {fault.value.hint}"
    assert not (grid.parent / "plan").exists()


def test_other_parents_than_planned_are_refused(grid):
    planned(grid)
    import shutil

    shutil.rmtree(grid.parent / "v.zarr")
    write_tokens(grid.parent / "v.zarr", count=48, seed=2)
    with pytest.raises(PixseqError, match="which now has id"):
        run.run(grid.parent / "plan")


def test_a_cell_that_is_not_planned_is_refused(grid):
    planned(grid)
    with pytest.raises(PixseqError, match="no cell 'r7"):
        run.run(grid.parent / "plan", cell="r7")
    assert not list((grid.parent / "plan").rglob("model*"))


def test_a_plan_is_shown_and_verified(grid):
    from pixseq.stages import show

    planned(grid)
    assert show.run(grid.parent / "plan", verify=True)["kind"] == "plan"
    path = grid.parent / "plan" / "manifest.json"
    record = json.loads(path.read_text())
    record["cells"][0]["d_model"] += 8
    path.write_text(json.dumps(record))
    with pytest.raises(PixseqError, match="does not match its id"):
        show.run(grid.parent / "plan", verify=True)
    with pytest.raises(PixseqError, match="not those of its id"):
        read_plan(grid.parent / "plan")
