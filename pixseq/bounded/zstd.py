"""How much a chunk of an array unfolds to, told from its compressed form before it is unfolded.

Zstandard: RFC 8878, section 3.1. A frame states its size, or not; each of its blocks makes at most 128 KiB, except
runs of one byte, which say how long they are.
"""

from __future__ import annotations

MAGIC, SKIPPED = b"\x28\xb5\x2f\xfd", (0x184D2A50, 0x184D2A5F)
MOST_BLOCK = 1 << 17


def zstd_size(data: bytes) -> int:
    """The most bytes that frames of Zstandard ask memory for. Raises ValueError for what is none."""
    at, total = 0, 0
    while at < len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if SKIPPED[0] <= magic <= SKIPPED[1]:
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if data[at : at + 4] != MAGIC or at + 6 > len(data):
            raise ValueError("it is no frame of Zstandard")
        at, stated, checksum = _header(data, at + 4)
        made, last = 0, False
        while not last:
            if at + 3 > len(data):
                raise ValueError("a frame of Zstandard in it is cut short")
            head = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
            made += size if kind in (0, 1) else MOST_BLOCK
            at += 3 + (1 if kind == 1 else size)
        at += 4 * checksum
        total += made if stated is None else max(stated, 0)
    return total


def _header(data: bytes, at: int) -> tuple[int, int | None, int]:
    """Where the blocks begin, the size that is stated, and whether a checksum follows them."""
    descriptor = data[at]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    at += 1 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[flag]
    stated = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0) if width else None
    return at + width, stated, descriptor >> 2 & 1
