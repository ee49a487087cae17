"""Folders and the pictures in them, on a disk or in an archive, in one order and by one rule of what is passed over.

Order is by the bytes of the names, folder by folder, so that it depends on neither locale nor file system. Links are
followed, except back into a folder they lie in. Names are held (some 30 bytes a picture); pictures are not opened here.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pixseq.bounded.files import read_bytes
from pixseq.data.records import reading
from pixseq.data.sniff import PICTURE_SUFFIXES, TEXT_SUFFIXES, kind_of
from pixseq.errors import PixseqError
from pixseq.text import shown

# What systems leave beside pictures: network stores, macOS archives, trash, restore points.
LEFT_BY_SYSTEMS = re.compile(
    r"@(eadir|tmp|recycle|recently-snapshot|sharebin|sharesnap|syno.*)|.*@syno\w+|synophoto_\w+\.\w+"
    r"|#(recycle|snapshot)|\$recycle\.bin|recycle[rd]|system volume information|lost\+found"
    r"|__macosx|network trash folder|temporary items|icon\r|__pycache__"
    r"|e?h?thumbs\w*\.db|desktop\.ini",
    re.IGNORECASE,
)
THUMBNAILS = re.compile(r"_*(thumb(nail)?s|thumbnail)_*", re.IGNORECASE)
MOST_TEXT, MOST_LINES = 1 << 24, 1 << 20  # of a list of splits or classes: bytes, and lines
MAX_PARTS = 100  # of a path in an archive


def is_debris(name: str) -> bool:
    """Whether a name, one part of a path, is no picture or class that a user put there: hidden (AppleDouble's ._x
    too), left by a system, or thumbnails. The one rule for folders and archives.
    """
    hidden = name.startswith(".") and name not in (".", "..")
    return hidden or is_left_by_system(name) or THUMBNAILS.fullmatch(name) is not None


def is_left_by_system(name: str) -> bool:
    return name.startswith("._") or LEFT_BY_SYSTEMS.fullmatch(name) is not None


def debris_in(path: str) -> str | None:
    """The path down to its first part that is debris; None where no part is."""
    parts = path.split("/")
    return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if is_debris(part)), None)


def debris_note(path: object, debris: Collection[str]) -> list[str]:
    if not debris:
        return []
    many = f"{len(debris)} name{'s' * (len(debris) > 1)}"
    return [f"{shown(path)}: passed over {many} (hidden, thumbnails or left by a system), such as {shown(min(debris))}"]


@dataclass(frozen=True)
class Listing:
    """What one folder holds directly: pictures (bytes, sorted), folders (sorted), other files, and debris."""

    pictures: np.ndarray
    folders: list[str]
    others: list[str]
    debris: list[str]

    @property
    def unclear(self) -> list[str]:
        """Of the others those that may be anything: no text that is called like a picture beside it."""
        if not self.others:
            return []
        stems = {os.path.splitext(os.fsdecode(name))[0] for name in self.pictures.tolist()}
        split = ((name, *os.path.splitext(name)) for name in self.others)
        return [name for name, stem, ending in split if stem not in stems or ending.lower() not in TEXT_SUFFIXES]


def list_folder(folder: str) -> Listing:
    """A name that ends like a picture's counts as one; of the others the content decides."""
    pictures, folders, others, debris = [], [], [], []
    with reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if is_debris(entry.name):
                debris.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
            elif _ends_like_a_picture(entry.name):
                # A broken link is reported when it is read; a pipe is not read.
                if entry.is_file() or entry.is_symlink():
                    pictures.append(os.fsencode(entry.name))
            elif entry.is_file():
                others.append(entry.name)
    unclear = [name for name in others if os.path.splitext(name)[1].lower() not in TEXT_SUFFIXES]
    found = [name for name in unclear if kind_of(os.path.join(folder, name)) == "picture"]
    pictures += map(os.fsencode, found)
    return _listing(pictures, folders, set(others) - set(found), debris)


def _listing(
    pictures: list[bytes], folders: Collection[str], others: Collection[str], debris: Collection[str]
) -> Listing:
    named = np.sort(np.array(pictures, dtype=bytes))
    return Listing(named, *(sorted(names, key=os.fsencode) for names in (folders, others, debris)))


