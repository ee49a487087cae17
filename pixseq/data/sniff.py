"""What a file is, from its first bytes. Names lie; magic numbers are the contents' own."""

from __future__ import annotations

import gzip
from pathlib import Path

from pixseq.bounded.files import open_regular
from pixseq.data.records import reading

HEAD_BYTES = 512  # one tar header

# A fast path, so that a folder of a million .jpg is listed without opening each; decoding judges the content anyway.
PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".heic", ".heif", ".avif",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md"}  # a file a picture, often: not opened

# What stands where a file should be, and what is well known but not read: the reason, with the way out.
NOT_READ = {
    "Git LFS pointer": "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    "git-annex pointer": "it is a git-annex pointer, not the file itself: fetch it with `git annex get`",
    "HTML": "it is a web page, not the file itself: the download wants another address, or a login",
    "JPEG XL": "it is JPEG XL, which is not read: convert it, for example to PNG",
    "JPEG 2000": "it is JPEG 2000, which is not read: convert it, for example to PNG",
    "DICOM": "it is DICOM, which is not read: convert it to 16-bit PNG",
    "PDF": "it is PDF, which is not read: convert its pages to PNG",
    "7z": "it is a 7z archive, which is not read: unpack it",
    "RAR": "it is a RAR archive, which is not read: unpack it",
    "Zstandard": "it is compressed with Zstandard, which is not read: unpack it",
    "HDF5": "it is HDF5 (or MATLAB 7.3), which is not read: save its arrays as .npz",
    "MATLAB": "it is a MATLAB file, which is not read: save its arrays as .npz",
    "Arrow": "it is an Arrow file, which is not read: write it as parquet",
    "SQLite": "it is an SQLite data base, which is not read: write its pictures to files",
    "gzip": "it is compressed with gzip, which is read of idx files and tars alone: unpack it",
}


def special(head: bytes) -> str | None:
    """HEIC, AVIF, or a key of NOT_READ, from a file's first bytes; None for anything else."""
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in range(8, min(int.from_bytes(head[:4], "big"), 64), 4)} - {head[12:16]}
        if head[8:12] in (b"avif", b"avis") or (b"avif" in brands and b"heic" not in brands):
            return "AVIF"
        return "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"} else None
    if head.startswith(b"/annex/objects/") or b"/annex/objects/" in head[:64]:
        return "git-annex pointer"
    begin = head.lstrip().lower()
    found = next((kind for kind, start in STARTS if begin.startswith(start)), None)
    return found or ("DICOM" if head[128:132] == b"DICM" else None)


STARTS = (
    ("Git LFS pointer", b"version https://git-lfs.github.com/spec/"),
    ("HTML", b"<!doctype html"),
    ("HTML", b"<html"),
    ("JPEG XL", b"\xff\x0a"),
    ("JPEG XL", b"\x00\x00\x00\x0cjxl "),
    ("JPEG 2000", b"\x00\x00\x00\x0cjp  "),
    ("PDF", b"%pdf-"),
    ("7z", b"7z\xbc\xaf\x27\x1c"),
    ("RAR", b"rar!\x1a\x07"),
    ("gzip", b"\x1f\x8b"),
    ("Zstandard", b"\x28\xb5\x2f\xfd"),
    ("HDF5", b"\x89hdf\r\n\x1a\n"),
    ("MATLAB", b"matlab 5.0 mat-file"),
    ("Arrow", b"arrow1\x00\x00"),
    ("SQLite", b"sqlite format 3\x00"),
)


def kind_of(path: str | Path) -> str | None:
    """picture, npy, zip (npz too), parquet, tar, idx-images, idx-labels, pickle; None for anything else.

    Sees through gzip.
    """
    with reading(path), open_regular(path) as file:
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
        return "zip"
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
        or special(head) in ("HEIC", "AVIF")
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
    )
