"""How much packed bytes unfold to, by the packings that arrays are stored in, before memory is taken for all of it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from pixseq.bounded.zstd import zstd_size

STEP = 1 << 24  # bytes unfolded at a time where only unfolding tells
MOST_MEMORY = 1 << 28  # bytes of lzma's dictionary: a header may ask for 4 GB


def unfolded_size(packing: str, data: bytes, most: int) -> int:
    """Bytes that `data` unfolds to, or some number above `most`. Raises ValueError for what is damaged."""
    try:
        if packing in STATED:
            return STATED[packing](data)
        return _counted(MAKERS[packing], data, most)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, IndexError) as error:
        raise ValueError(f"it is damaged: {error}") from None


def _blosc_size(data: bytes) -> int:
    """Raises ValueError where less is there than is stated: blosc reads as much, whatever is there."""
    stated = int.from_bytes(data[12:16], "little")
    if len(data) < max(stated, 16):
        raise ValueError(f"it has {len(data):,} bytes of {stated:,}")
    return int.from_bytes(data[4:8], "little")


# What states its size at the beginning, for which memory is taken: blosc's header, and numcodecs' own before lz4.
STATED: dict[str, Callable[[bytes], int]] = {
    "zstd": zstd_size,
    "blosc": _blosc_size,
    "lz4": lambda data: int.from_bytes(data[:4], "little"),
}
MAKERS: dict[str, Callable[[], Any]] = {
    "zlib": lambda: zlib.decompressobj(),
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bz2": lambda: bz2.BZ2Decompressor(),
    "lzma": lambda: lzma.LZMADecompressor(memlimit=MOST_MEMORY),
}
PACKINGS = STATED.keys() | MAKERS.keys()


def _counted(make: Callable[[], Any], data: bytes, most: int) -> int:
    total = 0
    while data and total <= most:  # several streams may follow each other
        unpacker = make()
        for size in _pieces(unpacker, data):
            total += size
            if total > most:
                break
        data = unpacker.unused_data
    return total


def _pieces(unpacker: Any, data: bytes) -> Iterator[int]:
    while not unpacker.eof:
        made = len(unpacker.decompress(data, STEP))
        data = getattr(unpacker, "unconsumed_tail", b"")  # zlib hands back what it has not read, the others keep it
        if not made and not data and not unpacker.eof:
            return
        yield made
