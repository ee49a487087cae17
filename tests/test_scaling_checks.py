"""A plan is checked for everything that its cells will need: no cell fails after it was trained."""

import os

import pytest
from conftest import write_pixels, write_tokens

from pixseq.artifacts import manifest
from pixseq.config import GridFile, effective
from pixseq.errors import PixseqError, UsageError
from pixseq.studies import plan, run
from pixseq.studies.judge import layer_of
from pixseq.studies.ranges import check_ranges
from pixseq.studies.study import open_study

SMALL = "budgets: [1.0e+9]\nbatch: {steps: 12, smallest: 4}\n"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    write_tokens(folder / "t.zarr", count=96)
    write_tokens(folder / "v.zarr", count=48, seed=1)
    write_tokens(folder / "bare.zarr", count=48, seed=1, labels=False)
    write_tokens(folder / "large.zarr", count=48, side=8)
    write_tokens(folder / "grey.zarr", count=48, palette=None, palette_id="sha256:one")
    write_pixels(folder / "p.zarr")
    return folder


def grid(tmp_path, stores, text, val="v.zarr"):
    (tmp_path / "grid.yaml").write_text(f"data: {{train: {stores}/t.zarr, val: {stores}/{val}}}\n" + SMALL + text)
    return tmp_path / "grid.yaml"


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: {n_layer: 4}\n", "unknown key model"),
        ("sequence: {order: random}\n", "unknown key sequence"),
        ("finetune: {lr: 0.1}\n", "unknown key finetune"),
        ("completions: {keep: 1.0}\n", "completions.keep is 1.0"),
        ("completions: {keep: -0.5}\n", "completions.keep"),
        ("completions: {count: 20, keep: 0.95}\n", "keeps all of 6 rows"),
        ("completions: {count: 20, keep: 0.05}\n", "keeps none of 6 rows"),
        ("completions: {temperature: -1.0}\n", "completions.temperature"),
        ("completions: {temperature: .nan}\n", "completions.temperature"),
        ("completions: {seed: -1}\n", "completions.seed"),
        ("completions: {count: 1}\n", "covariance"),
        ("completions: {count: 49}\n", "holds 48 images"),
        ("completions: {count: 20, extractor: inception}\n", "reference, pixels, or the path"),
        ("completions: {count: 20, extractor: pixels, layer: 0}\n", "pixels has no layers"),
        ("completions: {count: 20, layer: 7}\n", "completions.layer asks for layer 7"),
        ("completions: {count: 20, layer: -1}\n", "completions.layer"),
        ("completions: {count: 20, reference_budget: -1.0}\n", "reference_budget"),
        ("completions: {count: 20, reference_budget: 1.0e+3}\n", "below one step"),
        ("completions: {count: 20, images: all}\n", "spread"),
        ("completions: {count: 0}\nprobe: {c: abc}\n", "probe.c 'abc' is no list of numbers"),
        ("completions: {count: 0}\nprobe: {c: '0'}\n", "positive"),
        ("completions: {count: 0}\nprobe: {layers: some}\n", "probe.layers 'some' is no list of numbers"),
        ("completions: {count: 0}\nprobe: {layers: '-1,1'}\n", "probe.layers"),
        ("completions: {count: 0}\nprobe: {layers: '1,9'}\n", "probe.layers asks for layer 9"),
        ("completions: {count: 0}\nrates: {exponent: .inf}\n", "rates.exponent"),
        ("completions: {count: 0}\nmost_epochs: 0.0\n", "most_epochs"),
        ("completions: {count: 0}\ntrain: {augment: resized-crop}\n", "needs pixels"),
        ("completions: {count: 0}\ntrain: {steps: 0}\n", "train.steps"),
    ],
)
def test_what_a_cell_could_not_use_is_refused_before_any_work(tmp_path, stores, text, words):
    with pytest.raises((PixseqError, UsageError)) as fault:
        plan.run(grid(tmp_path, stores, text), tmp_path / "plan", timed=False)
    assert words in f"{fault.value.message} {fault.value.hint}"
    assert not (tmp_path / "plan").exists()


def test_an_extractor_that_does_not_go_with_the_stores_is_refused(tmp_path, stores, checkpoints):
    for val, words in (("large.zarr", "6x6"), ("grey.zarr", "palette")):
        with pytest.raises(PixseqError, match=words):
            plan.run(grid(tmp_path, stores, "", val), tmp_path / "plan", timed=False)
    other = write_tokens(tmp_path / "other.zarr", count=48, palette_id="sha256:two")
    text = f"data: {{train: {other}, val: {other}}}\ncompletions: {{count: 20, extractor: {checkpoints['ar']}}}\n"
    (tmp_path / "grid.yaml").write_text(SMALL + text)
    with pytest.raises(PixseqError, match="has the palette sha256:one"):
        plan.run(tmp_path / "grid.yaml", tmp_path / "plan", timed=False)


def test_an_extractor_is_a_parent_and_found_from_any_folder(tmp_path, stores, checkpoints, monkeypatch):
    import shutil

    shutil.copytree(checkpoints["ar"], tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    plan.run(grid(tmp_path, stores, "completions: {count: 20, extractor: judge, layer: 0}\n"), "plan", timed=False)
    monkeypatch.chdir(stores)
    study = open_study(tmp_path / "plan")
    how = study.grid.completions
    assert os.path.isabs(how.extractor) and layer_of(how, how.extractor) == 0
    assert study.manifest["inputs"]["extractor"]["id"] == manifest.read(checkpoints["ar"])["id"]
    shutil.rmtree(tmp_path / "judge")
    shutil.copytree(checkpoints["bert"], tmp_path / "judge")
    with pytest.raises(PixseqError, match="which now has id"):
        run.run(study.path, cell=study.cells[0].id)


def test_without_labels_a_plan_says_that_nothing_is_probed(tmp_path, stores):
    made = plan.run(grid(tmp_path, stores, "completions: {count: 0}\n", "bare.zarr"), tmp_path / "plan", timed=False)
    assert any("accuracies will not be measured" in remark for remark in made["remarks"])


def test_a_grid_may_come_with_its_own_train_section_only(tmp_path, stores):
    config = effective(GridFile, file=grid(tmp_path, stores, "train: {lr: 0.01}\n"))
    check_ranges(config)
    assert config.train.lr == 0.01
