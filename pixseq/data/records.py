"""What a source of images is: what it knows in advance, its split, and a stream of pictures in a fixed order."""

from __future__ import annotations

import contextlib
import itertools
import lzma
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pixseq.errors import PixseqError
from pixseq.text import shown

# What splits are called in the wild, and what pixseq calls them.
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "val", "valid": "val", "validation": "val",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip

# What the libraries underneath raise for a file cut short, flipped or made up.
DAMAGE = (
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    IndexError,  # zipfile on a member without a name
    MemoryError,
    SyntaxError,  # these two: numpy on the header of an array
    tokenize.TokenError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


MAX_PIXELS = 64_000_000  # of a picture, unless more are allowed


@dataclass(frozen=True)
class Wanted:
    """What the user asks of a source.

    label_column  the column (parquet) or key (.npz, .json members) that holds the labels; NO_LABELS: none are read.
    bit_depth     how many bits of 16-bit values are used; None: all 16.
    max_pixels    of a picture in an array; those in files are measured when they are decoded.
    skip          of an incomplete set what is there is read, and pictures without a label are passed over.
    """

    split: str = "train"
    label_column: str | None = None
    bit_depth: int | None = None
    skip: bool = False
    max_pixels: int = MAX_PIXELS

    @property
    def labels(self) -> bool:
        return self.label_column != NO_LABELS


NO_LABELS = "none"  # instead of a column's name


@dataclass(frozen=True)
class Pixels:
    """A block of n pictures of one size, decoded: images uint8 [n, H, W] (grey) or [n, H, W, 3]; labels int [n]."""

    images: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class ImageFile:
    """One picture still in its file format: its bytes, or the path of its file. `name` is for messages."""

    name: str
    data: bytes | str
    label: int | None = None


@dataclass(frozen=True)
class Source:
    """An opened source. Nothing is decoded until `read(start, stop)` is iterated: images [start, stop), in order.

    `name` is the recognised format; `split` the split really read, "all" where the source has none; `count` the images
    in it, None when only a pass over the stream can tell; `notes` what the user should hear (an empty class folder).
    `labels` tells the class of every image [count] without reading the pictures, by any numbers; None where only a pass
    can. `seeks`: reading from the middle costs no more than what is read.
    `labels_from` says where the labels come from, or why there are none. `files` are those that are read, where they
    are not one a picture; `shares` says that they hold other splits too.
    `shows` tells which original each picture [count] shows, where several show one: they count as views of one image.
    `recipe`: how pictures that are made, not found, were made; manifests record it.
    """

    name: str
    path: str
    split: str
    count: int | None
    class_names: list[str] | None
    has_labels: bool
    read: Callable[[int, int | None], Iterator[Pixels | ImageFile]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    labels: Callable[[], np.ndarray] | None = field(default=None, repr=False)
    seeks: bool = False
    labels_from: str = ""
    files: Sequence[Path] = ()
    shares: bool = False
    shows: Callable[[], np.ndarray] | None = field(default=None, repr=False)
    recipe: dict[str, int] | None = None


class NoSuchSplit(PixseqError):
    """The source is sound and has other splits, or none."""


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns whatever an unreadable or damaged file raises into one PixseqError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # gzip and Pillow use a bare OSError for bad content
            raise PixseqError(f"{shown(path)} is damaged: {error}", "copy or download it again") from error
        raise PixseqError(f"{shown(path)} cannot be read: {error.strerror}", "check the path and its rights") from error
    except DAMAGE as error:
        why = str(error) or type(error).__name__
        raise PixseqError(f"{shown(path)} is damaged: {shown(why)}", "copy or download it again") from error


def pick_split(path: object, available: Collection[str], wanted: str) -> str:
    """The split to read. A source without splits (`available` empty) is read whole for the default, train.

    Raises NoSuchSplit.
    """
    name = SPLITS.get(wanted.lower(), wanted)
    if name in available:
        return name
    if available:
        raise NoSuchSplit(
            f"{shown(path)} has the split{'s' * (len(available) > 1)} {', '.join(sorted(available))}, not {wanted}",
            "choose one that it has with --split",
        )
    if name in ("train", "all"):
        return "all"
    raise NoSuchSplit(
        f"{shown(path)} has no splits, but split {wanted} was asked for", "leave --split out to read all of it"
    )


def spans(counts: Sequence[int], start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
    """Where images [start, stop) lie in consecutive parts of `counts` images: (part, from, to within the part)."""
    for part, (end, count) in enumerate(zip(itertools.accumulate(counts), counts)):
        low, high = max(start - (end - count), 0), min(count if stop is None else stop - (end - count), count)
        if low < high:
            yield part, low, high
