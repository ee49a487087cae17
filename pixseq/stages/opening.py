"""Opening what the model stages read: tokens, images to train on, a model, and the check that they belong together."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq.artifacts.arrays import Store, open_store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.manifest import reference
from pixseq.data.batches import split_validation
from pixseq.errors import PixseqError, UsageError
from pixseq.models.igpt import ImageGPT, Shape
from pixseq.runtime import Machine, host_memory_bytes
from pixseq.stages.training import Images


def open_tokens(path: str | Path) -> Store:
    """A tokens store with at least one image."""
    store = open_store(path, "tokens")
    if not store.shape("tokens")[0]:
        raise PixseqError(f"{path} holds no images", "encode a source with images")
    return store


def read_tokens(store: Store) -> np.ndarray:
    """All tokens, uint16 [N, T]: in memory, or mapped from an unnamed file beside the store if they are too many."""
    shape = store.shape("tokens")
    if 2 * math.prod(shape) <= host_memory_bytes() / 4:
        tokens = np.empty(shape, np.uint16)
    else:
        with tempfile.TemporaryFile(dir=store.path.parent) as file:
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))  # a full disk now, not a SIGBUS later
            tokens = np.memmap(file, np.uint16, "w+", shape=shape)
    for first, block in token_batches(store, 4096):
        tokens[first : first + len(block)] = block
    return tokens


def token_batches(store: Store, batch: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first image, tokens [<= batch, T]) from `start` on, reading a chunk or more at once."""
    n = store.shape("tokens")[0]
    block = -(-1024 // batch) * batch
    for first in range(start, n, block):
        tokens = some_tokens(store, slice(first, min(first + block, n)))
        for i in range(0, len(tokens), batch):
            yield first + i, tokens[i : i + batch]


def some_tokens(store: Store, rows: slice) -> np.ndarray:
    """Tokens of `rows`, checked against the vocabulary: a wild token would index outside the embedding."""
    tokens, n_vocab = store.read("tokens", rows), store.meta["n_vocab"]
    if tokens.size and tokens.max() >= n_vocab:
        raise PixseqError(
            f"{store.path} holds token {tokens.max()}, its vocabulary has {n_vocab}",
            "the store is damaged: encode again",
        )
    return tokens


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


def check_pairing(path: Path, codec: Mapping[str, Any], tokens: Store, classes: bool = False) -> None:
    """The artifact at `path` (a model, other tokens) with `codec` goes only with tokens of its palette and size.

    With `classes`, of the same classes too. Raises PixseqError naming both sides.
    """
    ours, theirs = codec, tokens.meta
    if ours["scheme"] != theirs["scheme"]:
        raise PixseqError(
            f"{path} is of {ours['scheme']} tokens, {tokens.path} holds {theirs['scheme']} tokens",
            f"encode with --scheme {ours['scheme']}",
        )
    if ours["palette_id"] != theirs["palette_id"]:
        known = None not in (ours["palette_id"], theirs["palette_id"])
        raise PixseqError(
            f"{path} has the palette {ours['palette_id'] or 'unknown'}, "
            f"{tokens.path} was encoded with {theirs['palette_id'] or 'an unknown one'}",
            "encode the pictures with the same palette" if known else "give the one without it the palette: --palette",
        )
    if ours["n_vocab"] != theirs["n_vocab"]:
        raise PixseqError(
            f"{path} has a vocabulary of {ours['n_vocab']}, {tokens.path} one of {theirs['n_vocab']}",
            "encode the pictures with the palette of the model",
        )
    if (ours["height"], ours["width"]) != (theirs["height"], theirs["width"]):
        raise PixseqError(
            f"{path} is of {ours['height']}x{ours['width']} pictures, "
            f"{tokens.path} holds {theirs['height']}x{theirs['width']}",
            f"encode with --size {ours['height']}",
        )
    if classes and ours["class_names"] != theirs["class_names"] and ours["class_names"] and theirs["class_names"]:
        raise PixseqError(
            f"{path} has the classes {_few(ours['class_names'])}, {tokens.path} has {_few(theirs['class_names'])}",
            "encode a source with the same classes",
        )


def _few(names: list[str] | None) -> str:
    if names is None:
        return "without names"
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")


def read_images(
    tokens: str | Path, val: str | Path | None, val_fraction: float | None, seed: int, classes: bool = False
) -> tuple[Store, Images, Images | None, dict[str, Any]]:
    """The tokens store, its training images, the validation images (or None) and the parents' references.

    Raises UsageError for a val_fraction that is no fraction, PixseqError if val does not pair with tokens.
    """
    check_fraction(val, val_fraction)
    store = open_tokens(tokens)
    inputs = {"tokens": reference(tokens, store.manifest)}
    other = None
    if val is not None:
        other = open_tokens(val)
        check_pairing(store.path, store.meta, other, classes)
        inputs["val"] = reference(val, other.manifest)
    images = Images(read_tokens(store), store.labels(), grid(store.meta))
    if other is not None:
        return store, images, Images(read_tokens(other), other.labels(), images.grid), inputs
    if val_fraction is None:
        return store, images, None, inputs
    if len(images) < 2:
        raise PixseqError(f"{tokens} holds one image: no part can be held out", "encode more, or give --val")
    train_rows, val_rows = split_validation(len(images), val_fraction, seed)
    return store, images.subset(train_rows), images.subset(val_rows), inputs


def check_fraction(val: str | Path | None, val_fraction: float | None) -> None:
    if val is not None and val_fraction is not None:
        raise UsageError("--val and --val-fraction were both given", "keep one of them")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, it must lie between 0 and 1", "for example 0.1")


def first_images(images: Images | None, most: int) -> Images | None:
    """An evenly spaced part of at most `most` images."""
    if images is None or len(images) <= most:
        return images
    return images.subset(np.linspace(0, len(images) - 1, most).astype(np.int64))