def _ends_like_a_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _plain(name: str) -> str:
    """A name in an archive as a path without detours."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


class Tree(ABC):
    """Listings by folder, each made once; `debris` gathers what was passed over in those that were asked for.

    `listings`: those that were made before. `before`: what a user has to do before a folder in it can be named.
    """

    before = ""

    def __init__(self, listings: dict[str, Listing] | None = None) -> None:
        self.debris: set[str] = set()
        self.listings = {} if listings is None else listings

    def listing(self, folder: str) -> Listing:
        if folder not in self.listings:
            self.listings[folder] = self._list(folder)
        found = self.listings[folder]
        self.debris.update(os.path.join(folder, name) for name in found.debris)
        return found

    def folders(self, folder: str) -> list[str]:
        """The folders in it that hold pictures, at whatever depth."""
        return [name for name in self.listing(folder).folders if self.holds_pictures(os.path.join(folder, name))]

    def holds_pictures(self, folder: str) -> bool:
        return next(self.walk(folder, [], []), None) is not None

    def holds_files(self, folder: str) -> bool:
        """Whether any file lies in it, at whatever depth."""
        others: list[str] = []
        return next(self.walk(folder, [], others), None) is not None or bool(others)

    def walk(
        self, folder: str, notes: list[str], others: list[str], above: tuple = ()
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every folder with pictures, from `folder` down: its own pictures first, then its folders in order.

        Adds to `notes` what was not followed, and to `others` the files that are no pictures.
        """
        identity = self._identity(folder)
        if identity in above:
            notes.append(f"{shown(folder)} leads back into a folder it lies in and was not followed")
            return
        listing = self.listing(folder)
        if len(listing.pictures):
            yield folder, listing.pictures
        others += [os.path.join(folder, name) for name in listing.others]
        for name in listing.folders:
            yield from self.walk(os.path.join(folder, name), notes, others, (*above, identity))

    def called(self, folder: str) -> str:
        """A folder in messages."""
        return shown(folder)

    @abstractmethod
    def text(self, folder: str, name: str) -> str | None:
        """A file of text in a folder, if it is there."""

    @abstractmethod
    def _list(self, folder: str) -> Listing:
        """What a folder holds, looked at anew."""

    @abstractmethod
    def _identity(self, folder: str) -> object:
        """What is equal for two names of one folder."""


class DiskTree(Tree):
    def holds_pictures(self, folder: str) -> bool:
        """Found without listing the folder whole where its first picture shows, and without what it passes over."""
        if folder in self.listings:
            if len(self.listings[folder].pictures):
                return True
        else:
            with reading(folder), os.scandir(folder) as entries:
                if any(_ends_like_a_picture(e.name) and not is_debris(e.name) and e.is_file() for e in entries):
                    return True
        return super().holds_pictures(folder)

    def text(self, folder: str, name: str) -> str | None:
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            return None
        with reading(file):
            text = read_bytes(file, MOST_TEXT).decode("utf-8-sig")
        if text.count("\n") > MOST_LINES:
            raise PixseqError(f"{shown(file)} has more than the {MOST_LINES:,} lines that are read", "is it that list?")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _list(self, folder: str) -> Listing:
        return list_folder(folder)

    def _identity(self, folder: str) -> object:
        with reading(folder):
            status = os.stat(folder)
        return status.st_dev, status.st_ino


class ArchiveTree(Tree):
    """The files of an archive by their names, which are never used as paths. Pictures are told by their suffixes.

    `members` maps a folder and a picture's name, as `walk` gives them, to the name in the archive; `path` is for
    messages.
    """

    before = "unpack it and "

    def __init__(self, names: Iterable[str], path: object):
        super().__init__()
        self._path = path
        self.members: dict[tuple[str, bytes], str] = {}
        self._files: dict[str, tuple[list[bytes], set[str], set[str]]] = {"": ([], set(), set())}
        for name in names:
            self._add(name)

    def _add(self, name: str) -> None:
        path = _plain(name)
        if (debris := debris_in(path)) is not None:
            self.debris.add(debris)
            return
        folder, _, base = path.rpartition("/")
        if path.count("/") > MAX_PARTS:
            raise ValueError(f"it holds a path of {path.count('/')} folders")
        self._folder(folder)
        if not _ends_like_a_picture(base):
            self._files[folder][2].add(base)
        elif (folder, os.fsencode(base)) not in self.members:
            self._files[folder][0].append(os.fsencode(base))
            self.members[folder, os.fsencode(base)] = name

    def _folder(self, folder: str) -> None:
        parts = folder.split("/")
        for i, part in enumerate(parts):
            here = "/".join(parts[: i + 1])
            if here not in self._files:
                self._files[here] = ([], set(), set())
                self._files["/".join(parts[:i])][1].add(part)

    def called(self, folder: str) -> str:
        return shown(f"{self._path}: {folder}" if folder else self._path)

    def text(self, folder: str, name: str) -> str | None:
        if folder in self._files and name in self._files[folder][2]:
            raise PixseqError(
                f"{shown(self._path)} holds {shown(os.path.join(folder, name))}, which says what is train and test or "
                "which class a picture has",
                "unpack it and name its folder, so that this list is read",
            )
        return None

    def _list(self, folder: str) -> Listing:
        pictures, folders, others = self._files[folder]
        return _listing(pictures, folders, others, ())

    def _identity(self, folder: str) -> object:
        return folder
