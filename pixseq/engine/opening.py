"""Opening what the model stages read: images as tokens or pixels, a model, and the check that they belong together.

A store of images is of the kind "tokens", uint16 [N, T], or "pixels", uint8 [N, H, W, 3]; its array has that name.
One of whole pictures gives `Pictures`, each of its own size.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts.arrays import SHAPES, Store, open_store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.specs import CHUNK_PIXELS
from pixseq.data.pictures import SHOWN, Pictures, as_seen
from pixseq.engine.images import Images
from pixseq.engine.parts import check_apart
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model, Shape, build, shape_from
from pixseq.numerics.parts import choose_rows, split_validation
from pixseq.runtime import Machine, host_memory_bytes, placed

MOST_BESIDE = 1 << 20  # weights that a shape may count and a file not hold
BLOCK_PIXELS = 1 << 25  # of whole pictures: 100 MB read at once


def open_images(path: str | Path, *kinds: str) -> Store:
    """A store of one of `kinds` ("tokens", "pixels") with at least one image."""
    store = open_store(path, *kinds)
    if not len(store):
        raise PixseqError(f"{path} holds no images", "encode a source with images")
    return store


def read_all(store: Store, scratch: Path | None = None) -> np.ndarray | Pictures:
    """All images of a store: in memory, or if they are too many mapped from an unnamed file in the folder `scratch`,
    where the result will be too (None: beside the store, whose folder need not be writable).
    """
    if not store.whole:
        images = _room(store, scratch)
        for first, block in image_batches(store, 4096):
            images[first : first + len(block)] = block
        return images
    pixels = _room(store, scratch)
    for first in range(0, len(pixels), CHUNK_PIXELS):
        pixels[first : first + CHUNK_PIXELS] = store.read(store.kind, slice(first, first + CHUNK_PIXELS))
    return _of_whole(store, pixels, store.read(SHAPES))


def _of_whole(store: Store, pixels: np.ndarray, shapes: np.ndarray) -> np.ndarray | Pictures:
    """Whole pictures of a store; where all of the store have one size, uint8 [n, h, w, 3]."""
    if store.one_size is None:
        return Pictures(pixels, shapes)
    return pixels.reshape(-1, *store.one_size, 3)


def _room(store: Store, scratch: Path | None) -> np.ndarray:
    """For the numbers of the store's main array."""
    shape, dtype = store.shape(store.kind), np.dtype(np.uint16 if store.kind == "tokens" else np.uint8)
    size = dtype.itemsize * math.prod(shape)
    if size <= host_memory_bytes() / 4:
        images = np.empty(shape, dtype)
    else:
        folder = scratch or store.path.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk now, not a SIGBUS later
                images = np.memmap(file, dtype, "w+", shape=shape)
        except OSError as error:
            raise PixseqError(
                f"{store.path} takes {size / 1e9:.1f} GB, more than memory has for it, and {folder} has no room for a "
                f"copy: {error.strerror}",
                "free some space there, or choose another --out",
            ) from None
    return images


def image_batches(
    store: Store, batch: int, start: int = 0, codec: Codec | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first image, images [<= batch, ...]) from `start` on, reading a chunk or more at once."""
    at_once = 1024
    if store.whole:
        at_once = min(BLOCK_PIXELS * len(store) // store.shape(store.kind)[0] + 1, at_once)
    block = -(-at_once // batch) * batch
    for first in range(start, len(store), block):
        images = seen_images(store, slice(first, min(first + block, len(store))), codec)
        for i in range(0, len(images), batch):
            yield first + i, images[i : i + batch]


def some_images(store: Store, rows: slice | np.ndarray, codec: Codec | None = None) -> np.ndarray | Pictures:
    """The images of `rows`, a slice or ascending numbers: as they are stored, or as a model of `codec` sees them.

    Tokens are checked, since a wild one would index outside the embedding.
    """
    if store.whole:
        images = _of_whole(store, *store.whole_pictures(rows))
    else:
        images = store.read(store.kind, (rows, *[slice(None)] * (len(store.shape(store.kind)) - 1)))
    if store.kind == "pixels":
        return images if codec is None else as_seen(images, *codec.grid[:2])
    assert isinstance(images, np.ndarray) and store.codec.n_vocab is not None  # tokens
    if images.size and images.max() >= store.codec.n_vocab:
        raise PixseqError(
            f"{store.path} holds token {images.max()}, its vocabulary has {store.codec.n_vocab}",
            "the store is damaged: encode again",
        )
    return images


def seen_images(store: Store, rows: slice | np.ndarray, codec: Codec | None = None) -> np.ndarray:
    """`some_images` in one block, of a store whose pictures have one size, or as a model of `codec` sees them."""
    images = some_images(store, rows, codec)
    assert isinstance(images, np.ndarray)
    return images


def seen_codec(store: Store, side: int | None) -> Codec:
    """The codec of a model of that side on the images of `store`, see Codec.seen."""
    return store.codec.seen(store.path, side, SHOWN)


def open_model(
    path: str | Path, machine: Machine, weights: str = "model", attention: str | None = None
) -> tuple[Model, Checkpoint]:
    """The model in evaluation mode on the machine's device, with its usual attention or that asked for."""
    checkpoint = open_checkpoint(path)
    model = placed(load_weights(shape_from(checkpoint.shape), checkpoint, weights), machine).eval()
    use_attention(model, checkpoint.path, attention)
    return model, checkpoint


