"""MNIST-style idx files and STL-10's binary version: rows of bytes behind a short header, read block by block.

Nothing is memory-mapped: pages of a mapped file count as the process's memory, and memory is what a reader bounds.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from pixseq.bounded.files import open_regular, read_bytes
from pixseq.data.records import Pixels, Source, Wanted, pick_split, reading
from pixseq.data.split_names import canonical, split_of
from pixseq.errors import PixseqError
from pixseq.text import shown

BLOCK_BYTES = 8 << 20
MAX_IMAGE_BYTES = 1 << 28  # a header may claim anything
MAX_LABELS = 1 << 27
DEFLATE_MOST = 1032  # times: no byte of gzip or zip unfolds to more


def stream_rows(
    file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], count: int, to_end: bool
) -> Iterator[np.ndarray]:
    """`count` rows of `shape` from where `file` stands, in blocks [n, *shape] of a few MB.

    `to_end` says that nothing may follow; it makes gzip and zip compare their checksums. Raises EOFError, ValueError.
    """
    row_bytes = dtype.itemsize * math.prod(shape)
    if row_bytes > MAX_IMAGE_BYTES:
        raise ValueError(f"it declares images of {row_bytes} bytes")
    per_block = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, count, per_block):
        n = min(per_block, count - first)
        data = file.read(n * row_bytes)
        if len(data) < n * row_bytes:
            raise EOFError("it ends before its last image")
        yield np.frombuffer(data, dtype).reshape(n, *shape)
    if to_end and file.read(1):
        raise ValueError("it goes on after its last image")


def check_pixels(path: object, count: int, most: int) -> None:
    """Raises PixseqError for pictures of more pixels than are allowed: the bound that files of one picture have."""
    if count > most:
        raise PixseqError(
            f"{shown(path)} holds pictures of {count:,} pixels, more than the {most:,} allowed",
            "raise it with --max-pixels",
        )


def check_packed(info: zipfile.ZipInfo) -> None:
    """Raises ValueError for a member of a zip that cannot be what it declares, or is packed as arrays never are."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is packed by a method that numpy never writes")
    if info.file_size > DEFLATE_MOST * (info.compress_size + 64):
        raise ValueError(f"{info.filename} declares {info.file_size:,} bytes and has {info.compress_size:,}")


def labelled(blocks: Iterator[np.ndarray], labels: np.ndarray | None, start: int) -> Iterator[Pixels]:
    """Pairs blocks of images with their labels; the first image is number `start`."""
    for block in blocks:
        yield Pixels(block, None if labels is None else labels[start : start + len(block)])
        start += len(block)


# ------------------------------------------------------------------------------------------------------------ idx


def open_idx(path: Path, files: dict[str, list[Path]], wanted: Wanted) -> Source:
    """`files` holds idx files by kind: images, labels. A file and its .gz are the same one; the plain file is read."""
    images, labels = ({_stem(f): f for f in sorted(files[kind], key=_packed_first)} for kind in ("images", "labels"))
    splits: dict[str | None, list[str]] = {}
    for stem in images:
        splits.setdefault(split_of(stem), []).append(stem)
    asked = canonical(wanted.split)
    answers = [file for stem, file in labels.items() if split_of(stem) == asked]
    if not images or (answers and asked not in splits):
        held = (answers or list(labels.values()))[0]
        raise PixseqError(
            f"{shown(path)} is incomplete: it has {shown(held.name)}, but not the images of these labels",
            "copy or download them too",
        )
    split = pick_split(path, [name for name in splits if name], wanted.split)
    stems = splits[split if split in splits else None]
    if len(stems) > 1:
        raise PixseqError(
            f"{shown(path)} holds {len(stems)} sets of idx images: {shown(', '.join(sorted(stems)))}",
            "name the images file itself, or keep each set in its own folder",
        )
    file, label_file = images[stems[0]], labels.get(stems[0])
    with _open(file) as handle:
        count, height, width = _header(handle, file, axes=3)
    check_pixels(file, height * width, wanted.max_pixels)
    targets = None if label_file is None else _labels(label_file, file, count)
    # EMNIST keeps NIST's column-major order; MNIST and its other relatives store rows.
    transposed = file.name.lower().startswith("emnist")

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        end = count if stop is None else min(stop, count)
        with reading(file), _open(file) as handle:
            handle.seek(16 + start * height * width)
            blocks = stream_rows(handle, np.dtype("u1"), (height, width), end - start, to_end=end == count)
            yield from labelled((b.transpose(0, 2, 1) if transposed else b for b in blocks), targets, start)

    known = None if targets is None else lambda: targets
    beside = f"there is no labels file beside {shown(file.name)}"
    why = beside if label_file is None else shown(label_file.name)
    has_labels = targets is not None
    return Source(
        "mnist-idx", str(path), split, count, None, has_labels, read, labels=known, labels_from=why, files=[file]
    )


