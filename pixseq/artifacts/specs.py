"""The form of a store's arrays: their types, shapes and chunks, and the values that fill what was never written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PICTURE_SHAPES = "shapes"  # of whole pictures, int32 [N, 2]: then `pixels` is [P, 3], all of them one after the other
CHUNK_PIXELS = 1 << 21  # of whole pictures: 6 MB


def fill_value(dtype: np.dtype) -> float | int:
    """A value no real array holds: NaN, the largest uint16 (palettes are smaller), the least int32. Bytes have none."""
    if dtype.kind == "f":
        return float("nan")
    limits = np.iinfo(dtype)
    return int(limits.max if dtype.kind == "u" else limits.min)


@dataclass(frozen=True)
class Spec:
    """One array of a store. `shape` has None where the rows grow: (None, T) or (layers, None, D).

    `whole`: a row is a picture, which takes as many entries as the store's PICTURE_SHAPES say it has pixels.
    """

    dtype: str
    shape: tuple[int | None, ...]
    whole: bool = False

    @property
    def row_axis(self) -> int:
        return self.shape.index(None)

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(n for n in self.shape if n is not None)

    def sized(self, rows: int) -> tuple[int, ...]:
        return tuple(rows if n is None else n for n in self.shape)

    def chunks(self, rows: int) -> tuple[int, ...]:
        """One leading index (a layer) and `rows` rows a chunk, so that one layer reads alone."""
        rows = CHUNK_PIXELS if self.whole else rows
        return tuple(1 if axis < self.row_axis else rows if n is None else n for axis, n in enumerate(self.shape))
