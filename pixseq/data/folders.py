"""Folders of pictures: class folders, flat folders, train/ and test/ above either; and paths on stdin.

What is a split and what a class is in layout.py, in which order they come in tree.py.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pixseq.data import layout, refusals
from pixseq.data.records import ImageFile, Source, pick_split
from pixseq.data.tree import DiskTree, Listing, debris_note, is_left_by_system
from pixseq.errors import PixseqError, UsageError
from pixseq.text import few, shown

FORMATS = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, HEIC or AVIF"
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def open_folder(path: Path, wanted: str, listings: dict[str, Listing]) -> Source:
    """Class folders give labels in the order of their names; a flat folder has none.

    `listings`: of folders that were looked into before.
    """
    tree = DiskTree(listings)
    chosen = layout.choose(tree, str(path), path, wanted)
    if not chosen.pictures:
        others: list[str] = []
        list(tree.walk(str(path), [], others))
        refusals.refuse_others(others)
        raise PixseqError(
            f"{shown(path)} holds no pictures{_instead(others)}", f"a picture is {FORMATS}, told by its content"
        )

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        for folder, names, label in chosen.between(start, stop):
            inside = os.path.join(folder, "")
            for name in names.tolist():
                file = inside + os.fsdecode(name)
                yield ImageFile(file, file, label)

    return as_source("folder", path, chosen, read)


def as_source(
    form: str, path: Path, chosen: layout.ChosenSplit, read: Callable[[int, int | None], Iterator[ImageFile]]
) -> Source:
    """What `layout.choose` found, as a source that `read` streams."""
    notes = list(chosen.notes)
    if chosen.others:
        notes.append(
            f"files that are no pictures were passed over: {len(chosen.others)}, such as {shown(chosen.others[0])}"
        )
    names = None if chosen.class_names is None else [shown(name) for name in chosen.class_names]
    count = sum(len(names) for _, names, _ in chosen.pictures)
    sizes = [len(pictures) for _, pictures, _ in chosen.pictures]

    def labels() -> np.ndarray:
        return np.repeat(np.array([label for *_, label in chosen.pictures], np.int64), sizes)

    why = "the class folders" if names is not None else "there are no class folders"
    if names is None and chosen.tables:
        why += f", and those that {few(chosen.tables)} may hold are not read"
    has_labels, known = names is not None, None if names is None else labels
    return Source(form, str(path), chosen.split, count, names, has_labels, read, notes, known, labels_from=why)


def _instead(others: list[str]) -> str:
    """What there is, by the endings of its names."""
    endings = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in others)
    most = ", ".join(f"{count} {shown(ending)}" for ending, count in endings.most_common(3))
    return f", but other files: {most}" if most else ""


def open_paths(spec: str, files: list[str], wanted: str) -> Source:
    """Pictures by their paths, in the order given, without labels."""

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        return (ImageFile(file, file) for file in files[start:stop])

    return Source(
        "paths", spec, pick_split(spec, (), wanted), len(files), None, False, read, labels_from="paths have none"
    )


def open_stdin(wanted: str) -> Source:
    """Paths on stdin, one a line, or separated by NUL as `find -print0` writes them."""
    if sys.stdin.isatty():
        raise UsageError("SOURCE is -, but nothing is piped in", "e.g. find pictures -name '*.jpg' | pixseq ... -")
    pick_split("-", (), wanted)  # before the paths are taken: stdin cannot be read again for another split
    data = _bytes_of_paths(sys.stdin.buffer.read())
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    files = [os.fsdecode(line) for line in lines if line]
    if not files:
        raise PixseqError("no paths came on stdin", "e.g. find pictures -name '*.jpg' | pixseq ... -")
    # Hidden folders may lead to the pictures, and thumbnails may be what is wanted: only what no user lays there goes.
    left = [file for file in files if any(is_left_by_system(part) for part in file.split("/"))]
    kept = [file for file in files if file not in set(left)] if left else files
    source = open_paths("-", kept or files, wanted)
    return replace(source, notes=debris_note("-", left)) if kept else source


def _bytes_of_paths(data: bytes) -> bytes:
    """A list without the marks of Windows: UTF-16, as PowerShell's Out-File writes it, or UTF-8 with a mark before it.

    UTF-16 without a mark is told by its line ends.
    """
    form = next((form for mark, form in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if form is None and b"\0" in data and len(data) % 2 == 0:
        first, second = data[::2], data[1::2]
        for low, high, possible in ((first, second, "utf-16-le"), (second, first, "utf-16-be")):
            end = low.find(b"\n")
            form = possible if end >= 0 and high[end] == 0 else form
    if form is None:
        return data
    try:
        return data.decode(form).lstrip("\ufeff").encode()
    except UnicodeError as error:
        raise PixseqError(f"the paths on stdin are damaged {form}: {error}", "write the list as UTF-8") from None