def check_memory(shape: Shape, machine: Machine, each: int) -> None:
    """Raises UsageError where a model's weights, at `each` bytes, are more than the machine's device can hold."""
    count, have = shape.parameter_count(), machine.memory_bytes()
    if count * each > have:
        raise UsageError(
            f"a model of {count:,} parameters takes {count * each / 1e9:,.1f} GB, and {machine.device} has "
            f"{have / 1e9:,.1f} GB for it",
            "choose a smaller one: model.n_layer, model.d_model and, of AIM, model.head_width",
        )


def use_attention(model: Model, path: Path, attention: str | None) -> None:
    """Set the pattern in use; None leaves the model's usual one. Raises UsageError for one it cannot have."""
    if attention is None:
        return
    if attention not in model.shape.attention_patterns:
        raise UsageError(
            f"--attention is {attention!r}, and {path} can be used with {', '.join(model.shape.attention_patterns)}",
            "leave it out for the model's usual attention",
        )
    model.attention = attention


def load_weights(shape: Shape, checkpoint: Checkpoint, weights: str = "model") -> Model:
    """A model of `shape` filled from the checkpoint. Raises PixseqError if the tensors are not those of its shape."""
    promised, held = shape.parameter_count(), checkpoint.count(weights)
    if held and promised > 2 * held + MOST_BESIDE:  # before it is laid out
        raise PixseqError(
            f"{checkpoint.path}: its shape promises {promised:,} weights, its {weights}.safetensors holds {held:,}",
            "the checkpoint is damaged: copy it again",
        )
    with torch.device("meta"):
        model = build(shape)
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


def with_new_head(net: Model, shape: Shape, generator: torch.Generator) -> Model:
    """The same weights in a model of `shape`, with a class head, where it has one, as its family begins one.

    What an attentive head normalises by is of the layers it reads, not of the classes it told apart: that stays.
    """
    new = build(shape).init_weights(generator)
    old = {name for name, _ in net.named_parameters() if name.startswith("classifier.")}
    new.load_state_dict({name: x for name, x in net.state_dict().items() if name not in old}, strict=False)
    return new


def read_images(
    tokens: str | Path,
    kind: str,
    val: str | Path | None,
    val_fraction: float | None,
    seed: int,
    classes: bool = False,
    side: int | None = None,
    scratch: Path | None = None,
) -> tuple[Store, Images, Images | None, dict[str, Any]]:
    """The store of that kind, its training images, the validation images (or None) and the parents' references.

    `side` is that of the model's pictures, see seen_codec; `scratch` is for read_all. Raises UsageError for a
    val_fraction that is no fraction, PixseqError if val does not pair with tokens.
    """
    check_fraction(val, val_fraction)
    store = open_images(tokens, kind)
    codec = seen_codec(store, side)
    inputs = {"tokens": reference(tokens, store.manifest)}
    other = None
    if val is not None:
        other = open_images(val, kind)
        codec.must_pair(store.path, other.codec, other.path, classes)
        check_apart(store, other, "what validates must not be trained on")
        if other.images() is not None:
            progress.warn(f"{val} holds several random crops an image; validation usually takes one centre crop")
        inputs["val"] = reference(val, other.manifest)
    split = None if val_fraction is None else split_rows(store, val_fraction, seed)
    images = Images(read_all(store, scratch), store.labels(), codec.grid, shows=store.images())
    if other is not None:
        held = Images(read_all(other, scratch), other.labels(), images.grid, shows=other.images())
        return store, images, held, inputs
    if split is None:
        return store, images, None, inputs
    train_rows, val_rows = split
    return store, images.subset(train_rows), images.subset(val_rows), inputs


def split_rows(store: Store, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate on: the views of one image lie on one side, and every class has its share.

    Raises PixseqError for one image.
    """
    try:
        return split_validation(len(store), val_fraction, seed, store.images(), store.labels())
    except ValueError:
        raise PixseqError(
            f"{store.path} holds one image: no part can be held out", "encode more, or give --val"
        ) from None


def held_out(images: Images, held: Images | None, val_fraction: float | None) -> dict[str, Any]:
    """What a recipe says of the split that `read_images` made: how it was, where labels took part in it."""
    if val_fraction is None or images.labels is None:
        return {}
    assert held is not None
    taken = held.count()["images"]
    return {"held_out": {"of": images.count()["images"] + taken, "taken": taken, "how": "stratified"}}


def check_fraction(val: str | Path | None, val_fraction: float | None) -> None:
    if val is not None and val_fraction is not None:
        raise UsageError("--val and --val-fraction were both given", "keep one of them")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, it must lie between 0 and 1", "for example 0.1")


def some_of(images: Images, most: int) -> Images:
    """A part of at most `most` rows that stands for all, of every class its share."""
    if len(images) <= most:
        return images
    labels = images.labels if images.labels is None or images.chosen is None else images.labels[images.chosen]
    return images.subset(choose_rows(len(images), most, labels))
