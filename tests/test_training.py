"""Pretraining and fine-tuning: it learns, resumes bit for bit, stops cleanly, never leaves a broken target."""

import json
import math
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_tokens
from program import ended, forked, until

from pixseq import runtime
from pixseq.artifacts import manifest, publishing
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.metrics import read_log
from pixseq.config import FinetuneFile, PretrainFile, as_dict, effective
from pixseq.engine import training
from pixseq.engine.cost import micro_batch_images
from pixseq.engine.image_store import read_all
from pixseq.engine.images import Images
from pixseq.engine.intermediate import kept_steps
from pixseq.engine.step import share_of_batch
from pixseq.engine.training import Limits
from pixseq.errors import Diverged, Interrupted, PixseqError, UsageError
from pixseq.models.igpt import IgptShape, ImageGPT
from pixseq.runtime import Machine
from pixseq.stages import evaluate, finetune, pretrain, sample, show


def recipe(*sets):
    return effective(PretrainFile, sets=[*TINY, *sets])


def losses(path):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in read_log(path)]


def test_loss_starts_at_ln_vocabulary_and_falls(tokens, tmp_path):
    pretrain.run(tokens, tmp_path / "m", recipe("train.steps=60", "train.log_every=1"), device="cpu")
    rows = read_log(tmp_path / "m" / "log.jsonl")
    assert abs(rows[0]["loss"] - math.log(16)) < 1e-3 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert show.run(tmp_path / "m", verify=True, plot=tmp_path / "loss.png")["summary"]["steps"] == 60
    assert manifest.read(tmp_path / "loss.png")["kind"] == "picture"


