"""Tars of pictures: WebDataset shards, where the members of one sample follow each other (key.jpg, key.cls, key.json),
and tars of class folders.

A tar is read as a stream. Nothing is extracted, links and devices are passed over, and a member's name is only ever a
key and a text for messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from pixseq.bounded.files import open_regular
from pixseq.bounded.structure import parse_json
from pixseq.bounded.tars import open_tar
from pixseq.data import labels, layout
from pixseq.data.folders import as_source
from pixseq.data.records import Encoded, NoSuchSplit, Source, Wanted, reading, shown
from pixseq.data.shards import shards_of_split
from pixseq.data.sniff import PICTURE_SUFFIXES
from pixseq.data.tree import ArchiveTree, debris_in
from pixseq.errors import PixseqError
from pixseq.progress import few

MAX_MEMBER_BYTES = 1 << 28  # 256 MiB: no picture of 64 megapixels needs more
MAX_LABEL_BYTES = 1 << 20  # of a .cls or a .json
LABEL_FIELDS = ("cls", "label", "class", "target")  # endings of members with one label
OTHERS_LISTED = 1000  # members that are looked at to say what a tar without pictures holds


def open_webdataset(path: Path, wanted: Wanted, files: list[Path]) -> Source:
    """One .tar or a folder of shards. How many pictures there are shows only when all have streamed by."""
    of_all_splits = files
    try:
        split, files, notes = shards_of_split(path, files, wanted)
    except NoSuchSplit:  # the split may be a folder inside
        if (source := _of_folders(path, files, wanted.split)) is None:
            raise
        return source
    for file in files:
        _check_end(file)
    first = next(_samples(files[0], wanted), None)
    if first is None:
        raise PixseqError(
            f"{shown(files[0])} holds no pictures{_instead(files[0])}",
            "a sample is key.jpg (or png, webp ...) with key.cls or key.json",
        )
    name, _, label = first
    if label is None and "/" in name.partition(": ")[2]:
        source = _of_folders(path, files, wanted.split if split == "all" else "train")
        if source is not None:
            return source
    if label is None and wanted.labels and (column := wanted.label_column) is not None:
        raise PixseqError(
            f"{shown(name)} has no label {shown(column)}: no member .{shown(column)} beside it, or key of a "
            ".json, holds one",
            "name the ending of a member, or a key of the .json members; --label-column none reads no labels",
        )
    names, classes = None, None
    if (
        isinstance(label, str) and not label.isdigit()
    ):  # texts are numbered over all splits, so that a class that one lacks shifts no label
        names = labels.names_of(_texts(of_all_splits, wanted))
        classes = {text: i for i, text in enumerate(names)} if names else None

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        samples = (sample for file in files for sample in _samples(file, wanted))
        for name, data, value in islice(samples, start, stop):
            if (value is None) != (label is None) and not (value is None and wanted.skip):
                raise PixseqError(
                    f"{shown(name)} has {'no' if value is None else 'a'} label, unlike the first picture, "
                    f"{shown(first[0])}",
                    "give all pictures a .cls, or none; --on-error skip passes over those without, and "
                    "--label-column none reads no labels",
                )
            yield Encoded(name, data, None if value is None else _number(name, value, classes))

    why = "the .cls or .json members" if label is not None else "no member .cls, or key of a .json, holds any"
    names = [shown(name) for name in names] if names else None
    return Source(
        "webdataset", str(path), split, None, names, label is not None, read, notes, labels_from=why, files=files
    )


# -------------------------------------------------------------------------------------------------- tars of folders


def _of_folders(path: Path, files: list[Path], wanted: str) -> Source | None:
    """Tars of class folders, by the same rules as folders on a disk; None where its members are WebDataset's samples,
    of one key each, or where pictures lie beside folders.
    """
    names = [name for file in files for name in _names(file)]
    pictures = {name.rpartition(".")[0] for name in names if _is_picture(name)}
    if any(not _is_picture(name) and name.rpartition(".")[0] in pictures for name in names):
        return None
    tree = ArchiveTree(names)
    root = layout.archive_root(tree)
    if len(tree.listing(root).pictures):
        return None
    chosen = layout.choose(tree, root, path, wanted)
    label_of = {folder: label for folder, _, label in chosen.pictures}

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        return islice(_in_order(), start, stop)

    def _in_order() -> Iterator[Encoded]:
        for file in files:
            for name, data in _members(file):
                folder = tree.folder_of(name)
                if _is_picture(name) and folder in label_of:
                    yield Encoded(f"{file}: {name}", data, label_of[folder])

    return replace(as_source("tar", path, chosen, read), files=files, shares=True)


def _names(file: Path) -> Iterator[str]:
    """The names of a tar's files: of one that is not compressed without reading what they hold."""
    with reading(file), open_regular(file) as handle:
        packed = handle.read(262)[257:] != b"ustar"
    with reading(file), open_tar(file, "r|*" if packed else "r:") as tar:
        for member in tar:
            tar.members = []
            if member.isfile():
                yield member.name


