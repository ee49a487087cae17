"""WebDataset shards: tar files in which the members of one sample follow each other: key.jpg, key.cls, key.json.

A shard is read as a stream. Nothing is extracted, links and devices are passed over, and a member's name is only
ever a key and a text for messages.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pixseq.data.records import Encoded, Source, reading, shards_of_split, shown
from pixseq.data.sniff import PICTURE_SUFFIXES
from pixseq.errors import PixseqError

MAX_MEMBER_BYTES = 1 << 28  # 256 MiB: no picture of 64 megapixels needs more
LABEL_KEYS = ("label", "cls")  # in a .json member


def open_webdataset(path: Path, wanted: str, files: list[Path]) -> Source:
    """One .tar or a folder of shards. How many pictures there are shows only when all have streamed by."""
    split, files = shards_of_split(path, files, wanted)
    for file in files:
        _check_end(file)
    first = next(_samples(files[0]), None)
    if first is None:
        raise PixseqError(
            f"{shown(files[0])} holds no pictures", "a sample is key.jpg (or png, webp ...) with key.cls or key.json"
        )
    has_labels = first.label is not None

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        for sample in islice((sample for file in files for sample in _samples(file)), start, stop):
            if (sample.label is not None) != has_labels:
                raise PixseqError(
                    f"{shown(sample.name)} has {'no' if has_labels else 'a'} label, unlike the first picture, "
                    f"{shown(first.name)}",
                    "give all pictures a .cls, or none",
                )
            yield sample

    return Source("webdataset", str(path), split, None, None, has_labels, read)


def _samples(file: Path) -> Iterator[Encoded]:
    """The samples of a shard that hold a picture. A key is the name up to the first dot of its last part."""
    key, fields = None, {}
    for name, data in _members(file):
        folder, slash, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        if (folder, stem) != key:
            yield from _sample(fields)
            key, fields = (folder, stem), {}
        role = "picture" if _is_picture(field) else field.lower()
        if role in fields:
            raise PixseqError(
                f"{shown(file)}: {shown(name)} is a second {role} of sample {shown(folder + slash + stem)}",
                "a key ends at its first dot: rename the members",
            )
        fields[role] = (f"{file}: {name}", data)
    yield from _sample(fields)


def _sample(fields: dict[str, tuple[str, bytes]]) -> Iterator[Encoded]:
    if "picture" in fields:
        yield Encoded(*fields["picture"], _label(fields))


def _label(fields: dict[str, tuple[str, bytes]]) -> int | None:
    for role in ("cls", "json"):
        if role in fields:
            name, data = fields[role]
            try:
                content = {"cls": int(data)} if role == "cls" else json.loads(data)
                for key in LABEL_KEYS if isinstance(content, dict) else ():
                    if key in content:
                        return int(np.int32(content[key]))
            except (ValueError, TypeError, OverflowError) as error:
                raise PixseqError(
                    f"{shown(name)} holds no label: {shown(error)}", "a label is a whole number from 0"
                ) from None
    return None


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Pictures and labels in a tar, in its order."""
    with reading(file), tarfile.open(file, "r|*") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep every header it has seen
            field = member.name.rpartition("/")[2].partition(".")[2]
            if not member.isfile() or not (_is_picture(field) or field.lower() in ("cls", "json")):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(f"{member.name} declares {member.size} bytes")
            data = tar.extractfile(member).read()
            if len(data) < member.size:
                raise EOFError(f"{member.name} is cut short")
            yield member.name, data


def _is_picture(field: str) -> bool:
    return "." + field.lower().rpartition(".")[2] in PICTURE_SUFFIXES


def _check_end(file: Path) -> None:
    """tarfile takes a tar cut between two members for a whole one; but a whole one ends in a block of zeros."""
    with reading(file), open(file, "rb") as handle:
        if handle.read(262)[257:] == b"ustar":  # else compressed: then the checksum tells
            handle.seek(-min(512, file.stat().st_size), 2)
            if handle.read().strip(b"\0"):
                raise EOFError("the tar is cut short")
