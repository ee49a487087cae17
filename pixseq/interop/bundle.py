"""Variables out of TensorFlow's V2 checkpoints ("tensor bundles"), without TensorFlow.

PREFIX.index is a sorted table of (name, entry): a footer points at a block of handles, these at blocks of pairs whose
names leave out what they share with the one before; every block carries a checksum. An entry says where a tensor lies
in PREFIX.data-00000-of-00032 and its kin, raw and little-endian. Whatever these files say, only PixseqError comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from pixseq.bounded.files import check_holes, open_regular, read_bytes
from pixseq.errors import PixseqError
from pixseq.text import few

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES, TRAILER_BYTES = 48, 5
MAX_INDEX_BYTES = 1 << 22  # a thousand variables take 50 kB; names may unfold to no more than this either
MAX_RANK = 32
BFLOAT16 = 14
DTYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    9: "<i8",
    10: "?",
    BFLOAT16: "<u2",  # numpy has no bfloat16: the upper half of a float32
    17: "<u2",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
COPY_AGAIN = "copy the checkpoint again (the .index and every .data file), or save it again"
NAME_IT = "name it by its prefix, as model.ckpt-1000000"


@dataclass(frozen=True)
class Entry:
    """What the index says of one variable. `dtype` is TensorFlow's number for it, `crc` the masked checksum."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    partitioned: bool  # stored in slices, under other keys


