"""What is told of a source: its identity in manifests, and one line about its labels or its bits."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.data.decode import narrow_bits
from pixseq.data.records import ImageFile, Source, reading
from pixseq.data.token_files import TokenSource
from pixseq.numerics.parts import choose_rows
from pixseq.text import few

COUNTED_LABELS = 65_536  # larger numbers are not told apart where classes are counted
SAMPLED = 64  # files whose content tells sources apart
SMALL = 1 << 18  # bytes: such a file is read whole for it
BLOCK, MOST_BLOCKS = 4096, 1024  # bytes, and how many blocks are read of all larger ones together
Sizes = dict[str, tuple[np.ndarray, np.ndarray]]  # by folder: names of files (bytes) and their sizes


def source_line(source: Source | TokenSource, taken: int | None = None) -> str:
    """What is said of a source before it is read: its split and its pictures, of which only some may be `taken`."""
    count = (
        "pictures, counted as they are read,"
        if source.count is None
        else f"{source.count:,} picture{'s' * (source.count != 1)}"
    )
    split = "no splits" if source.split == "all" else f"split {source.split}"
    part = "" if taken in (None, source.count) else f", {taken:,} taken"
    return f"source: {count} of {source.path} ({split}){part}"


def labels_line(source: Source | TokenSource, classes: int, more: bool = False) -> str:
    """What is said of the labels of a source, whatever they are."""
    if not source.has_labels:
        return f"no labels: {source.labels_from}"
    names = f" ({few(source.class_names)})" if source.class_names else ""
    return f"labels: {'at least ' * more}{classes} class{'es' * (classes != 1)}{names}, from {source.labels_from}"


def say_skipped(problems: Sequence[str], count: int, source: Source | TokenSource) -> None:
    """Name the first pictures that were passed over, and say how many all were."""
    for problem in problems:
        progress.say(f"skipped {problem}")
    if problems:
        progress.warn(f"{count:,} of the pictures of {source.path} could not be read and were passed over")


def say_narrow(counts: dict[str, int]) -> bool:
    """Say it where 16-bit pictures leave upper bits unused, since they come out dark; whether there was anything to say
    or to hear.
    """
    if not counts.get("sixteen_bit"):
        return False
    bits = narrow_bits(counts)
    if bits is not None:
        progress.warn(
            f"the 16-bit pictures stay below {1 << bits:,} and come out dark: if they have {bits} bits, "
            f"--bit-depth {bits} scales them right"
        )
    return True


def describe(source: Source | TokenSource) -> dict[str, Any]:
    """How a manifest names a source: its path, and ids of what is read, wherever it lies and however it is named.

    `id` is cheap: over the names and sizes of all pictures (below the folder that holds them all) and some bytes of a
    spread of them; of files that hold many pictures, over sizes and some bytes. `listing` is the id that was recorded
    before there was that one, for comparing with older stores; see `is_same`. Of pictures that are made, not found,
    `recipe` says how, and is in the id.
    """
    digest, told = hashlib.sha256(), {}
    listing, sizes = _listing(source.path)
    if source.recipe:
        digest.update(json.dumps(source.recipe, sort_keys=True).encode())
        told = {"recipe": source.recipe}
    if source.files:
        _add_files(digest, source.files)
    elif isinstance(source, Source) and source.name in ("folder", "paths"):
        _add_pictures(digest, source, sizes)
    if source.shares:
        digest.update(f"split {source.split}".encode())
    many = source.count or "stream"
    id = f"{source.name}:{many}:{digest.hexdigest()[:16]}"
    return {"path": source.path, "id": id, "listing": f"{source.name}:{source.split}:{many}:{listing}", **told}


def files_of(source: Source | TokenSource) -> list[Path]:
    """What is read, so far as it is not a file a picture; that of the labels, which may lie beside, among it."""
    beside = [Path(source.path).parent / source.labels_from] if source.labels_from else []
    return [*source.files, *beside]


def is_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two manifests name one source and split: by what both of them recorded."""
    if "listing" in a and "listing" in b:
        return a["id"] == b["id"]
    return a.get("listing", a["id"]) == b.get("listing", b["id"])


def _add_files(digest: hashlib._Hash, files: Sequence[Path]) -> None:
    looked_at = set(choose_rows(len(files), SAMPLED).tolist())
    for i, file in enumerate(files):
        digest.update(f"{file.stat().st_size}\n".encode())
        if i in looked_at:
            digest.update(_some_bytes(file, MOST_BLOCKS // len(looked_at)))


def _add_pictures(digest: hashlib._Hash, source: Source, sizes: Sizes) -> None:
    """Of a source of one file a picture: what is not among `sizes` is asked for."""
    assert source.count is not None
    above = os.path.commonpath({*map(os.path.abspath, {os.path.dirname(file) for file in _picture_files(source)})})
    looked_at = set(choose_rows(source.count, SAMPLED).tolist())
    here, inside, known = None, "", dict[bytes, int]()
    for i, file in enumerate(_picture_files(source)):
        folder, name = os.path.split(file)
        if folder != here:
            here, inside = folder, os.path.join(os.path.abspath(folder), "")[len(above) :].lstrip(os.sep)
            known = dict(zip(*(each.tolist() for each in sizes.get(folder, ()))))
        size = known.get(os.fsencode(name))
        size = _size(file) if size is None else size
        digest.update(os.fsencode(f"{inside}{name} {size}\n"))
        if size and i in looked_at:
            digest.update(_some_bytes(file, MOST_BLOCKS // len(looked_at)))


def _picture_files(source: Source) -> Iterator[str]:
    """The paths of the files of such a source, in order."""
    for item in source.read(0, None):
        assert isinstance(item, ImageFile) and isinstance(item.data, str)
        yield item.data


def _size(file: str) -> int:
    """Of what is no file or cannot be reached 0: that is told when it is read."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _some_bytes(path: str | Path, blocks: int) -> bytes:
    """All of a small file; of a larger one so many blocks, its first and its last and those spread between."""
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= SMALL:
            return file.read(SMALL)
        found = []
        for i in range(blocks):
            file.seek(i * (size - BLOCK) // (blocks - 1))
            found.append(file.read(BLOCK))
        return b"".join(found)


def _listing(path: str) -> tuple[str, Sizes]:
    """Names and sizes of all files below a folder, and these sizes; the size and the first bytes of a file."""
    listing, sizes = hashlib.sha256(), Sizes()
    if os.path.isdir(path):
        for folder, folders, names in os.walk(path):
            folders.sort()
            names.sort()
            found = [_size(os.path.join(folder, name)) for name in names]
            inside = os.path.join(os.path.relpath(folder, path), "").removeprefix("./")
            listing.update(os.fsencode("".join(f"{inside}{name} {size}\n" for name, size in zip(names, found))))
            sizes[folder] = np.array([os.fsencode(name) for name in names], bytes), np.array(found, np.int64)
    elif os.path.isfile(path):
        with open(path, "rb") as opened:
            listing.update(f"{os.path.getsize(path)}\n".encode() + opened.read(1 << 20))
    return listing.hexdigest()[:16], sizes
