"""Writes TensorFlow's V2 checkpoints, and damages them below their checksums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import google_crc32c
import numpy as np

MAGIC = 0xDB4775248B80FB57
NUMBERS = {"f4": 1, "f8": 2, "i4": 3, "u1": 4, "i2": 5, "i1": 6, "i8": 9, "b1": 10, "u2": 17, "f2": 19, "u4": 22}


class Raw:
    """A tensor whose type numpy lacks, by TensorFlow's number: `data` are its bytes."""

    def __init__(self, dtype: int, shape: tuple[int, ...], data: bytes):
        self.dtype, self.shape, self.data = dtype, shape, data


def write_bundle(
    prefix: Path,
    arrays: Mapping[str, np.ndarray | Raw],
    shards: int = 1,
    block_bytes: int = 600,
    header: bytes | None = None,
    change: Callable[[str, bytes], bytes] = lambda name, message: message,
    damage: Callable[[bytes], bytes] = lambda block: block,
    compression: int = 0,
) -> Path:
    """PREFIX.index and its shards; a tensor goes to shard (its number) % shards. Returns `prefix`.

    `change` alters the message of one entry, `damage` every block before its checksum is made.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rows = {b"": field(1, shards) + field(3, field(1, 1)) if header is None else header}
    files = [bytearray() for _ in range(shards)]
    for number, name in enumerate(sorted(arrays, key=str.encode)):
        entry, data = describe(arrays[name], number % shards, len(files[number % shards]))
        files[number % shards] += data
        rows[name.encode()] = change(name, entry)
    for number, data in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{shards:05d}").write_bytes(data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(rows, block_bytes, damage, compression))
    return prefix


def describe(array: np.ndarray | Raw, shard: int, offset: int) -> tuple[bytes, bytes]:
    """The message of an entry, and the bytes it tells of."""
    if isinstance(array, Raw):
        dtype, data = array.dtype, array.data
    else:
        dtype, data = NUMBERS[array.dtype.str[1:]], array.astype(array.dtype.newbyteorder("<")).tobytes()
    shape = b"".join(field(2, field(1, dim)) for dim in array.shape)
    message = field(1, dtype) + field(2, shape) + field(3, shard) + field(4, offset) + field(5, len(data))
    return message + varint(6 << 3 | 5) + masked_crc(data), data


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer; zero is the default and goes without saying."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return (((crc >> 15) + (crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def table(
    rows: Mapping[bytes, bytes],
    block_bytes: int,
    damage: Callable[[bytes], bytes] = lambda block: block,
    compression: int = 0,
) -> bytes:
    """Sorted rows as blocks of about `block_bytes`, the block of their handles, and the footer."""
    out = bytearray()

    def append(block: bytes) -> bytes:
        """Returns the handle."""
        block = damage(block)
        handle = varint(len(out)) + varint(len(block))
        sealed = block + bytes([compression])
        out.extend(sealed + masked_crc(sealed))
        return handle

    handles, some = {}, {}
    for key in sorted(rows):
        some[key] = rows[key]
        if sum(len(k) + len(v) for k, v in some.items()) >= block_bytes:
            handles[key] = append(pack(some, 16))
            some = {}
    if some:
        handles[max(some) + b"\xff"] = append(pack(some, 16))  # any key from the last on and below the next will do
    extras = append(pack({}, 16))
    footer = extras + append(pack(handles, 1))
    return bytes(out) + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def pack(rows: Mapping[bytes, bytes], restart_every: int) -> bytes:
    """One block: of each key only what differs from the last one, except at every `restart_every`th."""
    out, starts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(rows.items()):
        shared = 0
        if number % restart_every == 0:
            starts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    starts = starts or [0]
    return bytes(out) + b"".join(start.to_bytes(4, "little") for start in [*starts, len(starts)])
