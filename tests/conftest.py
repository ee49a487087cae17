"""Small artifacts that many tests need, made once."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on busy machines

import numpy as np
import pytest

from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Spec, StoreWriter


def write_tokens(path, count=96, side=6, n_vocab=16, seed=0, labels=True, scheme="palette", chunk_rows=32, **meta):
    """A tokens store of noisy copies of four patterns: something to learn, in a moment."""
    rng = np.random.default_rng(seed)
    channels = 3 if scheme == "rgb" else 1
    patterns = np.random.default_rng(0).integers(0, n_vocab, (4, side * side * channels))
    classes = rng.integers(0, 4, count)
    noise = rng.integers(0, n_vocab, (count, patterns.shape[1]))
    tokens = np.where(rng.random(noise.shape) < 0.1, noise, patterns[classes]).astype(np.uint16)
    specs = {"tokens": Spec("uint16", (None, tokens.shape[1]))}
    rows = {"tokens": tokens}
    if labels:
        specs["labels"] = Spec("int32", (None,))
        rows["labels"] = classes.astype(np.int32)
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
    with atomic.writing(path) as partial:
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
