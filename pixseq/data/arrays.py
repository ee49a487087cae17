"""Pictures in .npy and .npz files: uint8 (uint16 is scaled), [N, H, W], [N, H, W, 1 or 3], [N, 1 or 3, H, W] or rows.

Files are streamed, never loaded whole or mapped: a header says shape and type, blocks of rows follow.
Keys in an .npz are told by their words: images, x, data ... and labels, y ...; x_train and test_images carry a split.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pixseq.data.binary import labelled, stream_rows
from pixseq.data.records import SPLITS, Pixels, Source, parts, pick_split, reading, shards_of_split, shown
from pixseq.errors import PixseqError

IMAGE_KEYS = {"images", "image", "imgs", "x", "data", "arr_0"}
LABEL_KEYS = {"labels", "label", "y", "targets", "target", "arr_1"}
CLASS_NAME_KEYS = {"class_names", "label_names"}


@dataclass(frozen=True)
class Member:
    """One array in a file, known by its header: `key` is None for a whole .npy, `offset` is where its bytes begin."""

    file: Path
    key: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    def __str__(self) -> str:
        return shown(self.file) if self.key is None else f"{shown(self.file)}[{shown(self.key)}]"

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with reading(self), contextlib.ExitStack() as stack:
            if self.key is None:
                yield stack.enter_context(open(self.file, "rb"))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self.file))
                yield stack.enter_context(archive.open(f"{self.key}.npy"))

    def load(self) -> np.ndarray:
        with self.open() as handle:
            return np.lib.format.read_array(handle, allow_pickle=False)

    def rows(self, low: int, high: int) -> Iterator[np.ndarray]:
        if self.fortran:  # the bytes of one image are then scattered over the file: there is no way but to hold it
            yield self.load()[low:high]
            return
        with self.open() as handle:
            handle.seek(self.offset + low * math.prod(self.shape[1:]) * self.dtype.itemsize)
            yield from stream_rows(handle, self.dtype, self.shape[1:], high - low, to_end=high == self.shape[0])


@dataclass(frozen=True)
class Part:
    """The images of one split in one file: `arrange` makes their rows uint8 [n, H, W] or [n, H, W, 3]."""

    images: Member
    arrange: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray | None
    class_names: list[str] | None


def open_arrays(path: Path, wanted: str, files: list[Path]) -> Source:
    """One .npy, one .npz, or the .npz shards of a folder (as Downsampled ImageNet comes)."""
    if path.is_dir():
        split, files = shards_of_split(path, files, wanted)
        found = [_parts(file) for file in files]
        if any(list(each) != [None] for each in found):
            raise PixseqError(f"{shown(path)}: its .npz files hold splits of their own", "name one of the files")
        chosen = [each[None] for each in found]
    else:
        each = _parts(path)
        split = pick_split(path, [name for name in each if name], wanted)
        chosen = [each[split if split in each else None]]

    counts = [part.images.shape[0] for part in chosen]
    if len({part.labels is None for part in chosen}) > 1:
        raise PixseqError(f"{shown(path)}: some of its files have labels, others have none", "name files of one kind")
    labels = None if chosen[0].labels is None else np.concatenate([part.labels for part in chosen])
    if labels is not None and len(chosen[0].images.shape) == 2 and (labels.min(), labels.max()) == (1, 1000):
        labels = labels - 1  # Downsampled ImageNet counts its 1,000 classes from 1

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        for which, low, high in parts(counts, start, stop):
            part, first = chosen[which], sum(counts[:which]) + low
            yield from labelled((part.arrange(rows) for rows in part.images.rows(low, high)), labels, first)

    name = "npy" if chosen[0].images.key is None else "npz"
    wide = chosen[0].images.dtype.itemsize == 2
    notes = [f"{shown(path)}: its 16-bit pixels are scaled to 8 bits (x / 257)"] if wide else []
    seeks = all(part.images.key is None and not part.images.fortran for part in chosen)
    known = None if labels is None else lambda: labels
    class_names = chosen[0].class_names
    return Source(name, str(path), split, sum(counts), class_names, labels is not None, read, notes, known, seeks)


def _parts(file: Path) -> dict[str | None, Part]:
    """The images of a file by the split their keys carry, None where they carry none."""
    members = _members(file)
    if None in members:
        return {None: Part(members[None], _arrangement(members[None]), None, None)}
    images: dict[str | None, Member] = {}
    labels: dict[str | None, Member] = {}
    class_names = None
    for key, member in members.items():
        words = [word for word in re.split(r"[^a-z0-9]+", key.lower()) if word]
        split = next((SPLITS[word] for word in words if word in SPLITS), None)
        role = "_".join(word for word in words if word not in SPLITS)
        if role in CLASS_NAME_KEYS and member.dtype.kind == "U" and len(member.shape) == 1:
            class_names = [shown(name) for name in member.load()]
        for keys, found in ((IMAGE_KEYS, images), (LABEL_KEYS, labels)):
            if role in keys and split in found:
                raise PixseqError(f"{found[split]} and {member} could both be meant", "leave one of them in the file")
            if role in keys:
                found[split] = member
    if not images or (None in images and len(images) > 1):
        raise PixseqError(
            f"{shown(file)} does not say which array holds the images: it has {shown(', '.join(members)) or 'none'}",
            "name it images, x or data (and its labels: labels or y); add _train and _test if it has splits",
        )
    return {
        split: Part(member, _arrangement(member), _labels(member, labels.get(split)), class_names)
        for split, member in images.items()
    }


def npy_member(file: Path) -> Member:
    """The array of an .npy, from its header alone. Raises PixseqError where the file's size contradicts it."""
    with reading(file), open(file, "rb") as handle:
        return _header(handle, file, None, file.stat().st_size)


