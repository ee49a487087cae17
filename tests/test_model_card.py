"""The model card says only what is true of the weights exported, and stays valid whatever the names are."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import write_tokens
from hf_models import make_hf
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import ImageGPTForCausalImageModeling, ImageGPTModel

from pixseq.artifacts.palette import palette_id
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.errors import PixseqError
from pixseq.stages import evaluate, exporting, finetune, importing, pretrain

TINY = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=40", "train.batch_size=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{"tokens", "ar", "clf"}: a model and its fine-tuned child.

    The model's steps grow until they are so large that its last weights are not its best, by far: on any machine.
    """
    folder = tmp_path_factory.mktemp("card")
    colors = np.random.default_rng(1).uniform(-1, 1, (16, 3))  # those of write_tokens
    tokens = write_tokens(folder / "t.zarr", palette_id=palette_id(colors))
    sets = [
        *TINY,
        "train.ema=0.9",
        "train.lr=2.0",
        "train.schedule=constant",
        "train.warmup_fraction=0.9",
        "train.val_every=3",
    ]
    pretrain.run(tokens, folder / "ar", effective(PretrainFile, sets=sets), val_fraction=0.1, device="cpu")
    config = effective(FinetuneFile, sets=["finetune.steps=4", "finetune.batch_size=8"])
    finetune.run(folder / "ar", tokens, folder / "clf", config, val_fraction=0.1, device="cpu")
    return {"tokens": tokens, "ar": folder / "ar", "clf": folder / "clf"}


def exported(model, folder, **options):
    """(the header, the text below it)"""
    exporting.run(model, folder, **options)
    header, body = re.fullmatch(r"(?s)---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text()).groups()
    return yaml.safe_load(header), body


def rows(body):
    """{metric: value} of the table."""
    return dict(re.findall(r"(?m)^\| .* \| (\w+) \| ([\d.e+-]*\d) \|$", body))


def manifest(model):
    return json.loads((model / "manifest.json").read_text())


def parameters(folder):
    tensors = load_file(folder / "model.safetensors")
    return sum(x.numel() for name, x in tensors.items() if not name.endswith("bias"))


def test_each_set_of_weights_has_its_own_numbers(made, tmp_path):
    summary = manifest(made["ar"])["summary"]
    assert len(set(summary["weights"].values())) == 3 and summary["best"]["step"] < 40
    for name, metric in (("model", "val_loss"), ("best", "val_loss"), ("ema", "ema_val_loss")):
        header, body = exported(made["ar"], tmp_path / name, weights=name)
        assert rows(body) == {metric: f"{summary['best'][metric]:.6g}"} and "model-index" not in header
        assert f"best at step {summary['best']['step']}" in body
        assert (name == "model") == ("its weights" not in body)
        assert name == "model" or f"`{name}` of id `{summary['weights'][name]}`" in body


def test_every_file_of_an_export_follows_the_umask(made, tmp_path):
    before = os.umask(0o027)
    try:
        exporting.run(made["ar"], tmp_path / "x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o640}


def test_numbers_of_other_weights_are_refused(made, tmp_path):
    for name in ("model", "ema"):
        evaluate.run(made["ar"], made["tokens"], tmp_path / f"{name}.json", weights=name, device="cpu")
    header, _ = exported(made["ar"], tmp_path / "x", weights="ema", metrics=[tmp_path / "ema.json"])
    assert header["model-index"][0]["results"][0]["metrics"][0]["type"] == "nats_per_token"
    with pytest.raises(PixseqError, match="measured on the weights 'ema', and 'model' are exported"):
        exporting.run(made["ar"], tmp_path / "y", metrics=[tmp_path / "ema.json"])
    with pytest.raises(PixseqError, match="measured on the weights 'model', and 'ema' are exported"):
        exporting.run(made["ar"], tmp_path / "y", weights="ema", metrics=[tmp_path / "model.json"])
    assert not (tmp_path / "y").exists()


def test_a_head_that_was_dropped_leaves_nothing_behind(made, tmp_path):
    numbers = tmp_path / "e.json"
    evaluate.run(made["clf"], made["tokens"], numbers, device="cpu")
    header, body = exported(made["clf"], tmp_path / "generative", drop="classifier", metrics=[numbers])
    assert header["pipeline_tag"] == "unconditional-image-generation" and "without the classifier" in body
    assert rows(body).keys() == {"nats_per_token", "bits_per_pixel"}
    assert f"{parameters(tmp_path / 'generative'):,} parameters" in body
    header, body = exported(made["clf"], tmp_path / "classifier", drop="head", metrics=[numbers])
    assert header["pipeline_tag"] == "image-classification" and "without the prediction head" in body
    assert rows(body).keys() == {"val_accuracy", "accuracy"}
    assert f"{parameters(tmp_path / 'classifier'):,} parameters" in body


def test_of_imported_weights_no_training_is_claimed(tmp_path):
    for kind, task in (
        (ImageGPTForCausalImageModeling, "unconditional-image-generation"),
        (ImageGPTModel, "image-feature-extraction"),
    ):
        name = kind.__name__
        make_hf(tmp_path / name, kind, n_layer=1, width=16, heads=2, side=4)
        importing.run("hf", tmp_path / name, tmp_path / f"{name}-m")
        header, body = exported(tmp_path / f"{name}-m", tmp_path / f"{name}-x")
        assert header["pipeline_tag"] == task and "is not recorded here" in body
        assert "steps" not in body and "None were measured" in body


NAMES = ('a "b"', "it's: #1 - {x} \\n", "ünï 模型", "a\nb", "a\x1b[31m", "---", "- x", "a|b`c", "null", "1e5")


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"a\xff")], ids=ascii)
def test_any_name_makes_a_valid_card(made, tmp_path, monkeypatch, name):
    numbers = tmp_path / "e.json"
    shutil.copytree(made["tokens"], tmp_path / name)
    evaluate.run(made["ar"], tmp_path / name, numbers, device="cpu")
    (tmp_path / "out").mkdir()
    exported(made["ar"], tmp_path / "out" / name, metrics=[numbers])
    card = ModelCard((tmp_path / "out" / name / "README.md").read_text(encoding="utf-8"))
    assert {result.metric_type for result in card.data.eval_results} == {"nats_per_token", "bits_per_pixel"}
    if name.isprintable():
        assert card.data.model_name == name == card.data.eval_results[0].dataset_name
    lines = card.text.splitlines()
    assert next(line for line in lines if line.startswith("# ")).isprintable()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines if line.startswith("|"))
    (code,) = re.findall(r"(?s)```python\n(.*?)```", card.text)
    monkeypatch.chdir(tmp_path / "out")
    if name.isascii() or name.isprintable():  # safetensors opens no others
        space = {}
        exec(compile(code.split("# pictures")[0], "card", "exec"), space)
        assert space["model"].config.bos_token_id == 16
