"""What is told of a source: its identity in manifests, and one line about its labels or its bits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def say_skipped(problems: Sequence[str], source: Source | TokenSource) -> None:
    """Name each picture that was passed over, and how many they were."""
    for problem in problems:
        progress.say(f"skipped {problem}")
    if problems:
        progress.warn(f"{len(problems)} of the pictures of {source.path} could not be read and were passed over")


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
    if source.recipe:
        digest.update(json.dumps(source.recipe, sort_keys=True).encode())
        told = {"recipe": source.recipe}
    if source.files:
        _add_files(digest, source.files)
    elif isinstance(source, Source) and source.name in ("folder", "paths"):
        _add_pictures(digest, source)
    if source.shares:
        digest.update(f"split {source.split}".encode())
    many = source.count or "stream"
    id = f"{source.name}:{many}:{digest.hexdigest()[:16]}"
    listing = f"{source.name}:{source.split}:{many}:{_listing(source.path)}"
    return {"path": source.path, "id": id, "listing": listing, **told}


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


def _add_pictures(digest: hashlib._Hash, source: Source) -> None:
    """Of a source of one file a picture."""
    assert source.count is not None
    above = os.path.commonpath({os.path.dirname(file) for file in _picture_files(source)})
    looked_at = set(choose_rows(source.count, SAMPLED).tolist())
    for i, name in enumerate(_picture_files(source)):
        file = Path(name)
        size = file.stat().st_size if file.is_file() else 0  # what cannot be read is told when it is
        digest.update(os.fsencode(file.relative_to(above)) + f" {size}\n".encode())
        if size and i in looked_at:
            digest.update(_some_bytes(file, MOST_BLOCKS // len(looked_at)))


def _picture_files(source: Source) -> Iterator[str]:
    """The absolute paths of the files of such a source, in order."""
    for item in source.read(0, None):
        assert isinstance(item, ImageFile) and isinstance(item.data, str)
        yield os.path.abspath(item.data)


def _some_bytes(path: Path, blocks: int) -> bytes:
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


def _listing(name: str) -> str:
    """Names and sizes of all files below a folder; the size and the first bytes of a file."""
    listing = hashlib.sha256()
    path = Path(name)
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                size = file.stat().st_size if file.exists() else 0
                listing.update(os.fsencode(file.relative_to(path)) + f" {size}\n".encode())
    elif path.is_file():
        with path.open("rb") as opened:
            listing.update(f"{path.stat().st_size}\n".encode() + opened.read(1 << 20))
    return listing.hexdigest()[:16]
