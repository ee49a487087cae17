"""The images of a store, as they are stored or as a model sees them. No model is known here, nor torch.

A store of images is of the kind "tokens", uint16 [N, T], or "pixels", uint8 [N, H, W, 3]; its array has that name.
One of whole pictures gives `Pictures`, each of its own size.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from pixseq.artifacts.arrays import Store, open_store
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.specs import CHUNK_PIXELS, PICTURE_SHAPES
from pixseq.cores import host_memory_bytes
from pixseq.data.pictures import SHOWN, Pictures, as_seen
from pixseq.errors import PixseqError

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
        images = _allocated(store, scratch)
        for first, block in image_batches(store, 4096):
            images[first : first + len(block)] = block
        return images
    pixels = _allocated(store, scratch)
    for first in range(0, len(pixels), CHUNK_PIXELS):
        pixels[first : first + CHUNK_PIXELS] = store.read(store.kind, slice(first, first + CHUNK_PIXELS))
    return _of_whole(store, pixels, store.read(PICTURE_SHAPES))


def _of_whole(store: Store, pixels: np.ndarray, shapes: np.ndarray) -> np.ndarray | Pictures:
    """Whole pictures of a store; where all of the store have one size, uint8 [n, h, w, 3]."""
    if store.one_size is None:
        return Pictures(pixels, shapes)
    return pixels.reshape(-1, *store.one_size, 3)


def _allocated(store: Store, scratch: Path | None) -> np.ndarray:
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
                f"{store.path} takes {decimal(size)}, more than memory has for it, and {folder} has no room for a "
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
