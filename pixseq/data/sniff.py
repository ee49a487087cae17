"""What a file is, from its first bytes. Names lie; magic numbers are the contents' own."""

from __future__ import annotations

import gzip
from pathlib import Path

from pixseq.data.records import reading

HEAD_BYTES = 512  # one tar header

# A fast path, so that a folder of a million .jpg is listed without opening each; decoding judges the content anyway.
PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip


def kind_of(path: str | Path) -> str | None:
    """picture, npy, npz, parquet, tar, idx-images, idx-labels, pickle; None for anything else. Sees through gzip."""
    with reading(path), open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head[:2] == b"\x1f\x8b":
        with reading(path), gzip.open(path) as file:
            return _kind(file.read(HEAD_BYTES), packed=True)
    return _kind(head, packed=False)


def _kind(head: bytes, packed: bool) -> str | None:
    if head[257:262] == b"ustar":
        return "tar"
    if head[:4] in (b"\x00\x00\x08\x03", b"\x00\x00\x08\x01"):  # idx: uint8 with 3 axes, with 1
        return "idx-images" if head[3] == 3 else "idx-labels"
    if packed:
        return None
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "npz"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"PAR1":
        return "parquet"
    if is_picture(head):
        return "picture"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    return None


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is in one of the accepted picture formats."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
    )
