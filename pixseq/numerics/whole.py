"""Whole pictures, each of a size of its own, kept one after the other in raster order.

Shapes: N pictures, P pixels of all of them together.
"""

from __future__ import annotations

import numpy as np


def pixel_count(shapes: np.ndarray) -> int:
    """P of pictures of these shapes [N, 2]."""
    return int(starts(shapes)[-1])


def starts(shapes: np.ndarray) -> np.ndarray:
    """[N, 2] -> int64 [N + 1]: where each picture begins among all pixels, and where the last one ends."""
    return np.concatenate([[0], shapes.astype(np.int64).prod(axis=1).cumsum()])
