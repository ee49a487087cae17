"""Arrays of other programs as zarr stores them, of version 2 or 3: opened by the rules that hold for our own stores."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import LocalStore

from pixseq.artifacts import manifest
from pixseq.artifacts.filters import MOST_BYTES, check_codecs
from pixseq.artifacts.store_writer import UNFINISHED
from pixseq.artifacts.stored import MOST_CHUNK, check_folding
from pixseq.bounded.files import open_regular
from pixseq.bounded.structure import read_object
from pixseq.bounded.unfolding import PACKINGS, unfolded_size
from pixseq.errors import PixseqError

FREE = 1 << 27  # bytes that an array may declare beside 4,096 times its files
SLACK = 1 << 16  # bytes of headers and of filters that write more than they get
CHECKSUM, PLACE = 4, 16  # bytes of crc32c, and of a chunk's place in a shard: where it begins, and how long it is
SUMS = ("crc32c",)
AGAIN = "write the array again, with blosc, zstd or gzip and without filters"


class Chunks(NamedTuple):
    """What a file of an array holds: one chunk, or the `inner` chunks of a shard, each of `most` bytes unfolded."""

    packing: str | None
    sums: int  # checksums behind what is packed
    most: int
    inner: int  # 0: no shard


class ForeignStore(LocalStore):
    """A folder with one array whose chunks are handed on only where they unfold to what it declares, at most."""

    chunks: Chunks | None = None

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        name = key.rpartition("/")[2]
        if self.chunks is not None and name != "zarr.json" and not name.startswith("."):
            _check_file(Path(self.root) / key, self.chunks)
        return await super().get(key, prototype, byte_range)


def open_foreign(path: str | Path) -> zarr.Array | None:
    """The array that another program wrote at `path`, alone or as the only one of its group.

    None where there is no zarr, or one of ours. Raises PixseqError where it does not open, holds several arrays, or
    declares more than its files hold.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        return None
    check_codecs(path)
    try:
        found = zarr.open(path, mode="r")
        ours = {manifest.KEY, UNFINISHED} & found.attrs.asdict().keys()
        arrays = [found] if isinstance(found, zarr.Array) else [array for _, array in found.arrays()]
    except Exception as error:  # as in Store.read
        raise PixseqError(f"{path} does not open as a zarr array: {error}", "it is damaged: make it again") from error
    if ours:
        return None
    if len(arrays) != 1:
        names = ", ".join(sorted(array.basename for array in arrays)) or "none"
        raise PixseqError(f"{path} is a group of {len(arrays)} arrays ({names})", "give the path of one array")
    folder = path / arrays[0].path
    try:
        store = ForeignStore(folder, read_only=True)
        store.chunks = _chunks(folder, arrays[0])
        check_folding(arrays[0].nbytes, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), FREE)
        return zarr.open_array(store, mode="r")
    except Exception as error:  # as above
        raise PixseqError(f"{folder} does not open as a zarr array: {error}", AGAIN) from None


def _chunks(folder: Path, array: zarr.Array) -> Chunks:
    """How the files of an array are to be read. Raises ValueError for ways whose size cannot be told before."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    size = math.prod(array.chunks) * array.dtype.itemsize
    if min(array.chunks, default=1) < 1 or size > MOST_CHUNK:
        raise ValueError(f"its chunks {list(array.chunks)} have {size:,} bytes, {MOST_CHUNK:,} are the most")
    if (folder / ".zarray").is_file():
        found = read_object(folder / ".zarray", AGAIN, MOST_BYTES)
        packer, filters = found.get("compressor"), found.get("filters") or ()
        return _packed([_name(each) for each in (*filters, *([packer] if packer else []))], size, 0)
    codecs = read_object(folder / "zarr.json", AGAIN, MOST_BYTES)["codecs"]
    if [_name(each) for each in codecs] != ["sharding_indexed"]:
        return _packed([_name(each) for each in codecs], size, 0)
    shard = codecs[0]["configuration"]
    index = [_name(each) for each in shard["index_codecs"]], shard.get("index_location", "end")
    if index != (["bytes", "crc32c"], "end"):
        raise ValueError("its shards have an index of another form than zarr writes")
    assert array.shards is not None  # of an array with that codec
    if math.prod(array.shards) * array.dtype.itemsize > MOST_CHUNK:
        raise ValueError(f"its shards have {list(array.shards)} numbers, too many")
    return _packed([_name(each) for each in shard["codecs"]], size, math.prod(array.shards) // math.prod(array.chunks))


def _name(codec: Any) -> str:
    return str(codec.get("id", codec.get("name"))).removeprefix("numcodecs.")


def _packed(names: list[str], size: int, inner: int) -> Chunks:
    """`names` are the codecs in the order of writing: one packing at the end, and checksums."""
    sums = 0
    while names and names[-1] in SUMS:
        names, sums = names[:-1], sums + 1
    packing = names.pop() if names and names[-1] in PACKINGS else None
    inside = [name for name in names if name in PACKINGS or name == "sharding_indexed"]
    if inside:
        raise ValueError(f"it is packed by {', '.join(inside)} within other codecs")
    wide = 8 if {"packbits", "astype", "fixedscaleoffset", "quantize", "delta"} & {*names} else 1
    return Chunks(packing, sums, size * wide + SLACK, inner)


def _check_file(file: Path, chunks: Chunks) -> None:
    """Raises ValueError for a file of which a chunk is more than the array declares."""
    if not file.is_file():
        return  # a chunk that is not stored
    most = (chunks.most + PLACE) * max(chunks.inner, 1) + SLACK
    with open_regular(file) as opened:
        data = opened.read(min(os.fstat(opened.fileno()).st_size, most) + 1)  # which takes room for so much first
    if len(data) > most:
        raise ValueError(f"{file.name} has more than the {most:,} bytes of a chunk")
    for part in _inner(data, chunks.inner) if chunks.inner else (data,):
        part = part[: len(part) - CHECKSUM * chunks.sums] if chunks.sums else part
        made = len(part) if chunks.packing is None else unfolded_size(chunks.packing, part, chunks.most)
        if made > chunks.most:
            raise ValueError(f"{file.name} unfolds to {made:,} bytes, and a chunk has {chunks.most - SLACK:,}")


def _inner(data: bytes, count: int) -> list[bytes]:
    """The chunks of a shard, by the index at its end."""
    index = data[-(PLACE * count + CHECKSUM) : -CHECKSUM]
    if len(index) != PLACE * count:
        raise ValueError("a shard is cut short")
    places = np.frombuffer(index, "<u8").reshape(count, 2).tolist()
    return [data[start : start + length] for start, length in places if start != 2**64 - 1]
