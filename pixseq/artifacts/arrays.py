"""Tokens, pixels and features on disk: zarr v3 stores with checksums, opened, checked and read (see store_writer.py).

zarr returns fill values for a missing chunk and does not notice a flipped byte under its default codec; hence the
checksum in the codec, the completeness check on opening, and fill values that no real array holds (pixels hold all).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from zarr.storage import LocalStore

from pixseq.artifacts import manifest
from pixseq.artifacts.codec import MOST_SIDE, Codec
from pixseq.artifacts.specs import PICTURE_SHAPES
from pixseq.artifacts.stored import DAMAGED, BoundedStore, check_array, check_folding
from pixseq.errors import PixseqError
from pixseq.numerics.whole import starts
from pixseq.text import word

BLOCK_BYTES = 16 << 20  # that are read back at once: zarr unfolds its chunks side by side
MOST_NAMED = 1000  # missing or damaged chunks: then no more are looked for
KINDS = {"tokens": ("uint16",), "pixels": ("uint8",), "features": ("float16", "float32")}


class Store:
    """An opened store. `meta` holds the group attributes beside the manifest; `rows` the number of rows."""

    def __init__(self, path: Path, record: manifest.Manifest, group: zarr.Group):
        self.path, self.manifest, self.group = path, record, group
        self.meta: dict[str, Any] = {key: value for key, value in group.attrs.items() if key != manifest.KEY}
        self.arrays = {name: array_of(group, name) for name in array_names(path)}
        self.names = sorted(self.arrays)

    @functools.cached_property
    def codec(self) -> Codec:
        """Of tokens and pixels: what they mean."""
        return Codec.read(self.meta)

    @property
    def kind(self) -> str:
        """The kind of artifact, which is the name of its main array too."""
        return self.manifest["kind"]

    def __len__(self) -> int:
        """Rows; features have their layers before them."""
        return self.shape(PICTURE_SHAPES if self.whole else self.kind)[1 if self.kind == "features" else 0]

    @property
    def whole(self) -> bool:
        """Whether it holds pictures of many sizes, see PICTURE_SHAPES."""
        return PICTURE_SHAPES in self.names

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """int64 [N + 1]: where each whole picture begins among all pixels, and where the last one ends."""
        shapes = self.read(PICTURE_SHAPES)
        if len(shapes) and not (shapes.min() >= 1 and shapes.max() <= MOST_SIDE):
            raise PixseqError(f"{self.path}: its pictures have sides of {shapes.min()} to {shapes.max()}", DAMAGED)
        begins = starts(shapes)
        if begins[-1] != self.shape(self.kind)[0]:
            raise PixseqError(
                f"{self.path} holds {self.shape(self.kind)[0]} pixels, its shapes declare {begins[-1]}", DAMAGED
            )
        return begins

    @functools.cached_property
    def one_size(self) -> tuple[int, int] | None:
        """The height and width of all its whole pictures, None where they differ. Raises PixseqError for odd ones."""
        if not self._starts[-1]:
            return None
        shapes = self.read(PICTURE_SHAPES)
        height, width = map(int, shapes[0])
        return (height, width) if (shapes == shapes[:1]).all() else None

    def whole_pictures(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels uint8 [P, 3] and the shapes [n, 2] of some rows: a slice of step 1, or numbers."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            pixels = self.read(self.kind, slice(self._starts[first], self._starts[last]))
            return pixels, self.read(PICTURE_SHAPES, slice(first, last))
        parts = [self.whole_pictures(slice(row, row + 1)) for row in rows]
        return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([shapes for _, shapes in parts])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.arrays[name].dtype

    def read(self, name: str, index: Any = slice(None)) -> np.ndarray:
        """A part of an array. Raises PixseqError when a chunk of it is damaged."""
        try:
            return np.asarray(self.arrays[name][index])
        except Exception as error:  # zarr and numcodecs raise many types for the same damage
            raise PixseqError(
                f"{self.path}: array {name} is damaged ({error})",
                f"`pixseq show {word(self.path)} --verify` names the chunk; make the store again",
            ) from error

    def labels(self) -> np.ndarray | None:
        return self.read("labels") if "labels" in self.names else None

    def images(self) -> np.ndarray | None:
        """Which image of the source each row shows, int [N]; None where every row is an image of its own."""
        return self.read("images") if "images" in self.names else None


def open_group(path: Path, mode: Literal["r", "r+"]) -> zarr.Group:
    """Raises PixseqError where it is damaged."""
    try:
        store = BoundedStore(path, read_only=mode == "r")
        store.chunk_bytes = {name: check_array(path, name) for name in array_names(path)}
        return zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)
    except Exception as error:  # damaged metadata comes as many types
        raise PixseqError(f"{path} does not open as a zarr store: {error}", DAMAGED) from error


def open_store(path: str | Path, *kinds: str) -> Store:
    """Open for reading. Raises PixseqError for another kind, or if a chunk file is missing (it is named)."""
    path = Path(path)
    store = opened(path, manifest.expect(path, *kinds))
    missing, real = [], 0
    for key in (key for name in store.names for key in _chunk_files(name, store.arrays[name])):
        if (path / key).is_file():
            real += (path / key).stat().st_size
        else:
            missing.append(key)
        if len(missing) == MOST_NAMED:  # a shape may declare any number
            break
    if missing:
        many = f"{len(missing)}{' or more' * (len(missing) == MOST_NAMED)} chunk{'s' * (len(missing) > 1)}"
        raise PixseqError(
            f"{path} lacks {many}, the first {missing[0]}",
            "files were lost after it was written: copy the store again, or make it again",
        )
    try:
        check_folding(sum(array.nbytes for array in store.arrays.values()), real)
    except ValueError as error:
        raise PixseqError(f"{path} does not open as a zarr store: {error}", DAMAGED) from None
    return store


def opened(path: Path, record: manifest.Manifest) -> Store:
    """For reading, whatever chunks are missing. Raises PixseqError for metadata that tells no store of its kind."""
    try:
        store = Store(path, record, open_group(path, mode="r"))
        if record["kind"] in store.names:  # the array that a kind is named after
            _check_arrays(store)
            return store
    except PixseqError:
        raise
    except Exception as error:  # damaged metadata comes as many types
        raise PixseqError(f"{path} does not open as a zarr store: {error}", "it is damaged: make it again") from error
    raise PixseqError(
        f"{path} has no array {record['kind']}", "files were lost: copy the store again, or make it again"
    )


def _check_arrays(store: Store) -> None:
    """Raises ValueError where the arrays do not go together, or their meaning is not told."""
    main, rows = store.shape(store.kind), len(store)
    if store.kind == "features":
        layers = store.meta.get("layers")
        fine = isinstance(layers, list) and len(layers) == main[0] and all(type(n) is int for n in layers)
        if not fine or len(main) not in (3, 4) or not isinstance(store.meta.get("class_names"), list | None):
            raise ValueError(f"its layers are {layers}, and its features have the shape {list(main)}")
    else:
        codec = store.codec
        wanted = (rows, math.prod(codec.grid)) if store.kind == "tokens" else (rows, *codec.grid)
        if codec.kind != store.kind or store.whole != codec.whole:
            raise ValueError(f"its scheme is {codec.scheme}, and it holds {', '.join(store.names)}")
        if main != ((main[0], 3) if store.whole else wanted):
            raise ValueError(f"its {store.kind} have the shape {list(main)}, and {list(wanted)} is told")
    beside: dict[str, tuple[int, ...]] = {"labels": (rows,), "images": (rows,), PICTURE_SHAPES: (rows, 2)}
    for name, side in beside.items():
        if name in store.names and (store.shape(name) != side or store.dtype(name).kind != "i"):
            raise ValueError(f"its {name} are {store.dtype(name)} {list(store.shape(name))} for {rows} rows")
    if store.dtype(store.kind) not in KINDS[store.kind]:
        raise ValueError(f"its {store.kind} are {store.dtype(store.kind)}")


def array_of(group: zarr.Group, name: str) -> zarr.Array:
    """An array of a group. Raises KeyError where there is none, TypeError where a group stands in its place."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        raise TypeError(f"{name} is no array")
    return found


