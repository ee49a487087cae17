"""CIFAR-10 and CIFAR-100: python or binary version, a folder or the official .tar.gz, which is never extracted.

Every batch is read and checked on opening. Those of the split that is wanted are held until they are read for the first
time, at most the 155 MB of a split; from then on one is held at a time, or of an archive those before their turn.
https://www.cs.toronto.edu/~kriz/cifar.html gives both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from pixseq.bounded.files import read_bytes
from pixseq.bounded.tars import open_tar
from pixseq.data import unpickle
from pixseq.data.records import SPLITS, Pixels, Source, Wanted, pick_split, reading, spans
from pixseq.data.shards import incomplete
from pixseq.data.tree import debris_in
from pixseq.errors import PixseqError
from pixseq.text import few, shown

BATCH = re.compile(r"(?P<kind>data_batch_(?P<number>\d+)|test_batch|train|test)(?P<binary>\.bin)?")
NAMES = ("batches.meta", "meta", "batches.meta.txt", "fine_label_names.txt")
PLANES = 3 * 32 * 32  # bytes an image: red, green, blue, each 32 rows of 32
BATCHES = 5  # of CIFAR-10's training set
MAX_MEMBER_BYTES = 160 << 20  # the largest official file has 155 MB, and so have all of a split together


@dataclass(frozen=True)
class CifarBatch:
    images: np.ndarray  # uint8 [N, 32, 32, 3]
    labels: np.ndarray  # uint8 or int64 [N]; CIFAR-100: the fine ones
    classes: int  # 10 or 100


class _Found(NamedTuple):
    """What a folder or tar holds: by split the batches (number, file, labels), and those of the wanted split whole."""

    class_names: list[str] | None
    splits: dict[str, list[tuple[int, str, np.ndarray]]]
    classes: int
    held: dict[str, CifarBatch]


def open_cifar(path: Path, wanted: Wanted) -> Source:
    """A folder or tar that holds CIFAR's batches. Raises PixseqError for gaps, mixtures and damaged batches."""
    found = _read_all(path, SPLITS.get(wanted.split.lower()))
    split = pick_split(path, found.splits, wanted.split)
    numbers, names, targets = zip(*sorted(found.splits[split], key=lambda batch: batch[:2]))
    counts = [len(each) for each in targets]
    notes = _check_complete(path, dict(zip(numbers, names)), counts, wanted.skip)
    if found.class_names and len(found.class_names) != found.classes:
        raise PixseqError(f"{shown(path)} names {len(found.class_names)} classes, but its labels have {found.classes}")

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        rows = {names[part]: slice(low, high) for part, low, high in spans(counts, start, stop)}
        for name, batch in _in_order(path, list(rows), found.held):
            yield Pixels(batch.images[rows[name]], batch.labels[rows[name]])

    labels = np.concatenate(targets)
    return Source(
        f"cifar{found.classes}",
        str(path),
        split,
        sum(counts),
        found.class_names,
        True,
        read,
        notes,
        lambda: labels,
        labels_from="the batches",
        files=[path / name for name in names] if path.is_dir() else [path],
        shares=path.is_file(),
    )


def _read_all(path: Path, split: str | None) -> _Found:
    """Everything, once. The pictures of `split` are held, if they are no more than an official one has."""
    class_names, classes, binary = None, set(), set()
    splits: dict[str, list[tuple[int, str, np.ndarray]]] = {}
    held: dict[str, CifarBatch] = {}
    for name, data in _files(path):
        if name in NAMES:
            class_names = _class_names(f"{shown(path)}/{name}", name, data)
            continue
        match = BATCH.fullmatch(name)
        assert match is not None  # of all others `_files` has none
        batch = _parse(f"{shown(path)}/{name}", name, data)
        classes.add(batch.classes)
        binary.add(match["binary"])
        its = "test" if match["kind"].startswith("test") else "train"
        splits.setdefault(its, []).append((int(match["number"] or 1), name, batch.labels.copy()))
        if its == split and sum(each.images.nbytes for each in held.values()) + len(data) <= MAX_MEMBER_BYTES:
            held[name] = batch
    if len(classes) > 1 or len(binary) > 1:
        raise PixseqError(
            f"{shown(path)} mixes CIFAR-10 and CIFAR-100, or their python and binary versions",
            "give a folder that holds one of them",
        )
    if not splits:
        raise PixseqError(f"{shown(path)} holds no batches of CIFAR", "it is cut short: copy or download it again")
    return _Found(class_names, splits, classes.pop(), held)


def _in_order(path: Path, order: list[str], held: dict[str, CifarBatch]) -> Iterator[tuple[str, CifarBatch]]:
    """The batches of these names: those that are `held`, which are let go of, or read again where any is not."""
    if held.keys() >= set(order):
        for name in order:
            yield name, held.pop(name)
        return
    held.clear()
    order, early = order.copy(), {}
    for name, data in _files(path, order.copy()):  # in one pass: an archive has its own order, so some batches wait
        early[name] = data
        if sum(map(len, early.values())) > MAX_MEMBER_BYTES:
            raise PixseqError(
                f"{shown(path)} holds its batches in reverse, and they are larger than CIFAR's",
                "unpack it and name the folder",
            )
        while order and order[0] in early:
            name = order.pop(0)
            yield name, _parse(f"{shown(path)}/{name}", name, early.pop(name))
    if order:
        raise PixseqError(f"{shown(path)} has lost {order[0]} since it was opened")


