"""The header of a .npy, and small arrays whole. numpy takes what a header promises as memory before it reads on."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pixseq.bounded.files import open_regular

MOST_HEADER = 10_000  # bytes, as numpy's own limit


class NpyHeader(NamedTuple):
    """Of an array in a file: `offset` is where its bytes begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, size: int | None) -> NpyHeader:
    """From the beginning of a .npy of `size` bytes. Raises ValueError where it contradicts them; None: not known."""
    start = file.read(8)
    version = start[6:8]
    width = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(version)
    if start[:6] != b"\x93NUMPY" or width is None:
        raise ValueError("it is no .npy of a known version")
    length = file.read(width)
    count = int.from_bytes(length, "little")
    if count > MOST_HEADER:
        raise ValueError(f"its header declares {count:,} bytes")
    text = file.read(count)
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(io.BytesIO(length + text))
    except Exception as error:  # numpy evaluates the text, so that damage comes as many types
        raise ValueError(f"its header is damaged: {error}") from None
    header = NpyHeader(shape, fortran, dtype, 8 + width + count)
    if min(shape, default=0) < 0 or not all(type(n) is int for n in shape):
        raise ValueError(f"it has the shape {list(shape)}")
    if not dtype.hasobject and size not in (None, header.offset + header.nbytes):
        raise ValueError(f"it has {size} bytes, but its header promises {header.offset + header.nbytes}")
    return header


def load_small(path: str | Path, most: int) -> np.ndarray:
    """The array in a .npy of at most `most` bytes. Raises ValueError for anything else, and OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, more than the {most:,} that are read")
        header = read_header(file, size)
        if header.dtype.hasobject or not header.dtype.itemsize:
            raise ValueError(f"it holds {header.dtype}, which is never loaded")
        values = np.frombuffer(file.read(), header.dtype, math.prod(header.shape))
        return values.reshape(header.shape, order="F" if header.fortran else "C")
