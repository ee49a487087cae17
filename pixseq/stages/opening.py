"""Opening what the model stages share: tokens, a model on its machine, and the check that they belong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq.artifacts.arrays import Store, open_store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.errors import PixseqError
from pixseq.models.igpt import ImageGPT, Shape
from pixseq.runtime import Machine


def open_tokens(path: str | Path) -> Store:
    """A tokens store with at least one image."""
    store = open_store(path, "tokens")
    if not store.shape("tokens")[0]:
        raise PixseqError(f"{path} holds no images", "encode a source with images")
    return store


def read_tokens(store: Store) -> np.ndarray:
    """All tokens, uint16 [N, T], checked against the vocabulary: a wild token would index outside the embedding."""
    tokens = store.read("tokens")
    highest, n_vocab = int(tokens.max()), store.meta["n_vocab"]
    if highest >= n_vocab:
        raise PixseqError(
            f"{store.path} holds token {highest}, its vocabulary has {n_vocab}", "the store is damaged: encode again"
        )
    return tokens


def token_batches(store: Store, batch: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first image, tokens [<= batch, T]) from `start` on, reading a chunk or more at once."""
    n = store.shape("tokens")[0]
    block = -(-1024 // batch) * batch
    for first in range(start, n, block):
        tokens = store.read("tokens", slice(first, min(first + block, n)))
        for i in range(0, len(tokens), batch):
            yield first + i, tokens[i : i + batch]


def grid(codec: dict[str, Any]) -> tuple[int, int, int]:
    """Rows, columns and tokens a pixel of one image."""
    return codec["height"], codec["width"], 3 if codec["scheme"] == "rgb" else 1


def open_model(path: str | Path, machine: Machine, weights: str = "model") -> tuple[ImageGPT, Checkpoint]:
    """The model in evaluation mode on the machine's device."""
    checkpoint = open_checkpoint(path)
    shape = Shape(**checkpoint.shape)
    return load_weights(shape, checkpoint, weights).to(machine.device).eval(), checkpoint


def load_weights(shape: Shape, checkpoint: Checkpoint, weights: str = "model") -> ImageGPT:
    """A model of `shape` filled from the checkpoint. Raises PixseqError if the tensors are not those of its shape."""
    with torch.device("meta"):
        model = ImageGPT(shape)
    tensors = checkpoint.weights(weights)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))[0]
        raise PixseqError(
            f"{checkpoint.path}: tensor {odd} is {found.get(odd, 'missing')}, expected {wanted.get(odd, 'none')}",
            "the checkpoint is damaged: copy it again",
        )
    model.load_state_dict(tensors, assign=True)
    return model


def check_pairing(model: Checkpoint, tokens: Store) -> None:
    """A model reads only tokens of its own palette, scheme and size. Raises PixseqError naming both sides."""
    ours, theirs = model.codec, tokens.meta
    if ours["scheme"] != theirs["scheme"]:
        raise PixseqError(
            f"{model.path} was trained on {ours['scheme']} tokens, {tokens.path} holds {theirs['scheme']} tokens",
            f"encode with --scheme {ours['scheme']}",
        )
    if ours.get("palette_id") != theirs.get("palette_id"):
        raise PixseqError(
            f"{model.path} was trained with palette {ours.get('palette_id')}, "
            f"{tokens.path} was encoded with palette {theirs.get('palette_id')}",
            "encode the pictures with the model's palette",
        )
    if (ours["height"], ours["width"]) != (theirs["height"], theirs["width"]):
        raise PixseqError(
            f"{model.path} reads {ours['height']}x{ours['width']} pictures, "
            f"{tokens.path} holds {theirs['height']}x{theirs['width']}",
            f"encode with --size {ours['height']}",
        )