def _check_complete(path: Path, batches: dict[int, str], counts: Collection[int], skip: bool) -> list[str]:
    """CIFAR-10's training set has five batches of one size: data_batch_1 to data_batch_5. Raises PixseqError."""
    name = next(iter(batches.values()))
    if not name.startswith("data_batch"):
        return []
    ending = ".bin" if name.endswith(".bin") else ""
    lacking = [f"data_batch_{n}{ending}" for n in range(1, max(BATCHES, *batches) + 1) if n not in batches]
    if lacking:
        return incomplete(f"{shown(path)} is incomplete: it lacks {few(lacking)}", skip)
    most = max(counts)
    short = [f"{name} ({count} images)" for name, count in zip(batches.values(), counts) if count < most]
    return incomplete(f"{shown(path)}: {few(short)} is cut short: the others have {most}", skip) if short else []


def is_archive(path: Path) -> bool:
    """Whether a tar holds CIFAR: told by the names of its first few members, content unread."""
    with reading(path), open_tar(path, "r|*") as tar:
        for _, member in zip(range(4), (m for m in tar if debris_in(m.name) is None)):
            name = member.name.rpartition("/")[2]
            if member.isfile() and (name in NAMES or BATCH.fullmatch(name)):
                return True
    return False


def _files(path: Path, only: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """The batches and class names in a folder or tar. A tar is streamed; a name is matched, never used as a path."""

    def wanted(name: str) -> bool:
        return name in only if only else name in NAMES or BATCH.fullmatch(name) is not None

    if path.is_dir():
        for file in sorted(path.iterdir()):
            if wanted(file.name) and file.is_file():
                with reading(file):
                    yield file.name, read_bytes(file, MAX_MEMBER_BYTES)
        return
    with reading(path), open_tar(path, "r|*") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if member.isfile() and wanted(name):
                if member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{name} declares {member.size} bytes")
                yield name, cast(IO[bytes], tar.extractfile(member)).read()


def _parse(place: str, name: str, data: bytes) -> CifarBatch:
    batch = _parse_binary(place, name, data) if name.endswith(".bin") else _parse_pickle(place, data)
    if batch.labels.min() < 0 or batch.labels.max() >= batch.classes:
        raise PixseqError(
            f"{place} has labels from {batch.labels.min()} to {batch.labels.max()}, but {batch.classes} classes"
        )
    return batch


def _parse_pickle(place: str, data: bytes) -> CifarBatch:
    content = unpickle.load(data, place)
    key = next((key for key in ("fine_labels", "labels") if key in content), None)
    if key is None or "data" not in content:
        raise PixseqError(f"{place} is no CIFAR batch: it holds {shown(sorted(content))}", "is it another pickle?")
    rows = content["data"]
    if not (isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == PLANES):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise PixseqError(f"{place}: data is {got}, but a CIFAR batch has uint8 [N, {PLANES}]")
    labels = content[key]
    if not all(isinstance(label, int) for label in labels) if isinstance(labels, list) else True:
        raise PixseqError(f"{place}: {key} is not a list of whole numbers")
    return _batch(place, rows, np.array(labels, dtype=np.int64), 100 if key == "fine_labels" else 10)


def _parse_binary(place: str, name: str, data: bytes) -> CifarBatch:
    classes = 10 if name.startswith(("data_batch", "test_batch")) else 100
    head = 1 if classes == 10 else 2  # the label; CIFAR-100: coarse label, fine label
    if not data or len(data) % (head + PLANES):
        raise PixseqError(
            f"{place} has {len(data)} bytes, no multiple of the {head + PLANES} of a CIFAR-{classes} record",
            "it is cut short, or not CIFAR: copy or download it again",
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, head + PLANES)
    return _batch(place, rows[:, head:], rows[:, head - 1], classes)


def _batch(place: str, rows: np.ndarray, labels: np.ndarray, classes: int) -> CifarBatch:
    if len(rows) != len(labels) or not len(rows):
        raise PixseqError(f"{place} has {len(rows)} images, but {len(labels)} labels", "copy or download it again")
    return CifarBatch(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, classes)


def _class_names(place: str, name: str, data: bytes) -> list[str]:
    if name.endswith(".txt"):
        return [shown(line) for line in data.decode("latin1").split("\n") if line.strip()]
    content = unpickle.load(data, place)
    names = content.get("fine_label_names", content.get("label_names"))
    if not isinstance(names, list):
        raise PixseqError(f"{place} names no classes: it holds {shown(sorted(content))}", "copy or download it again")
    return [shown(n.decode("latin1") if isinstance(n, bytes) else n) for n in names]
