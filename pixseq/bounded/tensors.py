"""The header of a safetensors file: held against the file before a tensor is made.

Eight bytes say how long the header is, JSON of each tensor's dtype, shape and place among the bytes that follow.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from pixseq.bounded.files import check_holes, open_regular
from pixseq.bounded.structure import parse_json

MOST_HEADER = 1 << 23  # bytes: ten thousand tensors take one
MOST_TENSORS = 50_000
MOST_DIMENSIONS = 8


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by name. Raises ValueError for a file that contradicts itself, and OSError."""
    with open_regular(path) as file:
        check_holes(file)
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            raise ValueError(f"its header declares {length:,} bytes, and it has {size:,}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header holds no names")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it holds {len(header):,} tensors, more than the {MOST_TENSORS:,} that are read")
    return {name: _shape(name, entry, size - 8 - length) for name, entry in header.items()}


def _shape(name: str, entry: Any, size: int) -> tuple[int, ...]:
    shape, ends = (entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "data_offsets"))
    if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS or not _are_counts(ends) or len(ends) != 2:
        raise ValueError(f"it tells no shape and place of {name}")
    if not ends[0] <= ends[1] <= size or 8 * (ends[1] - ends[0]) < math.prod(shape):  # no type has less than a bit
        raise ValueError(f"{name} of shape {shape} lies at {ends} of {size:,} bytes")
    return tuple(shape)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
