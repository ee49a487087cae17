"""A store's metadata and chunks before zarr sees them: shapes, types, codecs, and what the chunks unfold to.

zarr believes what a store says: it takes memory for a chunk of any size, and for the chunk that a frame declares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from zarr.storage import LocalStore

from pixseq.artifacts.codec import is_count
from pixseq.bounded.structure import read_object
from pixseq.bounded.zstd import zstd_size

MOST_ROWS = 1 << 40
MOST_CHUNK = 1 << 29  # bytes: ours have up to 64 MB
FOLDED, FREE = 4096, 1 << 29  # a store unfolds to at most so many times its size on the disk, and this
DTYPES = ("bool", "uint8", "uint16", "int32", "int64", "float16", "float32", "float64")
DAMAGED = "it is damaged: make it again, or copy it from where it is whole"


def check_array(path: Path, name: str) -> int:
    """The bytes of a chunk of one of our arrays. Raises ValueError for metadata that no store of ours has."""
    found = read_object(path / name / "zarr.json", DAMAGED)
    grid: Any = found.get("chunk_grid")
    shape: Any = found.get("shape")
    chunks: Any = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, dict) else None
    if found.get("node_type") != "array" or grid.get("name") != "regular" or found.get("storage_transformers"):
        raise ValueError(f"{name} is no plain array")
    if not _is_shape(shape, 0) or not _is_shape(chunks, 1) or len(shape) != len(chunks) or not 1 <= len(shape) <= 4:
        raise ValueError(f"{name} has the shape {shape} in chunks of {chunks}")
    if found.get("data_type") not in DTYPES:
        raise ValueError(f"{name} is of type {found.get('data_type')!r}")
    keys = found.get("chunk_key_encoding")
    if not isinstance(keys, dict) or keys.get("name") != "default" or keys.get("configuration") != {"separator": "/"}:
        raise ValueError(f"{name} has its chunks under other names")
    codecs = found.get("codecs")
    names = [each.get("name") for each in codecs if isinstance(each, dict)] if isinstance(codecs, list) else None
    if names != ["bytes", "zstd"]:
        raise ValueError(f"{name} is stored by {names}, not by bytes and zstd")
    size = np.dtype(found["data_type"]).itemsize * math.prod(chunks)
    if size > MOST_CHUNK:
        raise ValueError(f"{name} has chunks of {size:,} bytes, more than the {MOST_CHUNK:,} that are read")
    return size


def _is_shape(value: Any, least: int) -> bool:
    """A list of whole numbers from `least`, 0 or 1."""
    return isinstance(value, list) and all(is_count(n, MOST_ROWS) or (n == least and type(n) is int) for n in value)


def check_folding(declared: int, real: int, free: int = FREE) -> None:
    """Raises ValueError for arrays of more bytes than chunks of so few can hold."""
    if declared > free + FOLDED * real:
        raise ValueError(f"it declares {declared:,} bytes, and its chunks have {real:,}")


class BoundedStore(LocalStore):
    """A folder whose chunks are handed on only where they unfold to a chunk of their array, at most."""

    chunk_bytes: Mapping[str, int] = {}

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        most = self.chunk_bytes.get(key.partition("/c")[0])
        if found is not None and most is not None and not key.endswith("zarr.json"):
            made = zstd_size(found.to_bytes())
            if made > most + 1024:
                raise ValueError(f"{key} unfolds to {made:,} bytes, and a chunk has {most:,}")
        return found
