"""Pictures that are palette ids already: .npy files, as OpenAI published its data for Image GPT.

{cifar10,imagenet}_{tr,va,te}{X,Y}.npy: X holds whole numbers [N, T], a row a picture in raster order, T = side * side;
Y its labels, one-hot [N, classes] or class numbers [N]. The colours of the ids are in another file, the palette.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixseq.data.arrays import Member, npy_member
from pixseq.data.picking import stretches
from pixseq.data.records import SPLITS, pick_split
from pixseq.errors import PixseqError
from pixseq.text import shown

NAME = re.compile(r"(.+)_(tr|va|te)([XY])\.npy")
NAMED_SPLITS = {"tr": "train", "va": "val", "te": "test"}
MAX_LABEL = np.iinfo(np.int32).max
MOST_IDS, MOST_CLASSES = 1 << 20, 1 << 15  # of a row: its ids, and its one-hot classes
LABELS_AT_ONCE = 4096  # rows: a one-hot one of ImageNet has 4 kB


@dataclass(frozen=True)
class TokenSource:
    """An opened file of ids: what `Source` is for pictures.

    `ids` is an array [N, T] of whole numbers; `labels` is [N], [N, 1] or [N, classes], None where there are none. The
    files name neither colours nor classes. Nothing but headers is read until a TokenReader is iterated.
    """

    split: str
    ids: Member
    labels: Member | None
    notes: list[str]
    name = "npy-ids"
    class_names = None
    shares = False
    shows = recipe = None

    @property
    def path(self) -> str:
        return str(self.ids.file)

    @property
    def files(self) -> list[Path]:
        return [self.ids.file]

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def side(self) -> int:
        return math.isqrt(self.ids.shape[1])

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    @property
    def labels_from(self) -> str:
        return "no file of labels lies beside it" if self.labels is None else shown(self.labels.file.name)

    def classes(self) -> np.ndarray | None:
        """The class of each row, int32 [N], in one pass over the labels; None without labels."""
        if self.labels is None:
            return None
        some, every = _picker(self.labels), np.arange(self.count)
        blocks = [every[low : low + LABELS_AT_ONCE] for low in range(0, self.count, LABELS_AT_ONCE)]
        return np.concatenate([_labels(self.labels, some(rows), rows) for rows in blocks])


@dataclass(frozen=True)
class TokenBatch:
    """tokens uint16 [n, T], labels int32 [n]; `stop` is the row to start from to go on after it."""

    tokens: np.ndarray
    labels: np.ndarray | None
    stop: int


# ------------------------------------------------------------------------------------------------------- recognising


def holds_ids(file: Path) -> bool:
    """Whether a .npy holds ids: by its type, which no pixels have, or by its name, with whole numbers inside.

    A damaged file of such a name counts too: its damage is told when it is opened.
    """
    named = NAME.fullmatch(file.name)
    if named and named[3] == "Y":
        return False
    try:
        member = npy_member(file)
    except PixseqError:
        return named is not None
    if named:
        return member.dtype.kind in "iu" and len(member.shape) == 2
    wide = member.dtype.kind in "iu" and member.dtype.itemsize >= (2 if member.dtype.kind == "i" else 4)
    return wide and len(member.shape) == 2 and member.shape[1] > 1 and _is_square(member.shape[1])


def ids_of_labels(file: Path) -> Path | None:
    """The file of ids whose labels `file` holds; None if it is no Y beside an X."""
    named = NAME.fullmatch(file.name)
    ids = file.with_name(f"{named[1]}_{named[2]}X.npy") if named and named[3] == "Y" else None
    return ids if ids and ids.is_file() and holds_ids(ids) else None


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


# ----------------------------------------------------------------------------------------------------------- opening


def open_ids(file: Path, wanted: str) -> TokenSource:
    """One file of ids. It is read for the default split whatever its name says; another than its own is an error."""
    named = NAME.fullmatch(file.name)
    if named is None:
        return _open(file, pick_split(file, (), wanted))
    own = NAMED_SPLITS[named[2]]
    if SPLITS.get(wanted.lower(), wanted) not in ("train", "all"):
        pick_split(file, (own,), wanted)
    return _open(file, own)


def open_set(path: Path, files: list[Path], wanted: str) -> TokenSource:
    """One split of the set whose files lie in a folder. Raises PixseqError where there are two sets."""
    sets: dict[Path, dict[str, Path]] = {}
    for file in files:
        named = NAME.fullmatch(file.name)
        assert named is not None  # so they were chosen
        sets.setdefault(file.with_name(named[1]), {})[NAMED_SPLITS[named[2]]] = file
    if len(sets) > 1:
        raise PixseqError(
            f"{shown(path)} holds {len(sets)} sets of palette ids: "
            + ", ".join(shown(name.relative_to(path)) for name in sorted(sets)),
            f"name the file itself, for example {shown(min(files))}",
        )
    (splits,) = sets.values()
    split = pick_split(path, splits, wanted)
    return _open(splits[split], split)


def _open(file: Path, split: str) -> TokenSource:
    ids = npy_member(file)
    if 0 in ids.shape:
        raise PixseqError(f"{ids} is empty: {list(ids.shape)}", "copy or download it again")
    if not _is_square(ids.shape[1]):
        raise PixseqError(f"{ids} has rows of {ids.shape[1]} ids, which is no square picture", "a row has side * side")
    if ids.shape[1] > MOST_IDS:
        raise PixseqError(f"{ids} has rows of {ids.shape[1]:,} ids, more than the {MOST_IDS:,} of any model")
    named = NAME.fullmatch(file.name)
    if named is None:
        note = f"{ids} holds {ids.dtype} {list(ids.shape)}: it is read as palette ids, not as pixels, and has no labels"
        return TokenSource(split, ids, None, [note])
    beside = file.with_name(f"{named[1]}_{named[2]}Y.npy")
    if not beside.is_file():
        return TokenSource(split, ids, None, [f"{ids} has no labels: there is no {shown(beside.name)} beside it"])
    labels = npy_member(beside)
    if len(labels.shape) == 2 and labels.shape[1] > MOST_CLASSES:
        raise PixseqError(f"{labels} has {labels.shape[1]:,} classes, more than {MOST_CLASSES:,}", "are these labels?")
    fitting = len(labels.shape) in (1, 2) and labels.shape[0] == ids.shape[0] and 0 not in labels.shape
    if labels.dtype.kind not in "iufb" or not fitting:
        raise PixseqError(
            f"{ids} has {ids.shape[0]} rows, but {labels} is {labels.dtype} {list(labels.shape)}",
            f"labels are one-hot [{ids.shape[0]}, classes] or class numbers [{ids.shape[0]}]: "
            "copy or download both again",
        )
    return TokenSource(split, ids, labels, [])


# ----------------------------------------------------------------------------------------------------------- reading


class TokenReader:
    """Streams rows [start, start + limit) of a TokenSource, checked: what images.Reader is for pictures.

    `rows` are the numbers of the rows that are wanted, ascending; None: all. Start and limit then count among them.
    Memory holds a batch (of a file in Fortran order: the file). `counts` says how many rows were read. Raises
    PixseqError for ids outside 0..n_vocab - 1 and for labels that are not clear.
    """

    def __init__(
        self,
        source: TokenSource,
        n_vocab: int,
        start: int = 0,
        limit: int | None = None,
        batch_size: int = 1024,
        rows: np.ndarray | None = None,
    ):
        self.source, self.n_vocab, self.start, self.batch_size = source, n_vocab, start, batch_size
        self.rows, count = rows, source.count if rows is None else len(rows)
        self.stop = count if limit is None else min(start + limit, count)
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []

    def __iter__(self) -> Generator[TokenBatch]:
        ids, labels = self.source.ids, self.source.labels
        some_ids, some_labels = _picker(ids), None if labels is None else _picker(labels)
        for low in range(self.start, self.stop, self.batch_size):
            high = min(low + self.batch_size, self.stop)
            rows = np.arange(low, high) if self.rows is None else self.rows[low:high]
            tokens = _tokens(ids, some_ids(rows), rows, self.n_vocab)
            numbers = None if labels is None or some_labels is None else _labels(labels, some_labels(rows), rows)
            self.counts = {"images": high - self.start}
            yield TokenBatch(tokens, numbers, high)


def _picker(member: Member) -> Callable[[np.ndarray], np.ndarray]:
    """Ascending numbers -> these rows of an array. Memory holds them and a block of the file."""
    if member.fortran:  # whichever rows are asked for, the whole file is read: once is enough
        whole = member.load()
        return lambda rows: whole[rows]

    def some(rows: np.ndarray) -> np.ndarray:
        found = []
        for part in stretches(rows):
            first, last = int(part[0]), int(part[-1])
            for block in member.rows(first, last + 1):
                wanted = part[slice(*np.searchsorted(part, [first, first + len(block)]))]
                found.append(block[wanted - first])
                first += len(block)
        return np.concatenate(found)

    return some


def _tokens(member: Member, ids: np.ndarray, rows: np.ndarray, n_vocab: int) -> np.ndarray:
    """Ids of any integer type [n, T] -> uint16; `rows` [n] are their numbers."""
    if int(ids.min()) < 0 or int(ids.max()) >= n_vocab:
        wrong = (ids < 0) | (ids >= n_vocab)
        row = int(wrong.any(axis=1).argmax())
        raise PixseqError(
            f"{member}: row {rows[row]} holds the id {ids[row][wrong[row]][0]}, but ids go from 0 to {n_vocab - 1}",
            "take the palette that the ids were made with; without one, ids are below 65535",
        )
    return ids.astype(np.uint16)


def _labels(member: Member, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One-hot [n, classes], or class numbers [n] or [n, 1], of any type -> int32 [n]; `rows` [n] are their numbers."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        numbers, wanted = labels.argmax(axis=1), "one-hot"
        clear = (np.count_nonzero(labels, axis=1) == 1) & (labels.max(axis=1) == 1)
    else:
        numbers, wanted = labels.reshape(len(labels)).astype(np.float64), "a class number"
        clear = (numbers >= 0) & (numbers <= MAX_LABEL) & (numbers == np.floor(numbers))
    if not clear.all():
        raise PixseqError(
            f"{member}: row {rows[(~clear).argmax()]} is not {wanted}",
            "mend the labels, or move the file away to encode without them",
        )
    return numbers.astype(np.int32)