def array_names(path: Path) -> list[str]:
    """The arrays of a group on disk. zarr's own listing warns of every other file beside them."""
    return sorted(found.parent.name for found in path.glob("*/zarr.json"))


def _chunk_files(name: str, array: zarr.Array) -> Iterator[str]:
    """The files of an array, by the path inside the store (zarr v3 default keys: name/c/i/j)."""
    for index in _indices([-(-n // chunk) for n, chunk in zip(array.shape, array.chunks)]):
        yield "/".join([name, "c", *map(str, index)])


def _indices(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All places of a grid in C order, one after another: itertools.product would hold the sides as lists first."""
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in _indices(grid[1:]):
            yield first, *rest


def verify(path: str | Path) -> list[str]:
    """Read every chunk and compare the content id. Returns the faults, each naming its file; none when all is well."""
    return faults(opened(Path(path), manifest.read(path)))


def faults(store: Store) -> list[str]:
    """What is missing or damaged of an opened store, MOST_NAMED at most."""
    arrays = ((name, store.arrays[name]) for name in store.names)
    found = list(islice((fault for each in arrays for fault in chunk_faults(store.path, *each)), MOST_NAMED))
    if not found and store_id(store.group, store.manifest["kind"], store.meta) != store.manifest["id"]:
        found.append(f"the content does not match its id {store.manifest['id']}")
    return found


def chunk_faults(path: Path, name: str, array: zarr.Array) -> Iterator[str]:
    """The chunks of an array of the store at `path` that are missing or damaged. Reads them all."""
    for key in _chunk_files(name, array):
        index = [int(i) for i in key.split("/")[2:]]
        if not (path / key).is_file():
            yield f"{key} is missing"
            continue
        try:
            array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks))]
        except Exception as error:
            yield f"{key} is damaged: {error}"


def store_id(group: zarr.Group, kind: str, meta: Mapping[str, Any]) -> str:
    """The content id of a store, read back chunk by chunk."""
    arrays = {name: array_of(group, name) for name in array_names(Path(cast(LocalStore, group.store).root))}
    contents = {name: manifest.Content(array.dtype, array.shape, _blocks(array)) for name, array in arrays.items()}
    return manifest.content_id(kind, contents, meta)


def _blocks(array: zarr.Array) -> Iterator[np.ndarray]:
    """C-order blocks of some chunks: the leading indices one by one, then runs of rows. One is read ahead."""
    axis = next((i for i, c in enumerate(array.chunks) if c > 1), array.ndim - 1)
    chunk_bytes = array.chunks[axis] * math.prod(array.shape[axis + 1 :]) * array.dtype.itemsize
    rows = array.chunks[axis] * max(BLOCK_BYTES // max(chunk_bytes, 1), 1)

    def read(place: tuple[int | slice, ...]) -> np.ndarray:
        return np.asarray(array[place])

    reading = ThreadPoolExecutor(1, "reading")
    ahead: Future[np.ndarray] | None = None
    try:
        for lead in _indices(array.shape[:axis]):
            for start in range(0, array.shape[axis], rows):
                upcoming = reading.submit(read, (*lead, slice(start, start + rows)))
                if ahead is not None:
                    yield ahead.result()
                ahead = upcoming
        if ahead is not None:
            yield ahead.result()
    finally:  # without waiting: a generator that is left ends where garbage is collected, in any thread
        reading.shutdown(wait=False, cancel_futures=True)