def idx_siblings(file: Path) -> dict[str, list[Path]]:
    """An images file named by itself, and the labels that lie beside it under the matching name."""
    beside = [f for f in file.parent.iterdir() if "labels" in f.name and f.is_file()]
    return {"images": [file], "labels": [f for f in beside if _stem(f) == _stem(file)]}


def _stem(file: Path) -> str:
    """What images and labels of one set share: train-images-idx3-ubyte.gz, train-labels.idx1-ubyte -> train--idx."""
    return re.sub(r"(images|labels)|[.-]idx[13].*$", "", file.name.lower())


def _packed_first(file: Path) -> tuple[bool, str]:
    return file.suffix != ".gz", file.name


def _open(file: Path) -> BinaryIO:
    with reading(file):
        handle = open_regular(file)
    packed = handle.read(2) == b"\x1f\x8b"
    handle.seek(0)
    if not packed:
        return handle
    unpacked = gzip.GzipFile(fileobj=handle)
    cast(Any, unpacked).myfileobj = handle  # closed with it
    return cast(BinaryIO, unpacked)


def _header(handle: BinaryIO, file: Path, axes: int) -> tuple[int, ...]:
    """The sizes in an idx header: two zero bytes, the type (8: uint8), the number of axes, big-endian int32 sizes."""
    with reading(file):
        head = handle.read(4 + 4 * axes)
        if head[:4] != bytes((0, 0, 8, axes)) or len(head) < 4 + 4 * axes:
            raise ValueError(f"no idx header of uint8 with {axes} axes")
        sizes = tuple(int(n) for n in np.frombuffer(head, ">i4", offset=4))
        if min(sizes) < 1:
            raise ValueError(f"it declares the sizes {sizes}")
        if isinstance(handle, gzip.GzipFile):  # a packed file's size shows only at its end, where its checksum is
            if math.prod(sizes) > DEFLATE_MOST * file.stat().st_size:
                raise ValueError(f"it declares {math.prod(sizes):,} bytes, more than so small a file can hold")
            return sizes
        expected, actual = len(head) + math.prod(sizes), os.fstat(handle.fileno()).st_size
        if actual != expected:
            raise ValueError(f"it has {actual} bytes, but its header promises {expected}")
    return sizes


def _labels(file: Path, images: Path, wanted: int) -> np.ndarray:
    """uint8 [N]. Raises PixseqError where there are not as many as images, before they are read."""
    with _open(file) as handle:
        (count,) = _header(handle, file, axes=1)
        if count != wanted:
            raise PixseqError(
                f"{shown(images)} has {wanted} images, but {shown(file.name)} has {count} labels",
                "the two belong to different sets: copy or download them again",
            )
        with reading(file):
            if count > MAX_LABELS:
                raise ValueError(f"it declares {count:,} labels")
            return np.concatenate(list(stream_rows(handle, np.dtype("u1"), (), count, to_end=True)))


# --------------------------------------------------------------------------------------------------------- STL-10

STL = re.compile(r"(train|test|unlabeled)_X\.bin")
MOST_STL, MOST_NAMES = 1 << 24, 1 << 16  # labels (the set has 13,000), and bytes of class names
STL_SHAPE = (3, 96, 96)  # planes; within a plane column after column


def open_stl10(path: Path, wanted: str) -> Source:
    """STL-10 binary: {train,test,unlabeled}_X.bin, {train,test}_y.bin (labels from 1), class_names.txt."""
    found = {match[1]: file for file in path.iterdir() if (match := STL.fullmatch(file.name))}
    split = pick_split(path, found, wanted)
    file, label_file = found[split], path / f"{split}_y.bin"
    with reading(file):
        count, rest = divmod(file.stat().st_size, math.prod(STL_SHAPE))
        if rest or not count:
            raise ValueError(f"its size is no multiple of an image's {math.prod(STL_SHAPE)} bytes")
    targets = None
    if label_file.is_file():
        with reading(label_file):
            targets = np.frombuffer(read_bytes(label_file, MOST_STL), np.uint8).astype(np.int32) - 1
        if len(targets) != count or targets.min() < 0:
            raise PixseqError(
                f"{shown(file)} has {count} images, but {label_file.name} has {len(targets)} labels from "
                f"{targets.min() + 1 if len(targets) else 'none'} on (they should begin at 1)",
                "copy or download them again",
            )
    names_file, names = path / "class_names.txt", None
    if targets is not None and names_file.is_file():
        with reading(names_file):
            names = [shown(name) for name in read_bytes(names_file, MOST_NAMES).decode().split()]

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        end = count if stop is None else min(stop, count)
        with reading(file), open_regular(file) as handle:
            handle.seek(start * math.prod(STL_SHAPE))
            blocks = stream_rows(handle, np.dtype("u1"), STL_SHAPE, end - start, to_end=end == count)
            yield from labelled((block.transpose(0, 3, 2, 1) for block in blocks), targets, start)

    known = None if targets is None else lambda: targets
    why = label_file.name if targets is not None else f"there is no {label_file.name}"
    has_labels = targets is not None
    return Source("stl10", str(path), split, count, names, has_labels, read, [], known, True, why, [file])
