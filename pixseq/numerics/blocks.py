"""Rows of features, passed over in blocks that stay in cache, or come to the device one by one where they do not fit.

Blocks come in their order: what is added up over them does not depend on the number of threads.
Shapes: n rows, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 2048  # some MB of features: in a core's cache between the two products
BLOCK_CELLS = 1 << 23  # at most, of a block's rows against features or classes
SHARED_PRODUCTS = 1 << 24  # of a pass, fewer of which several threads finish no sooner than one
EXACT_CELLS = 1 << 22  # of X, up to which all is float64


class Rows:
    """Features [n, D] with their class numbers y [n], read block by block on a device by several threads."""

    def __init__(self, X: np.ndarray, y: np.ndarray, K: int, device: str = "cpu", threads: int = 1):
        self.device = torch.device(device)
        self.dtype = torch.float64 if X.size <= EXACT_CELLS else torch.float32
        self.n, self.D = X.shape
        self.X = torch.from_numpy(X)
        self.y = torch.from_numpy(y.astype(np.int64)).to(self.device)
        if self.dtype == torch.float64 or self._fits():
            self.X = self.X.to(self.device, self.dtype)
        self.slices = block_slices(self.n, self.D, K, BLOCK_ROWS if self.device.type == "cpu" else BLOCK_CELLS)
        large = X.size * K >= SHARED_PRODUCTS and min(threads, len(self.slices)) > 1
        several = large and self.device.type == "cpu"
        self.pool = ThreadPoolExecutor(threads) if several else None  # for all passes: making one takes half of a pass
        self.mean = sum(self.map(lambda X, _: X.sum(0, dtype=torch.float64))) / self.n

    def _fits(self) -> bool:
        """On the device: always where it is the CPU, whose memory already holds float32."""
        if self.device.type == "cpu":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return 4 * self.X.numel() < free // 2

    def map(self, of_block: Callable[[Tensor, Tensor], tuple | Tensor]) -> Iterator:
        """`of_block` of every block's X and y, in order."""

        def part(rows: slice) -> Any:
            return of_block(self.X[rows].to(self.device, self.dtype, non_blocking=True), self.y[rows])

        yield from (map if self.pool is None else self.pool.map)(part, self.slices)


def block_slices(n: int, D: int, K: int, most: int = BLOCK_CELLS) -> list[slice]:
    size = max(1, min(most, BLOCK_CELLS // max(D, K)))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
