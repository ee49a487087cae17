"""Folders of pictures: class folders, flat folders, train/ and test/ above either; and paths on stdin.

Order is by the bytes of the names, folder by folder, so that it depends on neither locale nor file system. Links are
followed, except back into a folder they lie in. Names are held (some 30 bytes a picture); pictures are not opened here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixseq.data.records import SPLITS, Encoded, Source, parts, pick_split, reading, shown
from pixseq.data.sniff import PICTURE_SUFFIXES, kind_of
from pixseq.errors import PixseqError, UsageError

FORMATS = "JPEG, PNG, WebP, BMP, GIF, TIFF or PPM"


@dataclass(frozen=True)
class Listing:
    """What one folder holds directly: pictures (bytes, sorted), folders (sorted) and files that are neither."""

    pictures: np.ndarray
    folders: list[str]
    others: list[str]


def open_folder(path: Path, wanted: str) -> Source:
    """Class folders give labels in the order of their names; a flat folder has none."""
    root, top = str(path), list_folder(str(path))
    while (inner := _lone_wrapper(root, top)) is not None:
        root, top = inner, list_folder(inner)

    split, roots = "all", [root]
    names = _split_folders(root, top)
    if names:
        split = pick_split(path, names, wanted)
        roots = [os.path.join(root, name) for name in names.values()]
        root = os.path.join(root, names[split])
        top = list_folder(root)
    else:
        pick_split(path, (), wanted)

    notes: list[str] = []
    others: list[str] = []
    if not top.folders:
        class_names, folders = None, [(root, top.pictures, None)] if len(top.pictures) else []
    else:
        # Over all splits, so that a class that one of them lacks shifts no label.
        class_names = sorted({name for each in roots for name in list_folder(each).folders}, key=os.fsencode)
        folders = []
        for label, name in enumerate(class_names):
            inside = list(_walk(os.path.join(root, name), notes, others)) if name in top.folders else []
            if not inside:
                notes.append(f"{shown(os.path.join(root, name))} holds no pictures: class {label} is empty")
            folders += [(folder, pictures, label) for folder, pictures in inside]
    others += [os.path.join(root, name) for name in top.others]
    if others:
        notes.append(f"files that are no pictures were passed over: {len(others)}, such as {shown(others[0])}")
    if not folders:
        raise PixseqError(f"{shown(path)} holds no pictures", f"a picture is {FORMATS}, told by its content")
    if class_names is not None and len(top.pictures):
        raise PixseqError(
            f"{shown(root)} holds both pictures ({shown(os.fsdecode(top.pictures[0]))}) and folders of pictures "
            f"({shown(top.folders[0])})",
            "keep either: a flat folder of pictures, or one folder a class",
        )

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        for which, low, high in parts([len(pictures) for _, pictures, _ in folders], start, stop):
            folder, pictures, label = folders[which]
            for name in pictures[low:high]:
                file = os.path.join(folder, os.fsdecode(name))
                yield Encoded(file, file, label)

    count = sum(len(pictures) for _, pictures, _ in folders)
    shown_names = None if class_names is None else [shown(name) for name in class_names]
    return Source("folder", str(path), split, count, shown_names, class_names is not None, read, notes)


def open_paths(spec: str, files: list[str], wanted: str) -> Source:
    """Pictures by their paths, in the order given, without labels."""

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        return (Encoded(file, file) for file in files[start:stop])

    return Source("paths", spec, pick_split(spec, (), wanted), len(files), None, False, read)


def open_stdin(wanted: str) -> Source:
    """Paths on stdin, one a line, or separated by NUL as `find -print0` writes them."""
    if sys.stdin.isatty():
        raise UsageError("SOURCE is -, but nothing is piped in", "e.g. find pictures -name '*.jpg' | pixseq ... -")
    pick_split("-", (), wanted)  # before the paths are taken: stdin cannot be read again for another split
    data = sys.stdin.buffer.read()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    files = [os.fsdecode(line) for line in lines if line]
    if not files:
        raise PixseqError("no paths came on stdin", "e.g. find pictures -name '*.jpg' | pixseq ... -")
    return open_paths("-", files, wanted)


def list_folder(folder: str) -> Listing:
    """Hidden names are left out. A name that ends like a picture's counts as one; of the others the content decides."""
    pictures, folders, others = [], [], []
    with reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
                if (
                    entry.is_file() or entry.is_symlink()
                ):  # a broken link is reported when it is read; a pipe is not read
                    pictures.append(os.fsencode(entry.name))
            elif entry.is_file():
                others.append(entry.name)
    found = [name for name in others if kind_of(os.path.join(folder, name)) == "picture"]
    pictures += map(os.fsencode, found)
    return Listing(
        np.sort(np.array(pictures, dtype=bytes)),
        sorted(folders, key=os.fsencode),
        sorted(set(others) - set(found), key=os.fsencode),
    )


def _walk(folder: str, notes: list[str], others: list[str], above: tuple = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Every folder with pictures, from `folder` down: its own pictures first, then its folders in order.

    Adds to `notes` what was not followed, and to `others` the files that are no pictures.
    """
    with reading(folder):
        status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        notes.append(f"{shown(folder)} leads back into a folder it lies in and was not followed")
        return
    listing = list_folder(folder)
    if len(listing.pictures):
        yield folder, listing.pictures
    others += [os.path.join(folder, name) for name in listing.others]
    for name in listing.folders:
        yield from _walk(os.path.join(folder, name), notes, others, (*above, identity))


def _split_folders(root: str, top: Listing) -> dict[str, str]:
    """Split -> folder name, if the folders in `root` are splits; none if they are classes, one of them named train."""
    names = {SPLITS[name.lower()]: name for name in top.folders if name.lower() in SPLITS}
    if len(names) < sum(name.lower() in SPLITS for name in top.folders):
        raise PixseqError(f"{shown(root)} holds one split under two names: {shown(', '.join(top.folders))}", "keep one")
    rest = [name for name in top.folders if name.lower() not in SPLITS]
    with_pictures = [name for name in rest if names and next(_walk(os.path.join(root, name), [], []), None)]
    if not names or (len(names) == 1 and with_pictures):
        return {}
    if with_pictures:
        raise PixseqError(
            f"{shown(root)} holds splits ({', '.join(names.values())}) and other pictures ({shown(with_pictures[0])})",
            "move the others away, or name the folder that you mean",
        )
    return names


def _lone_wrapper(root: str, top: Listing) -> str | None:
    """The only folder in a folder without pictures, if it has just folders itself: caltech/101_ObjectCategories."""
    if len(top.pictures) or len(top.folders) != 1 or top.folders[0].lower() in SPLITS:
        return None
    inner = os.path.join(root, top.folders[0])
    listing = list_folder(inner)
    return inner if listing.folders and not len(listing.pictures) else None
