"""Orders of the cells of a picture, for models of sequences.

Every function gives int64 [H * W]: entry p is the raster index of the cell that comes at position p.
"""

from __future__ import annotations

import numpy as np

from pixseq.streams import Stream

RASTER = "raster"
NAMED = (RASTER, "column", "reversed", "spiral-out", "checkerboard", "random")


def order_of(name: str, height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A named order of pixels or patches; the `channels` tokens of a pixel stay together. Raises ValueError."""
    raster = np.arange(height * width).reshape(height, width)
    cells = {
        "raster": lambda: raster.ravel(),
        "column": lambda: raster.T.ravel(),
        "reversed": lambda: raster.ravel()[::-1],
        "spiral-out": lambda: spiral_in(raster)[::-1],
        "checkerboard": lambda: checkerboard(raster),
        "random": lambda: np.random.default_rng([seed, 0, Stream.SEQUENCE_ORDER]).permutation(height * width),
    }
    if name not in cells:
        raise ValueError(f"there is no order {name!r}")
    return with_channels(np.ascontiguousarray(cells[name]()), channels)


def spiral_in(raster: np.ndarray) -> np.ndarray:
    """From the top left corner along the edge, clockwise, to the middle."""
    rings = []
    while raster.size:
        rings.append(raster[0])
        raster = np.rot90(raster[1:])  # the right edge comes up next
    return np.concatenate(rings)


def checkerboard(raster: np.ndarray) -> np.ndarray:
    """The cells of one colour in raster order, then those of the other."""
    white = np.add.outer(np.arange(raster.shape[0]), np.arange(raster.shape[1])) % 2 == 0
    return np.concatenate([raster[white], raster[~white]])


def with_channels(cells: np.ndarray, channels: int) -> np.ndarray:
    return (cells[:, None] * channels + np.arange(channels)).ravel()


def is_permutation(values: np.ndarray, count: int) -> bool:
    return values.shape == (count,) and np.array_equal(np.sort(values), np.arange(count))
