"""The guides beside the pipelines, run as they stand: their `sh` blocks, and those on other programs' weights."""

import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
from bundle_writer import write_bundle
from hf_models import make_hf
from openai_graph import variables
from PIL import Image
from program import good
from transformers import ImageGPTForCausalImageModeling

PIPELINES = Path(__file__).parent.parent / "pipelines"
GUIDES = sorted(path.parent.name for path in PIPELINES.glob("*/Makefile") if "guide.mk" in path.read_text())
# Steps and epochs are cut: what a block shows is that its commands follow from each other.
SHORT = [(r"--steps \d+", "--steps 2 --batch-size 4"), (r"steps=\d+", "steps=2"), (r"--epochs \d+", "--epochs 1")]
SHORT += [(r"--steps 2 (--batch-size 4 --resume)", r"--steps 3 \1")]  # for more steps than before
SHORT += [(r"--keep every:\d+", "--keep every:1"), (r"--jobs 2", "--jobs 1"), (r"--trials 5", "--trials 1")]


def blocks(guide, language=""):
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```\n", (PIPELINES / guide / "README.md").read_text())
    return [text for name, text in found if name == language]


def commands(block):
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("pixseq ")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs one command line of a guide in tmp_path and returns its stdout."""
    monkeypatch.chdir(tmp_path)
    return lambda words: good(*words[1:])


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for i in range(count):
            path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = rng.integers(0, 100, (40, 40, 3)) + 100 * (i % 2)
            Image.fromarray(shade.astype(np.uint8)).save(path)


@pytest.mark.parametrize("guide", ["sources", "training", "probes", "aim", "transformers", "bench"])
def test_a_guide_runs_as_it_is_read(guide, run, photos, tmp_path):
    """All that is a command of ours alone; what a shell adds (a stopped run, a second process) is for make."""
    text = "\n".join(blocks(guide, "sh"))
    for pattern, short in SHORT:
        text = re.sub(pattern, short, text)
    found = [words for words in commands(text) if "||" not in words and "stopped" not in words]
    assert len(found) >= 5
    for words in found:
        run(words)
    if guide == "transformers":
        space = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers', of the processor's backend
            exec(blocks(guide, "python")[0], space)
        assert space["tokens"].shape == (4, 64)


def test_every_guide_has_a_makefile_that_runs_its_blocks():
    assert GUIDES == [
        "aim",
        "bench",
        "machines",
        "probes",
        "published-weights",
        "scaling",
        "sources",
        "training",
        "transformers",
    ]
    for guide in GUIDES:
        assert blocks(guide, "sh"), guide


def test_the_study_of_the_guide_can_be_planned(run, photos, tmp_path):
    (tmp_path / "grid.yaml").write_text((PIPELINES / "scaling" / "grid.yaml").read_text())
    found = commands("\n".join(blocks("scaling", "sh")))
    plan = next(i for i, words in enumerate(found) if "plan" in words)
    for words in found[:plan]:
        run(words)
    assert "r8-b0-s0" in run([*found[plan], "--no-calibrate"])


def test_the_published_weights_from_import_to_probe_and_completions(run, photos, tmp_path):
    make_hf(tmp_path / "imagegpt-small", ImageGPTForCausalImageModeling, n_layer=2, width=16, heads=4, side=32)
    (hugging_face,) = blocks("published-weights", "sh")
    assert hugging_face.startswith("hf download openai/imagegpt-small --local-dir imagegpt-small")
    outputs = [run(words) for words in commands(hugging_face)]
    assert outputs[0] == "igpt-s" and "best layer" in outputs[-2] and "concatenated" in outputs[-2]
    with Image.open(tmp_path / "halves.png") as picture:
        assert picture.width > 6 * 32
    run(["pixseq", "check", "igpt-s", "test.zarr"])


def test_aim_learns_from_crops_of_whole_pictures(run, photos, tmp_path):
    evaluation = commands(blocks("published-weights")[1])[1]
    encode, pretrain = commands(blocks("aim")[0])
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
    out = [run(words) for words in commands(blocks("published-weights")[0])]
    assert re.search(r"nats_per_token\s+\d", out[-1])