@dataclass(frozen=True)
class Bundle:
    """An opened checkpoint: its variables by name, in sorted order."""

    prefix: Path
    entries: dict[str, Entry]
    n_shards: int

    @property
    def index(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.index")

    def shard(self, number: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{number:05d}-of-{self.n_shards:05d}")

    def read(self, name: str) -> np.ndarray:
        """One variable: float16 and bfloat16 as float32, all else as stored. Only its own bytes are read.

        Raises PixseqError for an unknown name, a type that is no number, a partitioned variable and damaged data.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise PixseqError(f"{self.prefix} has no variable {name}", f"it has: {few(list(self.entries))}")
        if entry.partitioned:
            raise PixseqError(
                f"{name} in {self.index} is partitioned: stored in slices, which are not read",
                "save the checkpoint again from TensorFlow without a partitioner",
            )
        if entry.dtype not in DTYPES:
            raise PixseqError(
                f"{name} in {self.index} has a type that is not read: TensorFlow's {entry.dtype}",
                "save the checkpoint again with whole or floating-point numbers",
            )
        dtype, path = np.dtype(DTYPES[entry.dtype]), self.shard(entry.shard)
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise PixseqError(
                f"{self.index} is damaged: {name} of shape {list(entry.shape)} takes {entry.size} bytes", COPY_AGAIN
            )
        try:
            values = np.fromfile(path, dtype, math.prod(entry.shape), offset=entry.offset)
            if values.nbytes != entry.size:
                raise ValueError(f"it ends inside {name}")
            if masked_crc(values) != entry.crc:
                raise ValueError(f"{name} does not match its checksum")
            values = values.reshape(entry.shape)
        except (OSError, ValueError, OverflowError) as error:
            raise PixseqError(f"{path} is damaged: {error}", COPY_AGAIN) from None
        if entry.dtype == BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        if dtype.itemsize == 2 and dtype.kind == "f":
            return values.astype(np.float32)
        return values.astype(dtype.newbyteorder("="), copy=False)


def open_bundle(path: str | Path) -> Bundle:
    """Read the index of the checkpoint that `path` names: its prefix, one of its files, or its folder.

    Raises PixseqError if there is none or several, if the index is damaged, compressed or big-endian, and if a shard
    is missing or too short.
    """
    prefix = find_prefix(Path(path))
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        rows = table(read_bytes(index, MAX_INDEX_BYTES))
        key, first = next(rows, (None, b""))
        if key != b"":
            raise ValueError("it has no header")
        header = message(first)
        if number(header, 2):
            raise PixseqError(f"{index} is big-endian, which is not read", "save it again on a little-endian machine")
        n_shards = number(header, 1)
        # keys that begin with a zero byte are the slices of partitioned variables
        entries = {variable_name(key): read_entry(value, n_shards) for key, value in rows if key[0]}
    except (OSError, ValueError) as error:
        raise PixseqError(f"{index} cannot be read: {error}", COPY_AGAIN) from None
    bundle = Bundle(prefix, entries, n_shards)
    check_shards(bundle)
    return bundle


def find_prefix(path: Path) -> Path:
    """The prefix that a prefix, a file of a checkpoint, or a folder with one checkpoint names."""
    if path.is_dir():
        there = sorted(p.name.removesuffix(".index") for p in path.glob("*.index"))
        if len(there) == 1:
            return path / there[0]
        newest = _newest(path / "checkpoint")
        if newest in there:
            return path / newest
        if not there:
            raise PixseqError(f"{path} holds no TensorFlow checkpoint: no .index file is in it", NAME_IT)
        names = few([str(path / name) for name in there], 10)
        raise PixseqError(f"{path} holds {len(there)} checkpoints", f"name one of them: {names}")
    if path.with_name(f"{path.name}.index").is_file():
        return path
    prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        there = sorted(p.name.removesuffix(".index") for p in path.parent.glob("*.index"))
        hint = f"there are: {few([str(path.parent / name) for name in there], 10)}" if there else NAME_IT
        raise PixseqError(f"{prefix}.index is not there, so {prefix} is no TensorFlow checkpoint in V2 format", hint)
    return prefix


def _newest(path: Path) -> str | None:
    """The name that a `checkpoint` file gives; the folders before it may be another machine's."""
    try:
        with path.open("rb") as file:
            text = file.read(1 << 16).decode(errors="replace")
    except OSError:
        return None
    found = re.search(r'^model_checkpoint_path:\s*"([^"\n]*)"', text, re.MULTILINE)
    return found[1].rpartition("/")[2] if found else None


def check_shards(bundle: Bundle) -> None:
    """Before anything is read: every file that the index names is there and reaches as far as it says."""
    whole = {name: entry for name, entry in bundle.entries.items() if not entry.partitioned}
    paths = {number: bundle.shard(number) for number in sorted({entry.shard for entry in whole.values()})}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        lost = f"{len(missing)} of {bundle.n_shards} shards: {few(missing)}"
        raise PixseqError(f"{bundle.prefix} lacks {lost}", COPY_AGAIN)
    sizes = {number: path.stat().st_size for number, path in paths.items()}
    for path in paths.values():
        try:
            with open_regular(path) as file:
                check_holes(file)
        except (OSError, ValueError) as error:
            raise PixseqError(f"{path} cannot be read: {error}", COPY_AGAIN) from None
    for name, entry in whole.items():
        if entry.offset + entry.size > sizes[entry.shard]:
            raise PixseqError(
                f"{paths[entry.shard]} is truncated: it has {sizes[entry.shard]} bytes, and {name} ends at byte "
                f"{entry.offset + entry.size}",
                COPY_AGAIN,
            )


def masked_crc(*pieces: bytes | np.ndarray) -> int:
    """crc32c of the bytes of all `pieces` in a row, as these files store it: rotated and shifted, because a checksum
    of data that holds plain checksums would be weak.
    """
    crc = 0
    for piece in pieces:
        crc = google_crc32c.extend(crc, piece)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------------- the table; everything raises ValueError


class Cursor:
    """Reads forward through bytes and never past their end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, n: int) -> bytes:
        if n > self.left():
            raise ValueError("it is damaged: something in it ends too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        """Seven bits a byte, the lowest first; the highest bit says that more follow."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("it is damaged: a number in it has no end")


def table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs, keys strictly increasing: so no block can be named twice."""
    if len(data) < FOOTER_BYTES:
        raise ValueError("it is truncated: it has no footer")
    footer = Cursor(data[-FOOTER_BYTES:-8])
    if int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("it is truncated, or no index of a TensorFlow checkpoint: its last bytes are not the mark")
    footer.varint(), footer.varint()  # the handle of a block of extras, which TensorFlow leaves empty
    last, unfolded = None, 0
    for _, handle in pairs(block(data, footer)):
        for key, value in pairs(block(data, Cursor(handle))):
            unfolded += len(key)
            if (last is not None and key <= last) or unfolded > MAX_INDEX_BYTES:
                raise ValueError("it is damaged: its names are out of order or too long")
            last = key
            yield key, value


def block(data: bytes, handle: Cursor) -> bytes:
    """The block at a handle (offset, size), its checksum compared."""
    offset, size = handle.varint(), handle.varint()
    if offset + size + TRAILER_BYTES > len(data):
        raise ValueError("it is truncated: a block lies past its end")
    content, trailer = data[offset : offset + size], data[offset + size : offset + size + TRAILER_BYTES]
    if masked_crc(content, trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("it is damaged: a block does not match its checksum")
    if trailer[0]:
        kind = "with snappy" if trailer[0] == 1 else f"in way {trailer[0]}"
        raise ValueError(f"its blocks are compressed {kind}, which TensorFlow does not do for checkpoints")
    return content


def pairs(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of one block; behind them stand the positions where a reader may start, and their count."""
    starts = int.from_bytes(content[-4:], "little")
    if 4 * (starts + 1) > len(content):
        raise ValueError("it is damaged: a block is shorter than its list of starts")
    cursor, key = Cursor(content[: len(content) - 4 * (starts + 1)]), b""
    while cursor.left():
        shared, rest, size = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key):
            raise ValueError("it is damaged: a name shares more than there is")
        key = key[:shared] + cursor.take(rest)
        yield key, cursor.take(size)


# ------------------------------------------------------------------------------------------ the protocol buffers


def message(data: bytes) -> dict[int, list[int | bytes]]:
    """The fields of one message by number: numbers as int, everything with a length as bytes."""
    found: dict[int, list[int | bytes]] = {}
    cursor = Cursor(data)
    while cursor.left():
        tag = cursor.varint()
        value: int | bytes
        match tag & 7:
            case 0:
                value = cursor.varint()
            case 1:
                value = int.from_bytes(cursor.take(8), "little")
            case 2:
                value = cursor.take(cursor.varint())
            case 5:
                value = int.from_bytes(cursor.take(4), "little")
            case wire:
                raise ValueError(f"it is damaged: a field of wire type {wire}")
        found.setdefault(tag >> 3, []).append(value)
    return found


def number(fields: dict[int, list[int | bytes]], key: int) -> int:
    """0 where the field is absent, as the format has it. Negative numbers come out as huge ones."""
    value = fields.get(key, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("it is damaged: a text where a number belongs")
    return value


def parts(fields: dict[int, list[int | bytes]], key: int) -> list[bytes]:
    values = fields.get(key, [])
    found = [value for value in values if isinstance(value, bytes)]
    if len(found) < len(values):
        raise ValueError("it is damaged: a number where a message belongs")
    return found


def variable_name(key: bytes) -> str:
    """Names go into messages: nothing that is no text may reach a terminal."""
    name = key.decode(errors="replace")
    if "\ufffd" in name or not name.isprintable():
        raise ValueError(f"it is damaged: a name in it is {key[:100]!r}")
    return name


def read_entry(data: bytes, n_shards: int) -> Entry:
    """The message of one variable."""
    fields = message(data)
    dims = [dim for shape in parts(fields, 2) for dim in parts(message(shape), 2)]
    if len(dims) > MAX_RANK or number(fields, 3) >= n_shards:
        raise ValueError("it is damaged: an entry has no possible shape or shard")
    shape = tuple(number(message(dim), 1) for dim in dims)
    dtype, shard, offset, size, crc = (number(fields, key) for key in (1, 3, 4, 5, 6))
    return Entry(dtype, shape, shard, offset, size, crc, partitioned=7 in fields)
