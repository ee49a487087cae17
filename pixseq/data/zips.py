"""A zip of pictures, by the same rules as folders on a disk. Members are read one by one; nothing is extracted."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pixseq.data import layout
from pixseq.data.folders import as_source
from pixseq.data.records import ImageFile, Source, reading
from pixseq.data.split_names import split_of
from pixseq.data.tree import ArchiveTree
from pixseq.data.webdataset import MAX_MEMBER_BYTES
from pixseq.errors import PixseqError
from pixseq.text import few, shown

PACKED = (".tar", ".gz", ".tgz", ".zip", ".npz", ".parquet", ".bin", ".tfrecord")


def holds_arrays(path: Path) -> bool:
    """Whether a zip is an .npz: all of its members are arrays."""
    with reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return not names or any(name.endswith(".npy") and "/" not in name for name in names)


def open_zip(path: Path, wanted: str) -> Source:
    """Raises PixseqError for a zip without pictures, and for members that declare too much or need a password."""
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        size = path.stat().st_size
        long = [info for info in members.values() if info.compress_size > size]  # zipfile makes room for so much
        if long:
            raise ValueError(f"{long[0].filename} declares {long[0].compress_size:,} bytes in a zip of {size:,}")
        tree = ArchiveTree(members, path)
    if not tree.members:
        if any(name.endswith("/data.pkl") for name in members):
            raise PixseqError(f"{shown(path)} is a file of torch.save, which is not read", "save its arrays as .npz")
        packed = [name for name in members if name.lower().endswith(PACKED) or "data_batch" in name]
        raise PixseqError(
            f"{shown(path)} holds no pictures, but {few(packed or members) or 'nothing'}",
            "unpack it and name the folder" if packed else "a zip of pictures holds .jpg, .png and their like",
        )
    chosen = layout.choose(tree, layout.archive_root(tree), path, wanted, named=split_of(path.name))
    for info in members.values():
        if info.file_size > MAX_MEMBER_BYTES:
            raise PixseqError(f"{shown(path)}: {shown(info.filename)} declares {info.file_size} bytes")
        if info.flag_bits & 1:
            raise PixseqError(f"{shown(path)} needs a password", "unpack it and name the folder")

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        with reading(path), zipfile.ZipFile(path) as archive:
            for folder, names, label in chosen.between(start, stop):
                for name in names:
                    member = tree.members[folder, bytes(name)]
                    with reading(f"{path}: {member}"):
                        data = archive.read(members[member])
                    yield ImageFile(os.path.join(f"{path}: {folder}", os.fsdecode(name)), data, label)

    return replace(as_source("zip", path, chosen, read), seeks=True, files=[path], shares=True)
