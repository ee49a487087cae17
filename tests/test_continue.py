"""Training on: from a checkpoint of any kind with a recipe of its own, and for more steps than were planned."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import AIM, TINY, write_pixels, write_tokens

from pixseq.artifacts.checkpoint import finish_checkpoint, open_checkpoint
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.engine.training import Limits
from pixseq.errors import Interrupted, PixseqError, UsageError
from pixseq.models.family import shape_from
from pixseq.stages import evaluate, finetune, pretrain, show

FEW = ("train.steps=4", "train.batch_size=8", "train.log_every=1")
STILL = (*TINY, "train.schedule=constant", "train.warmup_fraction=0", "train.val_every=3", "train.ema=0.9")


def on(tokens, out, start, *sets, preset=None, **given):
    config = pretrain.config_from(start, preset, None, [*FEW, *sets])
    return pretrain.run(tokens, out, config, init_from=start, device="cpu", **given)


def first_loss(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]


# --- from a checkpoint


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_training_starts_from_the_weights_of_its_parent(checkpoints, tokens, tmp_path, objective):
    parent = open_checkpoint(checkpoints[objective])
    record = on(tokens, tmp_path / "m", parent.path, "train.lr=1e-12", preset=None)
    assert record["inputs"]["model"]["id"] == parent.manifest["id"] and record["summary"]["steps"] == 4
    assert record["summary"]["shape"] == parent.shape and record["config"]["train"]["lr"] == 1e-12
    ours, theirs = open_checkpoint(tmp_path / "m").weights(), parent.weights()
    assert all(torch.allclose(x, theirs[name], atol=1e-6) for name, x in ours.items())
    assert show.run(tmp_path / "m", verify=True)["id"] == record["id"]


def test_it_goes_on_after_an_interrupt_and_from_another_parent_it_does_not(checkpoints, tokens, tmp_path):
    start = checkpoints["ar"]
    whole = on(tokens, tmp_path / "whole", start, val_fraction=0.2)
    with pytest.raises(Interrupted):
        on(tokens, tmp_path / "m", start, val_fraction=0.2, limits=Limits(time_limit_minutes=0))
    with pytest.raises(PixseqError, match=r"inputs.model"):
        on(tokens, tmp_path / "m", tmp_path / "whole", val_fraction=0.2, resume=True)
    assert on(tokens, tmp_path / "m", start, val_fraction=0.2, resume=True)["id"] == whole["id"]


def test_a_parent_is_not_replaced_by_what_starts_from_it(checkpoints, tokens, tmp_path):
    shutil.copytree(checkpoints["ar"], tmp_path / "m")
    with pytest.raises(UsageError, match="what this command reads, and would be replaced"):
        on(tokens, tmp_path / "m", tmp_path / "m", overwrite=True)
    assert open_checkpoint(tmp_path / "m").manifest["id"] == open_checkpoint(checkpoints["ar"]).manifest["id"]


def test_another_shape_or_order_is_refused_by_name(checkpoints, aim, tokens, tmp_path):
    start = checkpoints["ar"]
    for given, said in (
        ({"sets": ["model.n_layer=3"]}, "model.n_layer is 3, .* has 2"),
        ({"sets": ["model.objective=bert"]}, "model.objective is bert, .* has ar"),
        ({"sets": ["sequence.order=column"]}, "sequence.order is column, .* has raster"),
        ({"preset": "igpt-digits"}, "model.n_layer is 4, .* has 2"),
        ({"sets": ["model.family=aim"]}, "model.family of --set model.family=aim is aim, .* is of igpt"),
        ({"sets": ["model.patch_size=2"]}, "model.patch_size is of models of family aim, and this one is of igpt"),
        ({"flags": {"model.attention": "causal"}}, "model.attention is of models of family aim"),
        ({"preset": "aim-cifar32"}, "model.family of --preset aim-cifar32 is aim, .* is of igpt"),
    ):
        with pytest.raises(UsageError, match=said):
            pretrain.config_from(start, **given)
    with pytest.raises(UsageError, match=r"model.attention is causal, .* has prefix"):
        pretrain.config_from(aim["prefix"], sets=["model.attention=causal"])
    with pytest.raises(UsageError, match=r"model.n_layer is 8, .* has 2"):
        pretrain.run(tokens, tmp_path / "m", effective(PretrainFile), init_from=start, device="cpu")
    assert not list(tmp_path.iterdir())


def test_other_tokens_are_refused(checkpoints, tmp_path):
    other = write_tokens(tmp_path / "t.zarr", palette_id="sha256:two")
    with pytest.raises(PixseqError, match=r"has the palette sha256:one, .* sha256:two"):
        on(other, tmp_path / "m", checkpoints["ar"])
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_an_order_of_its_own_is_kept(tokens, tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(ord(name)).permutation(36))
    for order in ("random", str(tmp_path / "a.npy")):
        config = effective(PretrainFile, sets=[*TINY, f"sequence.order={order}", "train.seed=1"])
        pretrain.run(tokens, tmp_path / "m", config, device="cpu", overwrite=True)
        on(tokens, tmp_path / "n", tmp_path / "m", overwrite=True)
        ours, theirs = (open_checkpoint(tmp_path / name).weights()["order"] for name in "nm")
        assert torch.equal(ours, theirs)
    shutil.copy(tmp_path / "a.npy", tmp_path / "c.npy")
    on(tokens, tmp_path / "o", tmp_path / "m", f"sequence.order={tmp_path / 'c.npy'}")
    with pytest.raises(UsageError, match="another permutation"):
        on(tokens, tmp_path / "x", tmp_path / "m", f"sequence.order={tmp_path / 'b.npy'}")


def test_the_class_head_of_a_fine_tuned_model_is_left_out_and_said(checkpoints, tokens, tmp_path, monkeypatch):
    sets = ["finetune.steps=2", "finetune.batch_size=8"]
    finetune.run(checkpoints["ar"], tokens, tmp_path / "tuned", effective(FinetuneFile, sets=sets), device="cpu")
    said = []
    monkeypatch.setattr(pretrain.progress, "note", said.append)
    record = on(tokens, tmp_path / "m", tmp_path / "tuned")
    assert record["summary"]["shape"]["n_classes"] == 0 and any("class head" in note for note in said)
    assert "classifier.weight" not in open_checkpoint(tmp_path / "m").weights()


def imported(path, kind, out, shape, **changes):
    """A checkpoint as an importer writes it: no run, no order, perhaps other fields of its shape and codec."""
    parent = open_checkpoint(path)
    weights = {name: x for name, x in parent.weights().items() if shape.head or not name.startswith("head.")}
    out.mkdir()
    codec = replace(parent.codec, **changes)
    finish_checkpoint(out, {"model": weights}, vars(shape), codec, kind, {"model": shape.config()}, {}, {}, {})
    return out


def test_imported_weights_are_trained_on(checkpoints, tokens, tmp_path):
    shape = shape_from(open_checkpoint(checkpoints["ar"]).shape)
    start = imported(checkpoints["ar"], "import hf", tmp_path / "hf", shape)
    assert first_loss_of(tokens, tmp_path, start) < np.log(16)
    bare = imported(checkpoints["ar"], "import hf", tmp_path / "bare", shape, palette=None, palette_id=None)
    with pytest.raises(PixseqError, match="palette unknown"):
        on(tokens, tmp_path / "x", bare)
    classifier = imported(checkpoints["ar"], "import hf", tmp_path / "c", replace(shape, shifted=False))
    with pytest.raises(UsageError, match="nothing to predict"):
        on(tokens, tmp_path / "x", classifier)


def first_loss_of(tokens, folder, start):
    on(tokens, folder / "on", start)
    return first_loss(folder / "on")


def test_a_trunk_without_a_prediction_head_is_given_one(aim, pixels, tmp_path, monkeypatch):
    shape = replace(shape_from(open_checkpoint(aim["prefix"]).shape), head=False)
    start, said = imported(aim["prefix"], "import aim", tmp_path / "trunk", shape), []
    monkeypatch.setattr(pretrain.progress, "note", said.append)
    record = on(pixels, tmp_path / "m", start)
    assert record["summary"]["shape"]["head"] and any("a new one is trained" in note for note in said)
    assert "normalized_mse" in evaluate.run(tmp_path / "m", pixels, device="cpu")


def test_an_aim_sees_whole_pictures_at_the_side_of_its_parent(aim, tmp_path):
    assert aim["prefix"].is_dir() and "model.patch_size=2" in AIM
    larger = write_pixels(tmp_path / "x.zarr", side=16)
    with pytest.raises(PixseqError, match=r"8x8 pictures, .* holds 16x16"):
        on(larger, tmp_path / "m", aim["prefix"])


def test_a_plan_is_of_the_parents_shape(checkpoints, tokens):
    config = pretrain.config_from(checkpoints["ar"], sets=["train.steps=5"])
    plan = pretrain.plan(tokens, config, device="cpu", init_from=checkpoints["ar"])
    assert plan["parameters"] == open_checkpoint(checkpoints["ar"]).manifest["summary"]["parameters"]


# --- for more steps


def still(tokens, out, steps, *sets, **given):
    config = effective(PretrainFile, sets=[*STILL, f"train.steps={steps}", *sets])
    return pretrain.run(tokens, out, config, val_fraction=0.2, device="cpu", **given)


@pytest.fixture(scope="module")
def long(tokens, tmp_path_factory):
    return still(tokens, tmp_path_factory.mktemp("long") / "m", 12)


def test_a_finished_run_of_a_constant_rate_is_extended_as_if_it_had_been_planned_so(tokens, long, tmp_path):
    short = still(tokens, tmp_path / "m", 6)
    again = still(tokens, tmp_path / "m", 12, resume=True)
    assert (again["id"], again["summary"]["weights"]) == (long["id"], long["summary"]["weights"])
    assert again["id"] != short["id"] and again["summary"]["planned_steps"] == 6
    assert again["summary"]["best"] == long["summary"]["best"] and "planned_steps" not in long["summary"]
    rows = [json.loads(line)["step"] for line in (tmp_path / "m" / "log.jsonl").read_text().splitlines()]
    assert rows == sorted(rows) and rows[-1] == 12
    assert show.run(tmp_path / "m", verify=True)["id"] == long["id"] and not (tmp_path / "m.partial").exists()


def test_an_extension_goes_on_after_an_interrupt_and_what_was_finished_stays_until_then(tokens, long, tmp_path):
    short = still(tokens, tmp_path / "m", 6)
    for _ in range(2):
        with pytest.raises(Interrupted):
            still(tokens, tmp_path / "m", 12, resume=True, limits=Limits(time_limit_minutes=0))
        assert show.run(tmp_path / "m", verify=True)["id"] == short["id"]
    assert still(tokens, tmp_path / "m", 12, resume=True)["id"] == long["id"]


def test_an_interrupted_run_of_a_constant_rate_takes_more_steps(tokens, long, tmp_path):
    with pytest.raises(Interrupted):
        still(tokens, tmp_path / "m", 6, limits=Limits(time_limit_minutes=0))
    with pytest.raises(PixseqError, match=r"train.steps \(6 then, 3 now\)"):
        still(tokens, tmp_path / "m", 3, resume=True)
    again = still(tokens, tmp_path / "m", 12, resume=True)
    assert again["id"] == long["id"] and again["summary"]["planned_steps"] == 6


def test_an_extended_run_leaves_what_was_kept_and_keeps_its_former_end(tokens, tmp_path):
    short = still(tokens, tmp_path / "m", 6, keep="every:2")
    before = {step: show.run(tmp_path / f"m-step{step}")["id"] for step in (2, 4)}
    with pytest.raises(Interrupted):
        still(tokens, tmp_path / "m", 9, resume=True, keep="every:2", limits=Limits(time_limit_minutes=0))
    shutil.rmtree(tmp_path / "m.partial" / "resume")  # lost: it begins at the shorter run's end again
    still(tokens, tmp_path / "m", 9, resume=True, keep="every:2")
    kept = {step: show.run(tmp_path / f"m-step{step}", verify=True) for step in (2, 4, 6, 8)}
    assert {step: kept[step]["id"] for step in before} == before
    assert kept[6]["summary"]["steps"] == 6
    assert kept[6]["summary"]["weights"]["model"] == short["summary"]["weights"]["model"]


def test_the_warm_up_stays_as_long_as_it_was_planned(tokens, tmp_path):
    warm = ("train.warmup_epochs=null", "train.warmup_fraction=0.5", "train.log_every=1")
    with pytest.raises(Interrupted):
        still(tokens, tmp_path / "m", 6, *warm, limits=Limits(time_limit_minutes=0))
    still(tokens, tmp_path / "m", 12, *warm, resume=True)
    rows = map(json.loads, (tmp_path / "m" / "log.jsonl").read_text().splitlines())
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[:3] == pytest.approx([0.003 * k / 4 for k in (1, 2, 3)]) and set(rates[3:]) == {0.003}


def test_what_cannot_be_extended_says_why_and_what_else_there_is(tokens, tmp_path):
    def cosine(out, steps, **given):
        config = effective(PretrainFile, sets=[*TINY, f"train.steps={steps}"])
        return pretrain.run(tokens, out, config, device="cpu", **given)

    done = cosine(tmp_path / "done", 4)
    assert not (tmp_path / "done" / "resume").exists()
    with pytest.raises(PixseqError, match="after 4 steps its learning rate has come down to zero") as fault:
        cosine(tmp_path / "done", 8, resume=True)
    assert f"--from {tmp_path / 'done'}" in fault.value.hint
    with pytest.raises(Interrupted):
        cosine(tmp_path / "cut", 4, limits=Limits(time_limit_minutes=0))
    with pytest.raises(PixseqError, match="another recipe: of 4 steps"):
        cosine(tmp_path / "cut", 8, resume=True)
    still(tokens, tmp_path / "still", 4)
    shutil.rmtree(tmp_path / "still" / "resume")
    with pytest.raises(PixseqError, match="optimizer's state is not kept") as fault:
        still(tokens, tmp_path / "still", 8, resume=True)
    assert "--from" in fault.value.hint
    assert still(tokens, tmp_path / "still", 8, resume=True, overwrite=True)["summary"]["steps"] == 8  # anew
    assert show.run(tmp_path / "done", verify=True)["id"] == done["id"]
    with pytest.raises(PixseqError, match="already exists"):
        still(tokens, tmp_path / "still", 12, "train.lr=0.1", resume=True)
