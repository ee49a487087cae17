"""features, sample and show on small artifacts: what they promise beyond what the numerics tests cover."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from conftest import TINY, write_tokens
from PIL import Image
from program import ended, forked, good, until
from reference import igpt_forward
from safetensors.torch import load_file, save_file

from pixseq import progress
from pixseq.artifacts import manifest
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.cli.output import to_json
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.cores import usable_cores
from pixseq.engine import image_store
from pixseq.errors import PixseqError, UsageError
from pixseq.models.objectives import random_mask
from pixseq.runtime import generator
from pixseq.stages import check, decode, evaluate, features, finetune, pretrain, sample
from pixseq.streams import Stream


def numpy_weights(path):
    return {name: tensor.numpy() for name, tensor in open_checkpoint(path).weights().items()}


def test_features_are_the_pooled_ln_1_outputs_of_every_layer(checkpoints, tokens, tmp_path):
    features.run(checkpoints["ar"], tokens, tmp_path / "f.zarr", batch_size=7, device="cpu", precision="fp32")
    store = open_store(tmp_path / "f.zarr", "features")
    found, x = store.read("features"), open_store(tokens, "tokens").read("tokens")
    assert found.shape == (3, 96, 16) and store.meta["layers"] == [0, 1, 2]
    for i in (0, 50, 95):
        _, want = igpt_forward(numpy_weights(checkpoints["ar"]), 2, 2, x[i], None)
        np.testing.assert_allclose(found[:, i], want, atol=1e-5)
    np.testing.assert_array_equal(store.labels(), open_store(tokens, "tokens").labels())
    assert store.manifest["inputs"].keys() == {"model", "tokens"}


def test_one_sweep_gives_the_features_and_the_loss_that_two_give(checkpoints, aim, tokens, pixels, tmp_path):
    for name, model, store in (("ar", checkpoints["ar"], tokens), ("causal", aim["causal"], pixels)):
        options = {"device": "cpu", "precision": "fp32", "batch_size": 7}
        alone = features.run(model, store, tmp_path / f"{name}.zarr", **options)
        both = features.run(model, store, tmp_path / f"{name}2.zarr", loss=tmp_path / f"{name}.json", **options)
        evaluate.run(model, store, tmp_path / f"{name}2.json", device="cpu")
        assert both["id"] == alone["id"]
        made, expected = (read_metrics(tmp_path / f"{name}{i}.json")[0] for i in ("", "2"))
        assert {**made, "made": None, "argv": None} == {**expected, "made": None, "argv": None}
    with pytest.raises(UsageError, match="pass of its own"):
        features.run(checkpoints["bert"], tokens, tmp_path / "b.zarr", loss=tmp_path / "b.json", device="cpu")


def test_bert_features_see_masked_inputs_in_consecutive_rows(checkpoints, tokens, tmp_path):
    features.run(checkpoints["bert"], tokens, tmp_path / "f.zarr", masks=3, device="cpu", precision="fp32")
    store = open_store(tmp_path / "f.zarr", "features")
    assert store.shape("features") == (3, 288, 16) and store.meta["masks"] == 3
    x = open_store(tokens, "tokens").read("tokens")
    masked = random_mask(3, 36, generator(0, 10, Stream.FEATURES_MASK))
    for j in range(3):
        _, want = igpt_forward(numpy_weights(checkpoints["bert"]), 2, 2, x[10], ~masked[j].numpy())
        np.testing.assert_allclose(store.read("features")[:, 30 + j], want, atol=1e-5)
    np.testing.assert_array_equal(store.labels()[30:33], open_store(tokens, "tokens").labels()[[10, 10, 10]])
    with pytest.raises(UsageError, match="sees an image once"):
        features.run(checkpoints["ar"], tokens, tmp_path / "g.zarr", masks=3, device="cpu")


def test_some_layers_half_precision_random_and_raw_pixels(checkpoints, tokens, tmp_path):
    features.run(checkpoints["ar"], tokens, tmp_path / "all.zarr", device="cpu")
    features.run(checkpoints["ar"], tokens, tmp_path / "some.zarr", layers="0,2", dtype="float16", device="cpu")
    whole, some = (open_store(tmp_path / f"{n}.zarr", "features") for n in ("all", "some"))
    assert some.dtype("features") == np.float16
    np.testing.assert_allclose(some.read("features"), whole.read("features")[[0, 2]], atol=2e-3)
    features.run(checkpoints["ar"], tokens, tmp_path / "random.zarr", random_init=0, device="cpu")
    assert manifest.read(tmp_path / "random.zarr")["id"] != whole.manifest["id"]
    features.run("pixels", tokens, tmp_path / "pixels.zarr", device="cpu")
    store = open_store(tokens, "tokens")
    colours = np.asarray(store.meta["palette"], np.float32)[store.read("tokens")].reshape(1, 96, -1)
    np.testing.assert_array_equal(open_store(tmp_path / "pixels.zarr", "features").read("features"), colours)
    for layers in ("3", "-1", "x"):
        with pytest.raises(UsageError, match="--layers"):
            features.run(checkpoints["ar"], tokens, tmp_path / "no.zarr", layers=layers, device="cpu")


def test_features_killed_at_any_moment_resume_to_the_same_id(checkpoints, tmp_path):
    many = write_tokens(tmp_path / "many.zarr", count=6000, chunk_rows=512)
    command = ["features", checkpoints["ar"], many, "--device", "cpu", "--quiet", "--batch-size", "64", "--resume"]
    assert ended(forked(*command, "-o", tmp_path / "whole.zarr")) == 0
    target, partial = tmp_path / "f.zarr", tmp_path / "f.zarr.partial"
    killed = 0
    for wait in (0.0, 0.1, 0.3):
        run = forked(*command, "-o", target)
        until(partial.exists, run.is_alive)
        time.sleep(wait)
        run.kill()
        if ended(run) == 0:
            break
        killed += 1
        assert not target.exists()
    assert killed
    if not target.exists():
        assert ended(forked(*command, "-o", target)) == 0
    assert manifest.read(target)["id"] == manifest.read(tmp_path / "whole.zarr")["id"]
    assert not partial.exists()


def test_a_batch_of_features_is_computed_while_the_one_before_is_written(checkpoints, tokens, tmp_path, monkeypatch):
    real, second, computed = features.activations, threading.Event(), []

    def watched(*args):
        compute = real(*args)
        return lambda images, first: (computed.append(first), first and second.set(), compute(images, first))[-1]

    def written(self, rows, state):
        assert second.wait(60)
        append(self, rows, state)

    append = features.StoreWriter.append
    monkeypatch.setattr(features, "activations", watched)
    monkeypatch.setattr(features.StoreWriter, "append", written)
    features.run(checkpoints["ar"], tokens, tmp_path / "f.zarr", batch_size=40, device="cpu")
    assert computed == [0, 0, 40, 80]  # one to see its shape
    monkeypatch.setattr(features.StoreWriter, "append", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        features.run(checkpoints["ar"], tokens, tmp_path / "g.zarr", batch_size=40, device="cpu")


def test_the_same_seed_draws_the_same_picture_in_any_batches(checkpoints, tmp_path):
    ids = []
    for name, batch in (("a", 64), ("b", 1), ("c", 5)):
        record = sample.run(
            checkpoints["ar"], tmp_path / f"{name}.png", count=9, seed=3, batch_size=batch, device="cpu"
        )
        ids.append(record["id"])
    assert ids[0] == ids[1] == ids[2]
    other = sample.run(checkpoints["ar"], tmp_path / "d.png", count=9, seed=4, device="cpu")
    assert other["id"] != ids[0]
    more = sample.run(
        checkpoints["ar"], tmp_path / "e.png", count=12, seed=3, tokens_out=tmp_path / "e.zarr", device="cpu"
    )
    assert more["config"]["seed"] == 3 and manifest.read(tmp_path / "e.png") == more
    assert open_store(tmp_path / "e.zarr", "tokens").shape("tokens") == (12, 36)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_completions_keep_the_prompt(checkpoints, tokens, tmp_path, keep):
    sample.run(
        checkpoints["ar"],
        tmp_path / "c.png",
        count=5,
        prompt=str(tokens),
        keep=keep,
        completions=3,
        tokens_out=tmp_path / "c.zarr",
        images_out=tmp_path / "c",
        device="cpu",
    )
    drawn = open_store(tmp_path / "c.zarr", "tokens").read("tokens")
    kept = round(keep * 6) * 6
    for part in range(3):
        given = open_store(tokens, "tokens").read("tokens")[:5, :kept]  # the store is shuffled
        np.testing.assert_array_equal(drawn[5 * part : 5 * part + 5, :kept], given)
    assert len(list((tmp_path / "c").iterdir())) == 15
    assert evaluate.run(checkpoints["ar"], tmp_path / "c.zarr", device="cpu")["images"] == 15


def test_pictures_serve_as_prompts(checkpoints, tmp_path):
    (tmp_path / "pics").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 80 * i, np.uint8)).save(tmp_path / "pics" / f"{i}.png")
    sample.run(checkpoints["ar"], tmp_path / "c.png", prompt=str(tmp_path / "pics"), device="cpu")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[1] > 3 * 6


def test_a_prompt_of_pictures_is_read_as_it_is_asked_to(checkpoints, tokens, tmp_path, capsys):
    """What the faults of a source tell to say can be said here too."""
    for i in range(3):
        shade = np.full((6, 6, 3), 40 * i, np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out = {"out": tmp_path / "c.png", "count": 9, "prompt": str(tmp_path), "device": "cpu", "overwrite": True}
    with pytest.raises(PixseqError) as caught:
        sample.run(checkpoints["ar"], **out)
    assert "--on-error skip" in caught.value.hint
    progress.enable()
    try:
        record = sample.run(checkpoints["ar"], **out, on_error="skip")
    finally:
        progress.enable(False)
    assert record["summary"]["pictures"] == 3 and record["config"]["on_error"] == "skip"
    assert "skipped" in capsys.readouterr().err
    with pytest.raises(PixseqError, match="6 x 6 pixels"):
        sample.run(checkpoints["ar"], **out, on_error="fail", max_pixels=35)
    with pytest.raises(UsageError, match="no columns"):
        sample.run(checkpoints["ar"], **out, label_column="label")
    for prompt in (str(tokens), None):
        with pytest.raises(UsageError, match="--on-error is of a --prompt SOURCE"):
            sample.run(checkpoints["ar"], **{**out, "prompt": prompt}, on_error="skip")


def test_prompts_come_from_stdin_too(checkpoints, tmp_path, monkeypatch):
    Image.fromarray(np.full((9, 12, 3), 80, np.uint8)).save(tmp_path / "p.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{tmp_path / 'p.png'}\n".encode())))
    sample.run(checkpoints["ar"], tmp_path / "c.png", prompt="-", device="cpu")
    assert (tmp_path / "c.png").is_file()


def test_an_empty_test_split_is_told_instead_of_drawing_train(checkpoints, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "pics" / split).mkdir(parents=True)
    Image.fromarray(np.full((9, 12, 3), 80, np.uint8)).save(tmp_path / "pics" / "train" / "p.png")
    with pytest.raises(PixseqError, match="holds no pictures"):
        sample.run(checkpoints["ar"], tmp_path / "c.png", prompt=str(tmp_path / "pics"), device="cpu")


def test_the_seed_of_masks_is_kept_whatever_their_number(checkpoints, tokens, tmp_path):
    seeds = {}
    for name, masks in (("ar", None), ("bert", 1), ("bert", 2)):
        out = tmp_path / f"{name}{masks}.zarr"
        seeds[name, masks] = features.run(checkpoints[name], tokens, out, masks=masks, seed=7, device="cpu")
    assert [record["config"]["seed"] for record in seeds.values()] == [None, 7, 7]
    evaluate.run(checkpoints["bert"], tokens, tmp_path / "e.json", device="cpu")
    assert manifest.read(tmp_path / "e.json")["config"]["masks"] == 5


def test_raw_pixels_are_swept_in_small_buffers():
    for side in (8, 224):
        batch = features._pixel_batch(SimpleNamespace(codec=Codec("pixels", side, side, None)))
        assert batch * side * side * 12 <= features.BUFFER_BYTES


def test_a_chunk_of_features_is_small_enough_to_be_read_however_large_a_batch(
    checkpoints, tokens, tmp_path, monkeypatch
):
    """A card takes more pictures at once than there is memory for in who reads them."""
    monkeypatch.setattr(features, "MOST_BYTES", 1 << 12)
    made = [
        features.run(checkpoints["ar"], tokens, tmp_path / f"{n}.zarr", pool="none", device="cpu", batch_size=n)
        for n in (40, 41)
    ]
    store = open_store(tmp_path / "40.zarr", "features")
    image = math.prod(store.shape("features")) // len(store) * store.dtype("features").itemsize
    assert store.arrays["features"].chunks[1] == max((1 << 12) // image, 1) and made[0]["id"] == made[1]["id"]


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_are_pictured_too(checkpoints, tmp_path, count):
    few = write_tokens(tmp_path / "t.zarr", count=count)
    evaluate.run(checkpoints["ar"], few, device="cpu", pictures=tmp_path / "p.png")
    assert manifest.read(tmp_path / "p.png")["summary"]["pictures"] == count


def test_targets_that_would_hide_each_other_are_refused_before_any_work(checkpoints, tokens, tmp_path):
    model, a = checkpoints["ar"], tmp_path / "a.png"
    with pytest.raises(UsageError, match=r"not a .json"):
        evaluate.run(model, tokens, device="cpu", by_position=a)
    for options in ({"pictures": a, "by_position": tmp_path / "a.json"}, {"out": a, "pictures": a}):
        with pytest.raises(UsageError, match="target twice"):
            evaluate.run(model, tokens, device="cpu", **options)
    with pytest.raises(UsageError, match="target twice"):
        sample.run(model, a, tokens_out=tmp_path / "." / "a.png", device="cpu")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sampled_is_told(checkpoints, tokens, tmp_path):
    with pytest.raises(PixseqError, match="bert model"):
        sample.run(checkpoints["bert"], tmp_path / "x.png", device="cpu")
    with pytest.raises(PixseqError, match="of kind tokens"):
        sample.run(tokens, tmp_path / "x.png", device="cpu")
    bad = {"keep": 1.5, "count": 0, "temperature": -1.0, "top_p": 0.0, "top_k": -1, "completions": 0}
    for name, value in bad.items():  # and the flag at fault alone is named
        with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} is {value}, it must [^-]*$"):
            sample.run(checkpoints["ar"], tmp_path / "x.png", device="cpu", **{name: value})
    with pytest.raises(UsageError, match="given without --prompt"):
        sample.run(checkpoints["ar"], tmp_path / "x.png", device="cpu", completions=2)
    for name in ("count", "columns", "scale"):
        with pytest.raises(UsageError, match=f"^--{name} is 0, it must [^-]*$"):
            decode.run(tokens, tmp_path / "x.png", **{name: 0})
    other = write_tokens(tmp_path / "t.zarr", palette_id="sha256:two")
    with pytest.raises(PixseqError, match=r"sha256:one.*sha256:two"):
        sample.run(checkpoints["ar"], tmp_path / "x.png", prompt=str(other), device="cpu")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("keep", [0.92, 0.99])
def test_a_prompt_kept_whole_leaves_nothing_to_draw_and_is_refused(checkpoints, tokens, tmp_path, keep):
    """Of six rows, 0.91 is five and a half."""
    with pytest.raises(UsageError, match=f"--keep {keep} keeps all of 6 rows") as fault:
        sample.run(checkpoints["ar"], tmp_path / "x.png", prompt=str(tokens), keep=keep, count=2, device="cpu")
    most = float(fault.value.hint.split(" at most ")[1].split()[0])
    sample.run(checkpoints["ar"], tmp_path / "x.png", prompt=str(tokens), keep=most, count=2, device="cpu")


def test_a_loss_that_is_no_number_is_an_error_of_the_model(checkpoints, tokens, tmp_path, monkeypatch):
    """JSON has no word for it, neither on stdout nor in a file."""
    model = shutil.copytree(checkpoints["ar"], tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "wpe": weights["wpe"] * torch.nan}, model / "model.safetensors")
    with pytest.raises(PixseqError, match=r"the loss of .* is nan, no number") as fault:
        evaluate.run(model, tokens, tmp_path / "e.json", device="cpu")
    assert "pixseq check" in fault.value.hint and not (tmp_path / "e.json").exists()
    with pytest.raises(PixseqError, match="the numbers are not all finite"):
        write_metrics(tmp_path / "n.json", "evaluate", {}, {}, {"loss": float("nan")})
    assert not list(tmp_path.glob("n.json*"))
    with pytest.raises(PixseqError, match="not finite, which JSON cannot say"):
        to_json({"layers": [{"loss": float("inf")}]})


def test_logits_that_are_no_numbers_make_no_picture_nor_features(checkpoints, tokens, tmp_path):
    model = shutil.copytree(checkpoints["ar"], tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    for wild, words in ((2e38, "gives logits that are not finite"), (torch.nan, "weights that are not finite")):
        large = {name: torch.full_like(weights[name], wild) for name in ("wte", "wpe")}
        save_file({**weights, **large}, model / "model.safetensors")
        with pytest.raises(PixseqError, match=words):
            sample.run(model, tmp_path / "x.png", count=2, device="cpu")
    with pytest.raises(PixseqError, match=words):
        features.run(model, tokens, tmp_path / "f.zarr", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_accuracy_on_images_without_labels_is_not_made_up(checkpoints, tokens, tmp_path):
    sets = ["finetune.steps=2", "finetune.batch_size=8"]
    finetune.run(checkpoints["ar"], tokens, tmp_path / "m", effective(FinetuneFile, sets=sets), device="cpu")
    store = shutil.copytree(tokens, tmp_path / "t.zarr")
    labels = zarr.open_group(store, mode="r+")["labels"]
    labels[:5] = -1
    with pytest.raises(PixseqError, match="5 of 96 images have no label"):
        evaluate.run(tmp_path / "m", store, device="cpu")
    with pytest.raises(PixseqError, match="images to fine-tune or validate on have no label"):
        finetune.run(checkpoints["ar"], store, tmp_path / "n", effective(FinetuneFile), device="cpu")


def test_class_scores_that_are_no_numbers_are_no_accuracy(checkpoints, tokens, tmp_path):
    sets = ["finetune.steps=2", "finetune.batch_size=8"]
    finetune.run(checkpoints["ar"], tokens, tmp_path / "m", effective(FinetuneFile, sets=sets), device="cpu")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["classifier.weight"][1] = torch.nan
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(PixseqError, match=r"class scores of .*m for 96 images .* are not finite"):
        evaluate.run(tmp_path / "m", tokens, device="cpu")


def test_bert_evaluation_votes_over_masks_whatever_the_batch(checkpoints, tokens, tmp_path):
    from pixseq.config import FinetuneFile, effective
    from pixseq.models.igpt import IgptShape, ImageGPT
    from pixseq.stages import finetune

    sets = ["finetune.steps=10", "finetune.batch_size=8", "finetune.lr=0.01"]
    finetune.run(checkpoints["bert"], tokens, tmp_path / "m", effective(FinetuneFile, sets=sets), device="cpu")
    small, large = (evaluate.run(tmp_path / "m", tokens, batch_size=b, device="cpu") for b in (7, 96))
    assert small["accuracy"] == large["accuracy"]
    assert abs(small["nats_per_token"] - large["nats_per_token"]) < 1e-5
    checkpoint = open_checkpoint(tmp_path / "m")
    model = ImageGPT(IgptShape(**checkpoint.shape))
    model.load_state_dict(checkpoint.weights())
    store, hits = open_store(tokens, "tokens"), 0
    for i, (x, label) in enumerate(zip(store.read("tokens"), store.labels())):
        votes = np.random.default_rng([0, i, Stream.EVALUATION_TIE]).random(4)
        for mask in range(5):
            masked = random_mask(1, 36, generator(0, i, mask, Stream.EVALUATION_MASK))
            with torch.no_grad():
                votes[model(torch.from_numpy(x[None].astype(np.int64)), masked).class_logits[0].argmax()] += 1
        hits += votes.argmax() == label
    assert large["accuracy"] == hits / 96


def test_published_figures_are_float32_and_every_result_says_what_was_used(checkpoints, tokens, tmp_path, monkeypatch):
    """evaluate and check compute in float32 also where auto would be bf16; bf16 has to be asked for."""
    monkeypatch.setattr("pixseq.runtime._has_bf16_units", lambda device: True)
    ar, exact = checkpoints["ar"], {"precision": "fp32", "device": "cpu"}
    for stage in (evaluate, check):
        found = stage.run(ar, tokens, tmp_path / f"{stage.__name__}.json", device="cpu")
        assert found.items() >= exact.items()
        record, numbers = read_metrics(tmp_path / f"{stage.__name__}.json")
        assert numbers == found and record["config"].items() >= exact.items()
        quick = stage.run(ar, tokens, device="cpu", precision="bf16")
        assert quick.items() >= {"precision": "bf16", "device": "cpu"}.items()
    reference = evaluate.run(ar, tokens, device="cpu")["nats_per_token"]
    assert 0 < abs(evaluate.run(ar, tokens, device="cpu", precision="bf16")["nats_per_token"] - reference) < 0.1
    record = features.run(ar, tokens, tmp_path / "f.zarr", layers="2", device="cpu")
    assert record["config"]["precision"] == "bf16" and record["summary"]["device"] == "cpu"
    record = sample.run(ar, tmp_path / "x.png", count=1, device="cpu", precision="fp32")
    assert record["config"].items() >= exact.items()
    record = pretrain.run(tokens, tmp_path / "m", effective(PretrainFile, sets=[*TINY, "train.steps=1"]), device="cpu")
    assert record["config"]["precision"] == "bf16" and record["summary"]["device"] == "cpu"


def test_systems_without_linux_calls_are_served_too(tokens, monkeypatch):
    """macOS tells no affinity and allocates no file ahead."""
    for name in ("sched_getaffinity", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    assert usable_cores() == os.cpu_count()
    store = open_store(tokens, "tokens")
    monkeypatch.setattr(image_store, "host_memory_bytes", lambda: 0)  # so that images are mapped from a file
    images = image_store.read_all(store)
    assert isinstance(images, np.memmap) and np.array_equal(images, store.read("tokens"))


def test_a_signal_is_not_taken_for_damage(checkpoints, tokens, monkeypatch):
    from pixseq.errors import Stop

    def stopped(*args):
        raise Stop("SIGINT")

    monkeypatch.setattr(zarr.Array, "__getitem__", stopped)
    with pytest.raises(Stop):
        evaluate.run(checkpoints["ar"], tokens, device="cpu")


def test_decode_names_single_pictures_by_their_rows(tokens, tmp_path):
    decode.run(tokens, tmp_path / "g.png", count=3, first=4, images_dir=tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["000004.png", "000005.png", "000006.png"]
    decode.run(tokens, tmp_path / "g.png", count=3, seed=0, images_dir=tmp_path / "d", overwrite=True)
    assert len(list((tmp_path / "d").iterdir())) == 3


def test_raw_pixels_refuse_options_of_models(tokens, tmp_path):
    with pytest.raises(UsageError, match="raw pixels"):
        features.run("pixels", tokens, tmp_path / "f.zarr", layers="0", device="cpu")


def test_damaged_tokens_stop_every_stage(checkpoints, tokens, tmp_path):
    path = tmp_path / "t.zarr"
    shutil.copytree(tokens, path)
    (path / "tokens" / "c" / "1" / "0").unlink()
    for stage in (features, evaluate):
        with pytest.raises(PixseqError, match="lacks 1 chunk"):
            stage.run(checkpoints["ar"], path, tmp_path / "out", device="cpu")
    assert not list(tmp_path.glob("out*"))
    group = zarr.open_group(tokens, mode="r")
    assert group["tokens"].fill_value == 65535


HALF = """
import os, signal
from pixseq.cli import main
from pixseq.engine import training
accumulate, calls = training.accumulate, []
def killed(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return accumulate(*args, **kwargs)
training.accumulate = killed
main()
"""


def test_two_processes_train_what_one_trains_also_where_one_is_killed_between(tokens, tmp_path):
    """torchrun with two ranks: the same images in the same order, gradients summed over ranks. The rank that is left
    tells what befell it and leaves what both go on from; one of them publishes.
    """
    sets = ["model.n_layer=1", "model.n_head=2", "model.d_model=16", "train.steps=6", "train.batch_size=8"]
    sets += ["train.log_every=1"]
    tail = ["pretrain", tokens, "--val-fraction", "0.1", "--device", "cpu", "--precision", "fp32", "--quiet"]
    tail += [word for s in sets for word in ("--set", s)]
    good(*tail, "-o", tmp_path / "one")
    (tmp_path / "half.py").write_text(HALF)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tail += ["-o", tmp_path / "two"]
    half = subprocess.run(
        [*two, tmp_path / "half.py", *tail, "--save-minutes", "0.0001"], capture_output=True, text=True
    )
    told = ("another process of this run has ended", "stopped by SIGTERM")  # by torchrun, which may have seen it first
    assert half.returncode == 1 and any(words in half.stderr for words in told), half.stderr
    assert "this is a bug" not in half.stderr
    assert not (tmp_path / "two").exists() and (tmp_path / "two.partial" / "resume" / "state.pt").exists()
    run = subprocess.run([*two, "-m", "pixseq", *tail, "--resume"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "two") and not (tmp_path / "two.partial").exists()
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        for key in {"loss", "val_loss"} & a.keys():
            assert abs(a[key] - b[key]) < 1e-4
    a, b = (open_checkpoint(tmp_path / n).weights() for n in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