@pytest.mark.parametrize(("objective", "optimizer"), [("ar", "adam"), ("bert", "adam"), ("ar", "muon")])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tokens, tmp_path, monkeypatch, objective, optimizer):
    sets = ["train.ema=0.9", "train.augment=crop-flip", "train.log_every=1", f"train.optimizer={optimizer}"]
    config = recipe(*sets, f"model.objective={objective}")
    whole = pretrain.run(tokens, tmp_path / "a", config, val_fraction=0.1, device="cpu")
    assert whole["config"]["held_out"]["how"] == "stratified" and whole["config"]["held_out"]["of"] == 96
    stop_after(monkeypatch, 5)
    with pytest.raises(Interrupted, match="SIGTERM after 4 of 12"):
        pretrain.run(tokens, tmp_path / "b", config, val_fraction=0.1, device="cpu")
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    with pytest.raises(PixseqError, match="interrupted run"):
        pretrain.run(tokens, tmp_path / "b", config, val_fraction=0.1, device="cpu")
    with pytest.raises(PixseqError, match=r"another recipe.*train.lr"):
        other = recipe(*sets, f"model.objective={objective}", "train.lr=0.1")
        pretrain.run(tokens, tmp_path / "b", other, val_fraction=0.1, device="cpu", resume=True)
    parts = pretrain.run(tokens, tmp_path / "b", config, val_fraction=0.1, device="cpu", resume=True)
    assert parts["id"] == whole["id"]
    assert losses(tmp_path / "a" / "log.jsonl") == losses(tmp_path / "b" / "log.jsonl")
    for name in ("ema", "best"):
        a, b = open_checkpoint(tmp_path / "a").weights(name), open_checkpoint(tmp_path / "b").weights(name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def stop_after(monkeypatch, steps):
    """A real SIGTERM while the step after `steps` - 1 is under way, which is thrown away."""
    real, count = training.learning_rate, iter(range(1, 10_000))

    def learning_rate(*args):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(training, "learning_rate", learning_rate)


def test_micro_batches_do_not_change_the_gradient(tokens, tmp_path):
    for micro in (8, 3):
        limits = Limits(micro_batch=micro)
        pretrain.run(tokens, tmp_path / str(micro), recipe("model.objective=bert"), device="cpu", limits=limits)
    a, b = (open_checkpoint(tmp_path / name).weights() for name in ("8", "3"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-3)


RANKS = [Machine(torch.device("cpu"), "fp32", rank, 3) for rank in range(3)]


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop-jitter", "resized-crop"])
def test_ranks_prepare_their_own_share_of_the_same_batch(tokens, pixels, monkeypatch, augment):
    """What a step sees is a function of seed and step whatever the ranks, and no rank reads what another one needs."""
    patches = augment.startswith("resized")
    sets = ["model.family=aim", "model.patch_size=2"] if patches else ["model.objective=bert"]
    config = recipe(*sets, f"train.augment={augment}", "train.batch_size=8")
    store = open_store(pixels if patches else tokens, "tokens", "pixels")
    seen = (4, 4, 3) if augment == "resized-crop" else store.codec.grid  # a part of what is stored
    images = Images(read_all(store), store.labels(), seen)
    model = pretrain.fresh_model(pretrain.model_shape(config, store), config, store.codec.grid, images)
    whole = share_of_batch(Machine(torch.device("cpu"), "fp32"), images, config.train, 5, model)
    read, real = [], Images._stored

    def stored(self, rows):
        read.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(Images, "_stored", stored)
    parts = [share_of_batch(rank, images, config.train, 5, model) for rank in RANKS]
    assert read == [2, 3, 3]
    for name in ("images", "labels", "masked"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert {part.counts for part in parts} == {whole.counts}


def test_a_gpu_of_its_own_is_not_divided_by_the_ranks(monkeypatch):
    """80 GB hold as many images of one rank as of eight; the ranks of a host share its own memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(runtime, "host_memory_bytes", lambda: 80 << 30)
    shape = IgptShape.of(as_dict(effective(PretrainFile, "igpt-l").model), (32, 32, 1), 512, "raster")
    model, alone = SimpleNamespace(shape=shape), Machine(torch.device("cuda", 0), "bf16")
    found = {}
    for device, local in (("cuda", 8), ("cpu", 8), ("cpu", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        ranks = runtime.sharers(torch.device(device), 8)
        on = Machine(torch.device("cuda" if device == "cuda" else device), "bf16", 3, 8, ranks)
        found[device, local] = ranks
        if device == "cuda":
            assert micro_batch_images(model, on) == micro_batch_images(model, alone) > 1
        assert on.memory_bytes() == (80 << 30) // ranks
    assert list(found.values()) == [1, 8, 2]


def test_a_resumed_finetuning_equals_an_uninterrupted_one(tokens, checkpoints, tmp_path, monkeypatch):
    sets = ["finetune.steps=12", "finetune.batch_size=8", "finetune.val_every=4"]
    config = effective(FinetuneFile, sets=sets)
    whole = finetune.run(checkpoints["ar"], tokens, tmp_path / "a", config, device="cpu")
    stop_after(monkeypatch, 7)
    with pytest.raises(Interrupted, match="6 of 12"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "b", config, device="cpu")
    monkeypatch.undo()
    parts = finetune.run(checkpoints["ar"], tokens, tmp_path / "b", config, device="cpu", resume=True)
    assert parts["id"] == whole["id"] and parts["summary"]["weights"] == whole["summary"]["weights"]


def test_with_resume_and_overwrite_another_recipe_begins_anew(tokens, tmp_path):
    """What a Makefile needs: the same command goes on after an interrupt and starts again after a change."""
    with pytest.raises(Interrupted):
        pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", limits=Limits(time_limit_minutes=0))
    record = pretrain.run(tokens, tmp_path / "m", recipe("train.lr=0.1"), device="cpu", resume=True, overwrite=True)
    assert record["config"]["train"]["lr"] == 0.1 and read_log(tmp_path / "m" / "log.jsonl")[0]["step"] == 0


def test_a_kill_between_the_last_write_and_the_new_name_loses_nothing(tokens, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", val_fraction=0.1)
    monkeypatch.undo()
    monkeypatch.setattr(pretrain, "train", killed)  # it must not be needed again
    record = pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", val_fraction=0.1, resume=True)
    assert show.run(tmp_path / "m", verify=True)["id"] == record["id"]
    assert not (tmp_path / "m" / "recipe.json").exists() and not (tmp_path / "m" / "resume").exists()


def test_a_full_disk_while_saving_is_said(tokens, tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PixseqError, match=r"cannot write .*state.pt"):
        pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", limits=Limits(save_minutes=0))
    left = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: left)
    with pytest.raises(PixseqError, match=r"^the disk is full: .*state.pt could not be written$"):
        pretrain.run(tokens, tmp_path / "n", recipe(), device="cpu", limits=Limits(save_minutes=0))


def test_a_time_limit_stops_resumably(tokens, tmp_path):
    with pytest.raises(Interrupted, match="time limit") as stop:
        pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", limits=Limits(time_limit_minutes=0))
    assert "--resume" in stop.value.hint and stop.value.code == 130
    assert pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu", resume=True)["summary"]["steps"] == 12


def test_divergence_keeps_the_last_good_state(tokens, tmp_path, monkeypatch):
    real = pretrain.losses
    calls = iter(range(100))

    def poisoned(*args):
        return {key: value * (math.inf if next(calls) == 4 else 1) for key, value in real(*args).items()}

    monkeypatch.setattr(pretrain, "losses", poisoned)
    with pytest.raises(Diverged, match="step 4") as fault:
        pretrain.run(tokens, tmp_path / "m", recipe(), device="cpu")
    assert fault.value.code == 3 and not (tmp_path / "m").exists()
    state = torch.load(tmp_path / "m.partial" / "resume" / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(torch.isfinite(p).all() for p in state["model"].values())


def test_a_validation_that_is_not_finite_diverges(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "generative_loss", lambda *args: math.nan)
    with pytest.raises(Diverged, match="validated after 1 steps"):
        pretrain.run(tokens, tmp_path / "m", recipe(), val_fraction=0.1, device="cpu")
    assert not (tmp_path / "m").exists()


def test_colours_of_tokens_cannot_be_mixed(tokens, tmp_path):
    with pytest.raises(UsageError, match="needs pixels"):
        pretrain.run(tokens, tmp_path / "m", recipe("train.augment=resized-crop"), device="cpu")
    assert not list(tmp_path.iterdir())


def test_steps_to_keep_lie_in_the_run():
    assert kept_steps("every:5", 12) == {5, 10} and kept_steps("every:12", 12) == set()
    for keep in ("every:13", "every:0", "0", "13", "soon"):
        with pytest.raises(UsageError, match="names no steps"):
            kept_steps(keep, 12)


def test_the_best_weights_are_those_of_the_saved_state(tokens, tmp_path, monkeypatch):
    """A kill after a better validation, before the next save: the state goes on with the best that it knows."""
    config = recipe("train.val_every=1")

    def go(**given):
        return pretrain.run(tokens, tmp_path / "m", config, val_fraction=0.1, device="cpu", resume=True, **given)

    def best():
        return {p.name: p.read_bytes() for p in (tmp_path / "m.partial").glob("best-*")}

    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        go()
    monkeypatch.undo()
    before, real = best(), training.learning_rate
    assert len(before) == 1

    def killed(step, *args):
        if step == 7:
            raise KeyboardInterrupt
        return real(step, *args)

    monkeypatch.setattr(training, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.undo()
    after = best()
    assert len(after) == 2 and before.items() < after.items()
    assert go()["summary"]["best"]["step"] >= 7 and not list((tmp_path / "m").glob("best-*"))


@pytest.mark.parametrize("scheme", ["rgb", "gray"])
def test_other_schemes_train_evaluate_and_sample(tmp_path, scheme):
    t = write_tokens(tmp_path / "t.zarr", side=4, n_vocab=256, scheme=scheme)
    pretrain.run(t, tmp_path / "m", recipe("train.augment=flip"), val_fraction=0.2, device="cpu")
    numbers = evaluate.run(tmp_path / "m", t, device="cpu")
    bits = numbers["nats_per_token"] / math.log(2)
    if scheme == "rgb":
        assert numbers["bits_per_dim"] == bits and numbers["bits_per_pixel"] == 3 * bits
    else:
        assert numbers["bits_per_pixel"] == bits and "bits_per_dim" not in numbers
    sample.run(tmp_path / "m", tmp_path / "s.png", count=2, prompt=str(t), device="cpu")
    assert manifest.read(tmp_path / "s.png")["kind"] == "picture"


def test_muon_and_clipping_train_too(tokens, tmp_path):
    config = recipe("train.optimizer=muon", "train.clip_norm=0.5", "train.steps=30", "train.log_every=1")
    pretrain.run(tokens, tmp_path / "m", config, device="cpu")
    rows = read_log(tmp_path / "m" / "log.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_bf16_trains(tokens, tmp_path):
    record = pretrain.run(tokens, tmp_path / "m", recipe("train.steps=3"), device="cpu", precision="bf16")
    assert record["config"]["precision"] == "bf16"
    assert all(w.dtype == torch.float32 for w in open_checkpoint(tmp_path / "m").weights().values())


def test_evaluation_equals_the_loss_computed_by_hand(tokens, checkpoints):
    from pixseq.artifacts.arrays import open_store

    checkpoint = open_checkpoint(checkpoints["ar"])
    model = ImageGPT(IgptShape(**checkpoint.shape))
    model.load_state_dict(checkpoint.weights())
    x = torch.from_numpy(open_store(tokens, "tokens").read("tokens").astype(np.int64))
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), x.flatten()).item()
    numbers = evaluate.run(checkpoints["ar"], tokens, batch_size=17, device="cpu")
    assert abs(numbers["nats_per_token"] - want) < 1e-5 and "accuracy" not in numbers
    assert abs(numbers["bits_per_pixel"] - want / math.log(2)) < 1e-5


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_finetuning_learns_the_classes_and_keeps_the_best(tokens, checkpoints, tmp_path, objective):
    sets = ["finetune.steps=60", "finetune.batch_size=16", "finetune.lr=0.01", "finetune.val_every=10"]
    config = effective(FinetuneFile, sets=sets)
    record = finetune.run(checkpoints[objective], tokens, tmp_path / "m", config, val_fraction=0.25, device="cpu")
    assert record["summary"]["best"]["val_accuracy"] > 0.5
    numbers = evaluate.run(tmp_path / "m", tokens, device="cpu")
    assert numbers["accuracy"] > 0.5
    row = read_log(tmp_path / "m" / "log.jsonl")[0]
    assert abs(row["loss"] - row["clf_loss"] - row["gen_loss"]) < 1e-5 and abs(row["clf_loss"] - math.log(4)) < 1e-5


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_generative_loss_counts_as_much_as_is_asked_for(tokens, checkpoints, tmp_path, weight):
    sets = ["finetune.steps=2", "finetune.batch_size=8", f"finetune.gen_weight={weight}"]
    finetune.run(checkpoints["ar"], tokens, tmp_path / "m", effective(FinetuneFile, sets=sets), device="cpu")
    row = read_log(tmp_path / "m" / "log.jsonl")[0]
    assert ("gen_loss" in row) == (weight > 0)
    assert abs(row["loss"] - row["clf_loss"] - weight * row.get("gen_loss", 0)) < 1e-5


def test_finetuning_stops_early(tokens, checkpoints, tmp_path):
    sets = ["finetune.steps=500", "finetune.batch_size=8", "finetune.lr=1e-9", "finetune.val_every=1"]
    config = effective(FinetuneFile, sets=[*sets, "finetune.patience=3"])
    record = finetune.run(checkpoints["ar"], tokens, tmp_path / "m", config, device="cpu")
    assert record["summary"]["stopped_early"] and record["summary"]["steps"] < 20
    assert record["summary"]["best"]["step"] == record["summary"]["steps"] - 3


def test_finetuning_needs_labels(tmp_path, checkpoints):
    bare = write_tokens(tmp_path / "t.zarr", labels=False)
    with pytest.raises(PixseqError, match="has no labels"):
        finetune.run(checkpoints["ar"], bare, tmp_path / "m", effective(FinetuneFile), device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"palette_id": "sha256:two"}, "sha256:one.*sha256:two"),
        ({"class_names": list("abce")}, "a, b, c, d.*a, b, c, e"),
        ({"side": 4}, "6x6 pictures.*4x4"),
        ({"scheme": "gray", "n_vocab": 256}, "palette tokens.*gray tokens"),
    ],
)
def test_tokens_that_do_not_pair_are_refused(checkpoints, tokens, tmp_path, change, words):
    other = write_tokens(tmp_path / "t.zarr", **change)
    with pytest.raises(PixseqError, match=words):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", effective(FinetuneFile), val=other, device="cpu")
    if "class_names" not in change:  # which do not matter to a model without a classifier
        with pytest.raises(PixseqError, match=words):
            evaluate.run(checkpoints["ar"], other, device="cpu")


def test_wild_tokens_are_refused_before_the_embedding(tmp_path):
    wild = write_tokens(tmp_path / "t.zarr", n_vocab=16)
    group = json.loads((wild / "zarr.json").read_text())
    group["attributes"] |= {"n_vocab": 8, "palette": group["attributes"]["palette"][:8]}
    (wild / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(PixseqError, match="its vocabulary has 8"):
        pretrain.run(wild, tmp_path / "m", recipe(), device="cpu")


def test_damaged_checkpoints_are_told(checkpoints, tokens, tmp_path):
    shutil.copytree(checkpoints["ar"], tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(PixseqError, match="damaged"):
        evaluate.run(tmp_path / "m", tokens, device="cpu")
    with pytest.raises(PixseqError, match="damaged"):
        finetune.run(tmp_path / "m", tokens, tmp_path / "tuned", effective(FinetuneFile), device="cpu")
    assert not list(tmp_path.glob("tuned*"))
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    with pytest.raises(PixseqError, match=r"non-finite|does not match"):
        show.run(tmp_path / "m", verify=True)
    weights.write_bytes((checkpoints["ar"] / "model.safetensors").read_bytes())
    other = tmp_path / "m" / "best.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"\x00")
    with pytest.raises(PixseqError, match=r"best.safetensors"):
        show.run(tmp_path / "m", verify=True)
    with pytest.raises(PixseqError, match="has no weights 'ema'"):
        evaluate.run(checkpoints["ar"], tokens, weights="ema", device="cpu")


def test_kill_9_leaves_no_target_and_the_run_goes_on(tokens, tmp_path):
    sets = [x for pair in (("--set", s) for s in (*TINY, "train.steps=60", "train.val_every=5")) for x in pair]
    command = ["pretrain", tokens, "--val-fraction", "0.1", "--device", "cpu", "--precision", "fp32"]
    command += [*sets, "--save-minutes", "0", "--quiet", "--resume"]
    assert ended(forked(*command, "-o", tmp_path / "whole")) == 0
    wait, killed = random.Random(0), 0
    for longest in (0.0, 0.1, 0.3):  # the first is killed however fast the machine
        run = forked(*command, "-o", tmp_path / "m")
        until((tmp_path / "m.partial" / "resume").exists, run.is_alive)
        time.sleep(wait.uniform(0, longest))
        run.kill()
        if ended(run) == 0:
            break
        killed += 1
        assert not (tmp_path / "m").exists()
    assert killed
    if not (tmp_path / "m").exists():
        assert ended(forked(*command, "-o", tmp_path / "m")) == 0
    assert manifest.read(tmp_path / "m")["id"] == manifest.read(tmp_path / "whole")["id"]
    assert losses(tmp_path / "m" / "log.jsonl") == losses(tmp_path / "whole" / "log.jsonl")


def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "build", lambda shape: pytest.fail("it was built"))
    with pytest.raises(UsageError, match="parameters takes"):
        pretrain.run(tokens, tmp_path / "m", recipe("model.n_layer=1024", "model.d_model=131072"), device="cpu")
    assert not list(tmp_path.glob("m*"))