# ------------------------------------------------------------------------------------------------------------ samples

Sample = tuple[str, bytes, labels.Value]  # the picture's name, the picture, its label


def _samples(file: Path, wanted: Wanted) -> Iterator[Sample]:
    """The samples of a shard that hold a picture. A key is the name up to the first dot of its last part."""
    key, fields = None, {}
    for name, data in _members(file, wanted.label_column):
        folder, slash, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        if (folder, stem) != key:
            yield from _sample(fields, wanted)
            key, fields = (folder, stem), {}
        role = "picture" if _is_picture(name) else field.lower()
        if role in fields:
            raise PixseqError(
                f"{shown(file)}: {shown(name)} is a second {role} of sample {shown(folder + slash + stem)}",
                "a key ends at its first dot: rename the members",
            )
        fields[role] = (f"{file}: {name}", data)
    yield from _sample(fields, wanted)


def _sample(fields: dict[str, tuple[str, bytes]], wanted: Wanted) -> Iterator[Sample]:
    if "picture" in fields:
        name, data = fields["picture"]
        yield name, data, _label(fields, wanted.label_column) if wanted.labels else None


def _label(fields: dict[str, tuple[str, bytes]], column: str | None) -> labels.Value:
    for role in LABEL_FIELDS if column is None else (column.lower(),):
        if role in fields:
            text = fields[role][1].decode("utf-8", "replace").strip()
            return None if labels.is_missing(text) else text
    if "json" in fields:
        name, data = fields["json"]
        try:
            content = parse_json(data, finite=False)
        except ValueError as error:
            raise PixseqError(f"{shown(name)} is no JSON: {shown(error)}", "mend or remove it") from None
        for key in labels.NAMES if column is None else (column,):
            if isinstance(content, dict) and key in content:
                return None if labels.is_missing(content[key]) else content[key]
    return None


def _number(name: str, value: labels.Value, classes: dict[str, int] | None) -> int:
    try:
        return int(np.int32(labels.number(value, classes)))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise PixseqError(
            f"{shown(name)} holds no label: {shown(error)}", "a label is a whole number from 0, or all are texts"
        ) from None


def _texts(files: list[Path], wanted: Wanted) -> set[str]:
    """All labels, as texts."""
    values = (value for file in files for _, _, value in _samples(file, wanted))
    return {str(value) for value in values if value is not None}


def _members(file: Path, column: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Pictures and labels (those that end in `column` too) in a tar, in its order, without what systems leave there."""
    fields = (*LABEL_FIELDS, "json", *([] if column is None else [column.lower()]))
    with reading(file), open_tar(file, "r|*") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep every header it has seen
            field = member.name.rpartition("/")[2].partition(".")[2].lower()
            if not member.isfile() or not (_is_picture(member.name) or field in fields):
                continue
            if debris_in(member.name) is not None:
                continue
            most = MAX_MEMBER_BYTES if _is_picture(member.name) else MAX_LABEL_BYTES
            if member.size > most:
                raise ValueError(f"{member.name} declares {member.size:,} bytes, more than the {most:,} that are read")
            data = tar.extractfile(member).read()
            if len(data) < member.size:
                raise EOFError(f"{member.name} is cut short")
            yield member.name, data


def _is_picture(name: str) -> bool:
    base = name.rpartition("/")[2]
    return "." in base and "." + base.lower().rpartition(".")[2] in PICTURE_SUFFIXES


def _instead(file: Path) -> str:
    """What a tar without pictures holds."""
    names = list(islice(_names(file), OTHERS_LISTED))
    packed = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    if packed:
        return f", but archives, such as {shown(packed[0])}: unpack it"
    return f", but {few(names)}" if names else ""


def _check_end(file: Path) -> None:
    """tarfile takes a tar cut between two members for a whole one; but a whole one ends in a block of zeros."""
    with reading(file), open_regular(file) as handle:
        if handle.read(262)[257:] == b"ustar":  # else compressed: then the checksum tells
            handle.seek(-min(512, file.stat().st_size), 2)
            if handle.read().strip(b"\0"):
                raise EOFError("the tar is cut short")