def _members(file: Path) -> dict[str | None, Member]:
    """The arrays of a file by key, from their headers alone."""
    with reading(file), open(file, "rb") as handle:
        if handle.read(2) != b"PK":
            return {None: npy_member(file)}
        members: dict[str | None, Member] = {}
        with zipfile.ZipFile(handle) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as inside:
                        key = info.filename.removesuffix(".npy")
                        members[key] = _header(inside, file, key, info.file_size)
        return members


def _header(handle: BinaryIO, file: Path, key: str | None, size: int) -> Member:
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(handle)
    if min(shape, default=0) < 0:
        raise ValueError(f"{key or 'it'} has the shape {list(shape)}")
    promised = handle.tell() + math.prod(shape) * dtype.itemsize
    if promised != size and not dtype.hasobject:
        raise ValueError(f"{key or 'it'} has {size} bytes, but its header promises {promised}")
    return Member(file, key, shape, dtype, fortran, handle.tell())


def _labels(images: Member, labels: Member | None) -> np.ndarray | None:
    """Labels [N]; [N, 1] is accepted, as MedMNIST and Keras write it."""
    if labels is None:
        return None
    count = images.shape[0]
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise PixseqError(
            f"{images} has {count} images, but {labels} is {labels.dtype} {list(labels.shape)}",
            f"labels are whole numbers, one an image: [{count}]",
        )
    return labels.load().reshape(-1)


def _arrangement(member: Member) -> Callable[[np.ndarray], np.ndarray]:
    """How rows of this array become uint8 [n, H, W] or [n, H, W, 3]. Raises PixseqError where that is not clear."""
    if member.dtype not in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2")):
        raise PixseqError(
            f"{member} holds {member.dtype}, but pixels are uint8 (or uint16, which is scaled)",
            "nothing says which float is white, and objects are never loaded: save it as uint8, "
            "for 0..1 by (x * 255).round().astype('uint8')",
        )
    shape = member.shape[1:]
    if 0 in member.shape or not member.shape:
        raise PixseqError(f"{member} is empty: {list(member.shape)}")
    to_pixels = _reorder(shape)
    if to_pixels is None:
        raise PixseqError(
            f"{member} has the shape {list(member.shape)}, which is no stack of pictures",
            "[N, H, W], [N, H, W, 3] or [N, 3, H, W] is; so are rows of H*H greys or of 3 planes of H*H",
        )
    if member.dtype.itemsize == 1:
        return to_pixels
    if next(member.rows(0, min(member.shape[0], 16))).max() < 256:
        raise PixseqError(f"{member} is uint16, but its first pictures stay below 256", "save it as uint8")
    return lambda rows: to_pixels(((rows.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _reorder(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray] | None:
    if len(shape) == 1:  # flattened squares: three planes (as CIFAR and Downsampled ImageNet), or grey
        side = math.isqrt(shape[0] // 3)
        if 3 * side * side == shape[0]:
            return lambda rows: rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        side = math.isqrt(shape[0])
        return (lambda rows: rows.reshape(-1, side, side)) if side * side == shape[0] > 1 else None
    if len(shape) == 2:
        return None if shape[-1] in (1, 3, 4) else (lambda rows: rows)  # [H, W, 3] is one picture, not a stack
    if len(shape) != 3 or (shape[0] in (1, 3)) == (shape[-1] in (1, 3)):
        return None
    if shape[-1] in (1, 3):
        return (lambda rows: rows) if shape[-1] == 3 else (lambda rows: rows[..., 0])
    return (lambda rows: rows.transpose(0, 2, 3, 1)) if shape[0] == 3 else (lambda rows: rows[:, 0])
