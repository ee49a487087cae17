"""What completions are judged by: the reference model, the pictures compared, and that Gaussian noise does not pass."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_tokens

from pixseq.artifacts import manifest
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.metrics import write_metrics
from pixseq.errors import PixseqError, UsageError
from pixseq.stages import features, frechet
from pixseq.studies import cell as one
from pixseq.studies import judge, plan, rates, run
from pixseq.studies.study import Result, open_study

SMALL = "probe: {c: '0.1', layers: '1'}\nbatch: {steps: 12, smallest: 4}\n"
HERE = {"device": "cpu", "precision": "fp32"}


def planned(folder, text, data="t.zarr", **options):
    (folder / "grid.yaml").write_text(f"data: {{train: {folder}/{data}, val: {folder}/v.zarr}}\n{text}")
    made = plan.run(folder / "grid.yaml", folder / "plan", timed=False, **options)
    return open_study(folder / "plan"), made


@pytest.fixture
def stores(tmp_path):
    write_tokens(tmp_path / "t.zarr", count=96)
    write_tokens(tmp_path / "v.zarr", count=48, seed=1)
    return tmp_path


# ---- what it is for


def digits(folder):
    """The embedded digits in 17 greys, 8x8."""
    from sklearn.datasets import load_digits

    tokens = load_digits().data.astype(np.uint16)[np.random.default_rng(0).permutation(1797)]
    grey = [[level / 8 - 1] * 3 for level in range(17)]
    for name, rows in (("t", tokens[:1100]), ("v", tokens[1100:])):
        write_tokens(
            folder / f"{name}.zarr", tokens=rows, count=len(rows), side=8, n_vocab=17, palette=grey, labels=False
        )
    return tokens[:1100]


def gaussian_completions(train, prompts):
    """Lower halves drawn from the Gaussian of the colours given the upper halves, in the nearest greys."""
    half = train.shape[1] // 2
    mean, covariance = train.mean(0), np.cov(train.T.astype(float)) + 1e-3 * np.eye(train.shape[1])
    slope = covariance[half:, :half] @ np.linalg.inv(covariance[:half, :half])
    rest = np.linalg.cholesky(covariance[half:, half:] - slope @ covariance[:half, half:])
    noise = np.random.default_rng(0).standard_normal((len(prompts), half)) @ rest.T
    drawn = mean[half:] + (prompts[:, :half] - mean[:half]) @ slope.T + noise
    return np.concatenate([prompts[:, :half], drawn.round().clip(0, 16).astype(np.uint16)], axis=1)


def test_gaussian_noise_of_the_right_covariance_is_worse_than_a_trained_model(tmp_path):
    train = digits(tmp_path)
    study, _ = planned(
        tmp_path,
        "budgets: [1.0e+10]\nsizes_per_budget: 2\nbatch: {steps: 150, smallest: 8}\nprobe: {layers: '1', c: '0.1'}\n"
        "train: {optimizer: muon, lr: 0.012, warmup_epochs: null}\ncompletions: {count: 340}\n",
    )
    numbers = one.run(study, study.cells[0], **HERE)
    shared = judge.ready(study, study.cells[0], HERE)
    drawn = gaussian_completions(train, open_store(shared.prompts, "tokens").read("tokens"))
    meta = open_store(shared.prompts, "tokens").meta
    write_tokens(tmp_path / "g.zarr", tokens=drawn, count=len(drawn), labels=False, **{"side": 8, **meta})
    shared.features(tmp_path / "g.zarr", tmp_path / "g.features.zarr", HERE)
    noise = frechet.run(tmp_path / "g.features.zarr", shared.real, layer=shared.layer)["frechet_distance"]
    assert noise > 2 * numbers["frechet_distance"] and noise > 3 * numbers["frechet_floor"]

    def in_colours(store):
        features.run("pixels", store, tmp_path / "p.zarr", overwrite=True)
        features.run("pixels", shared.prompts, tmp_path / "q.zarr", overwrite=True)
        return frechet.run(tmp_path / "p.zarr", tmp_path / "q.zarr")["frechet_distance"]

    assert in_colours(tmp_path / "g.zarr") < in_colours(study.folder(study.cells[0]) / "completions.zarr")


def test_colours_are_an_option_that_is_named_for_what_it_is(stores):
    study, made = planned(stores, SMALL + "budgets: [1.0e+9]\ncompletions: {count: 20, extractor: pixels}\n")
    numbers = one.run(study, study.cells[0], **HERE)
    assert made["references"] == [] and numbers["frechet_extractor"].startswith("pixels")
    assert not (study.path / "reference" / "r6" / "model").exists()


# ---- the reference model


def test_a_reference_is_trained_once_at_a_stated_cost_and_named_in_every_result(stores):
    study, made = planned(stores, SMALL + "budgets: [1.0e+9, 2.0e+9, 4.0e+9]\ncompletions: {count: 20}\n")
    (planned_reference,) = made["references"]
    assert planned_reference["flops"] == pytest.approx(4e9, rel=0.1)  # the largest budget
    assert study.manifest["summary"]["references"] == made["references"]
    run.run(study.path, cell="reference-r6", **HERE)
    model = open_checkpoint(study.path / "reference" / "r6" / "model")
    assert model.shape["d_model"] == planned_reference["d_model"]
    trained = model.manifest["config"]["train"]
    assert trained["steps"] == planned_reference["steps"] and trained["seed"] == judge.OTHER_SEED
    stamp = (study.path / "reference" / "r6" / "model" / "manifest.json").stat().st_mtime_ns
    for cell in study.cells[:2]:
        numbers = one.run(study, cell, **HERE)
        assert model.manifest["id"] in numbers["frechet_extractor"] and "below 0.5" in numbers["frechet_extractor"]
        assert numbers["frechet_n"] == numbers["frechet_floor_n"] == 20 and numbers["frechet_floor"] > 0
        result = manifest.read(study.folder(cell) / "result.json")
        assert result["inputs"]["extractor"]["id"] == model.manifest["id"]
    assert stamp == (study.path / "reference" / "r6" / "model" / "manifest.json").stat().st_mtime_ns
    row = study.results()[0].to_json()
    keys = ("frechet_n", "frechet_floor", "frechet_floor_n", "frechet_extractor", "seed", "lr")
    assert all(row[key] is not None for key in keys)


def test_a_plan_that_is_replaced_keeps_no_reference_of_the_one_before(stores):
    text = SMALL + "budgets: [1.0e+9]\ncompletions: {count: 20}\n"
    study, _ = planned(stores, text)
    run.run(study.path, cell="reference-r6", **HERE)
    study, _ = planned(stores, text.replace("count: 20", "count: 24"), overwrite=True)
    assert not (study.path / "reference").exists()
    assert one.run(study, study.cells[0], **HERE)["frechet_n"] == 24


def test_a_reference_that_diverges_is_no_cell_that_did(stores):
    text = "budgets: [1.0e+9]\ncompletions: {count: 20}\ntrain: {lr: 1.0e+30, warmup_epochs: null}\n"
    study, _ = planned(stores, SMALL + text)
    with pytest.raises(PixseqError, match="reference model of completions"):
        run.run(study.path, cell="reference-r6", **HERE)


# ---- the pictures


def test_completed_pictures_are_spread_over_the_classes_and_their_originals_are_the_real_side(tmp_path):
    write_tokens(tmp_path / "t.zarr", count=96)
    held = write_tokens(tmp_path / "h.zarr", count=80, seed=1)
    tokens, labels = open_store(held, "tokens").read("tokens"), open_store(held, "tokens").labels()
    order = np.argsort(labels, kind="stable")  # as class folders are read
    write_sorted(tmp_path / "v.zarr", tokens[order], labels[order])
    study, _ = planned(tmp_path, SMALL + "budgets: [1.0e+9]\ncompletions: {count: 30}\n")
    shared = judge.ready(study, study.cells[0], HERE)
    prompts, others = (open_store(shared.prompts.with_name(f"{name}.zarr"), "tokens") for name in ("prompts", "others"))
    wanted = np.bincount(labels) * 30 / 80
    assert abs(np.bincount(prompts.labels(), minlength=4) - wanted).max() <= 1
    assert abs(np.bincount(others.labels(), minlength=4) - wanted).max() <= 1
    rows = [store.manifest["config"]["rows"] for store in (prompts, others)]
    assert not set(rows[0]) & set(rows[1]) and (prompts.read("tokens") == tokens[order][rows[0]]).all()
    assert manifest.read(shared.real)["inputs"]["tokens"]["id"] == prompts.manifest["id"]


def write_sorted(path, tokens, labels):
    from pixseq.artifacts import owning
    from pixseq.artifacts.specs import Spec
    from pixseq.artifacts.store_writer import StoreWriter

    meta = open_store(path.parent / "h.zarr", "tokens").meta
    with owning.writing(path) as partial:
        specs = {"tokens": Spec("uint16", (None, tokens.shape[1])), "labels": Spec("int32", (None,))}
        writer = StoreWriter(partial, specs, {}, 32)
        writer.append({"tokens": tokens, "labels": labels}, {})
        writer.finish("tokens", "encode", {}, {}, {}, meta)


def test_a_plan_from_before_there_was_a_choice_goes_on_as_it_began(stores):
    study, _ = planned(stores, SMALL + "budgets: [1.0e+9]\ncompletions: {count: 20, extractor: pixels}\n")
    path = study.path / "manifest.json"
    record = json.loads(path.read_text())
    for key in ("images", "reference_budget"):
        del record["config"]["completions"][key]
    path.write_text(json.dumps(record))
    old = open_study(study.path)
    assert old.manifest["id"] == study.manifest["id"] and old.grid.completions.extractor == "pixels"
    val = open_store(stores / "v.zarr", "tokens")
    assert judge.rows_of_sides(old.grid.completions, val)["prompts"].tolist() == list(range(20))


def test_features_below_a_row_are_the_mean_of_those_positions(stores, checkpoints):
    options = {"layers": "1", **HERE}
    features.run(checkpoints["ar"], stores / "v.zarr", stores / "all.zarr", pool="none", **options)
    features.run(checkpoints["ar"], stores / "v.zarr", stores / "low.zarr", below=0.5, **options)
    every, low = (open_store(stores / name, "features") for name in ("all.zarr", "low.zarr"))
    assert np.allclose(every.read("features")[:, :, 18:].mean(2), low.read("features"), atol=1e-6)
    with pytest.raises(UsageError, match="leaves none of 6 rows"):
        features.run(checkpoints["ar"], stores / "v.zarr", stores / "none.zarr", below=0.99, **options)
    features.run(checkpoints["ar"], stores / "v.zarr", stores / "mean.zarr", **options)
    with pytest.raises(PixseqError, match="the pools differ"):
        frechet.run(stores / "low.zarr", stores / "mean.zarr")


def test_a_reference_takes_the_rate_of_the_sweep_and_waits_for_it(stores):
    text = SMALL + "budgets: [1.0e+9]\nsizes_per_budget: 3\nrates: {sweep: [0.5, 1.0, 2.0]}\ncompletions: {count: 4}\n"
    study, _ = planned(stores, text)
    (before,) = judge.references(study)
    with pytest.raises(PixseqError, match="reference-r6: its learning rate waits for the sweep"):
        one.run_named(study, before.id, **HERE)
    order = []
    for cell in run._in_order(study, None, {}):
        if cell is not run.WAIT:
            order.append(cell.id)
            numbers = {"status": "done", "reason": None, "loss": 2 + np.log(cell.lr / 0.02) ** 2}
            folder = judge.folder_of(study, cell) if "reference" in cell.id else study.folder(cell)
            write_metrics(folder / "result.json", "scaling run", cell.to_json(), {}, numbers)
    assert order.index("reference-r6") == 9 and all("-f" in id for id in order[:9]) and len(order) == 13
    (after,) = judge.references(study)
    rule = rates.rule_of(study, 6)
    assert after.lr == rule.at(after.d_model)
    assert after.lr != before.lr and replace(after, lr=0) == replace(before, lr=0)


def test_the_board_shows_what_runs_beside_the_cells(stores):
    study, _ = planned(stores, SMALL + "budgets: [1.0e+9]\nrates: {sweep: [0.5, 1.0, 2.0]}\ncompletions: {count: 4}\n")
    (reference,), swept = judge.references(study), rates.sweep_of(study, 6)[0]
    workers = [SimpleNamespace(cell=cell) for cell in (reference, swept, study.measured[0], None)]
    log = judge.folder_of(study, reference) / "model.partial" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 7, "loss": 2.0}\n')
    rows = run._rows(study, workers, {})
    assert [row[0] for row in rows[:3]] == [reference.id, swept.id, study.measured[0].id]
    assert rows[0][3] == f"7/{reference.steps}" and rows[1][3] == "starts" and len(rows) == 2 + len(study.measured)
    assert {len(row) for row in rows} == {len(run.HEAD)}


def test_a_part_of_a_store_knows_which_images_its_rows_show(stores):
    views = np.repeat(np.arange(8), 3)
    store = open_store(write_tokens(stores / "w.zarr", count=24, images=views), "tokens")
    judge._copy(store, np.array([1, 5, 22]), stores / "some.zarr")
    np.testing.assert_array_equal(open_store(stores / "some.zarr", "tokens").images(), views[[1, 5, 22]])


def test_one_bad_run_does_not_move_the_sizes_of_the_next_budget(stores, monkeypatch):
    study, _ = planned(stores, SMALL + "budgets: [1.0e+9, 2.0e+9]\ncompletions: {count: 0}\n")
    cell = next(each for each in study.cells if each.budget == 1e9)
    cells = [replace(cell, params=n) for n in np.geomspace(1e4, 1e6, 7)]
    done = [Result(each, "done", loss=2 + 0.1 * np.log(each.params / 1e5) ** 2) for each in cells]
    monkeypatch.setattr(type(study), "results", lambda self: done)
    expected = plan._expected_optimum(study, 6, 2e9)
    done[5] = replace(done[5], loss=done[5].loss + 3)
    assert plan._expected_optimum(study, 6, 2e9) == pytest.approx(expected, rel=0.02)
    assert plan._lowest(done) < np.log(expected) - 0.5 or plan._lowest(done) > np.log(expected)
