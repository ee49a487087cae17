"""The README's parts on other programs' weights, run as they stand on random weights and drawn pictures."""

import re
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from bundle_writer import write_bundle
from hf_models import make_hf
from openai_graph import variables
from PIL import Image
from transformers import ImageGPTForCausalImageModeling

from pixseq.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def section(title):
    return re.search(rf"(?ms)^## {title}\n(.*?)(?=^## |\Z)", README)[1]


def blocks(title, language=""):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", section(title))


def commands(block):
    return [line.split("#")[0].split() for line in block.splitlines() if line.startswith("pixseq ")]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs one command line of the README in tmp_path and returns its stdout."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def one(words):
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{err}"
        return out

    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for i in range(count):
            path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = rng.integers(0, 100, (40, 40, 3)) + 100 * (i % 2)
            Image.fromarray(shade.astype(np.uint8)).save(path)


def test_the_published_weights_from_import_to_probe_and_completions(run, photos, tmp_path):
    make_hf(tmp_path / "imagegpt-small", ImageGPTForCausalImageModeling, n_layer=2, width=16, heads=4, side=32)
    hugging_face, *_ = blocks("Use the published weights")
    assert hugging_face.startswith("hf download openai/imagegpt-small --local-dir imagegpt-small")
    outputs = [run(words) for words in commands(hugging_face)]
    assert outputs[0] == "igpt-s\n" and "best layer" in outputs[-2] and "concatenated" in outputs[-2]
    with Image.open(tmp_path / "halves.png") as picture:
        assert picture.width > 6 * 32
    run(["pixseq", "check", "igpt-s", "test.zarr"])


def test_aim_learns_from_crops_of_whole_pictures(run, photos, tmp_path):
    evaluation = commands(blocks("Use the published weights")[2])[1]
    encode, pretrain = commands(next(block for block in blocks("AIM: patches instead of pixels") if "whole" in block))
    run(evaluation)
    run(encode)
    tiny = ["--steps", "1", "--batch-size", "2", "--set", "model.n_layer=1", "--set", "model.head_depth=0"]
    run([*pretrain, *tiny, "--device", "cpu", "--val-fraction", "0.2"])
    run(["pixseq", "evaluate", "aim-64", "whole.zarr", "--device", "cpu"])


def test_openais_files_from_import_to_evaluation(run, tmp_path):
    (tmp_path / "openai").mkdir()
    weights = variables(layers=2, heads=2, size=8, colours=512, context=1024)
    write_bundle(tmp_path / "openai" / "model.ckpt-1000000", weights)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "kmeans_centers.npy", rng.uniform(-1, 1, (512, 3)).astype(np.float32))
    np.save(tmp_path / "imagenet_teX.npy", rng.integers(0, 512, (4, 1024)))
    np.save(tmp_path / "imagenet_teY.npy", np.eye(1000, dtype=np.float32)[:4])
    out = [run(words) for words in commands(blocks("Use the published weights")[1])]
    assert re.search(r"nats_per_token\s+\d", out[-1])


def test_a_model_goes_to_transformers(run, tmp_path):
    make_hf(tmp_path / "hf", ImageGPTForCausalImageModeling, n_layer=2, width=16, heads=4, side=6)
    run(["pixseq", "import", "hf", "hf", "-o", "model"])
    for words in commands(blocks("Use your model in transformers")[0]):
        run(words)
    space = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers', of the processor's backend
        exec(blocks("Use your model in transformers", "python")[0], space)
    assert space["tokens"].shape == (4, 36)
