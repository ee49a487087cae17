"""Small artifacts that many tests need, made once."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on busy machines
if "PYTEST_XDIST_WORKER" in os.environ:  # which are as many as the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from pixseq.artifacts import owning
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter


@pytest.fixture(scope="session", autouse=True)
def float32():
    """Precision auto is fp32 in the tests' own process, also on a chip with bf16 units: figures are held to 1e-5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixseq.runtime._has_bf16_units", lambda device: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def unflushed():
    """Nothing that is written here is to outlast a failure of the power, which disks take long to promise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def write_tokens(
    path,
    count=96,
    side=6,
    n_vocab=16,
    seed=0,
    labels=True,
    scheme="palette",
    chunk_rows=32,
    tokens=None,
    images=None,
    **meta,
):
    """A tokens store of noisy copies of four patterns: something to learn, in a moment. `labels` may be given."""
    rng = np.random.default_rng(seed)
    channels = 3 if scheme == "rgb" else 1
    patterns = np.random.default_rng(0).integers(0, n_vocab, (4, side * side * channels))
    classes = rng.integers(0, 4, count)
    if isinstance(labels, np.ndarray):
        classes, labels = labels, True
    noise = rng.integers(0, n_vocab, (count, patterns.shape[1]))
    noisy = np.where(rng.random(noise.shape) < 0.1, noise, patterns[classes])
    tokens = (noisy if tokens is None else tokens).astype(np.uint16)
    specs = {"tokens": Spec("uint16", (None, tokens.shape[1]))}
    rows = {"tokens": tokens}
    if labels:
        specs["labels"] = Spec("int32", (None,))
        rows["labels"] = classes.astype(np.int32)
    if images is not None:
        specs["images"], rows["images"] = Spec("int32", (None,)), images.astype(np.int32)
    palette = np.random.default_rng(1).uniform(-1, 1, (n_vocab, 3)).tolist()
    content = {
        "scheme": scheme,
        "height": side,
        "width": side,
        "n_vocab": n_vocab,
        "class_names": list("abcd"),
        "palette": palette if scheme == "palette" else None,
        "palette_id": "sha256:one" if scheme == "palette" else None,
        **meta,
    }
    with owning.writing(path) as partial:
        writer = StoreWriter(partial, specs, {}, chunk_rows)
        writer.append(rows, {})
        writer.finish("tokens", "encode", {}, {}, {}, content)
    return path


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "t.zarr")


TINY = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=12", "train.batch_size=8")


@pytest.fixture(scope="session")
def checkpoints(tokens, tmp_path_factory):
    """{"ar": path, "bert": path}: tiny models trained for a moment on `tokens`."""
    from pixseq.config import PretrainFile, effective
    from pixseq.stages import pretrain

    folder = tmp_path_factory.mktemp("models")
    for objective in ("ar", "bert"):
        config = effective(PretrainFile, sets=[*TINY, f"model.objective={objective}"])
        pretrain.run(tokens, folder / objective, config, val_fraction=0.1, device="cpu")
    return {objective: folder / objective for objective in ("ar", "bert")}


def write_pixels(path, count=96, side=8, seed=0, labels=True, pixels=None, **meta):
    """A pixels store of noisy copies of four smooth pictures."""
    rng = np.random.default_rng(seed)
    coarse = np.random.default_rng(0).integers(40, 216, (4, 2, 2, 3))
    patterns = np.kron(coarse, np.ones((1, side // 2, side // 2, 1)))
    classes = rng.integers(0, 4, count)
    noisy = np.clip(patterns[classes] + rng.normal(0, 15, (count, side, side, 3)), 0, 255).astype(np.uint8)
    pixels = noisy if pixels is None else pixels
    specs = {"pixels": Spec("uint8", (None, side, side, 3))}
    rows = {"pixels": pixels}
    if labels:
        specs["labels"] = Spec("int32", (None,))
        rows["labels"] = classes.astype(np.int32)
    content = {"scheme": "pixels", "height": side, "width": side, "n_vocab": None, "palette": None, "palette_id": None}
    content |= {"class_names": list("abcd"), **meta}
    with owning.writing(path) as partial:
        writer = StoreWriter(partial, specs, {}, 32)
        writer.append(rows, {})
        writer.finish("pixels", "encode", {}, {}, {}, content)
    return path


@pytest.fixture(scope="session")
def pixels(tmp_path_factory):
    return write_pixels(tmp_path_factory.mktemp("pixels") / "x.zarr")


AIM = (
    "model.family=aim",
    "model.n_layer=2",
    "model.n_head=2",
    "model.d_model=16",
    "model.patch_size=2",
    "model.head_depth=1",
    "model.head_width=24",
    "train.steps=12",
    "train.batch_size=8",
)


@pytest.fixture(scope="session")
def aim(pixels, tmp_path_factory):
    """{"prefix": path, "causal": path}: tiny AIMs trained for a moment on `pixels`."""
    from pixseq.config import PretrainFile, effective
    from pixseq.stages import pretrain

    folder = tmp_path_factory.mktemp("aims")
    for attention in ("prefix", "causal"):
        config = effective(PretrainFile, sets=[*AIM, f"model.attention={attention}"])
        pretrain.run(pixels, folder / attention, config, val_fraction=0.1, device="cpu")
    return {attention: folder / attention for attention in ("prefix", "causal")}
