"""Tokens, pixels and features on disk: zarr v3 stores with checksums, written in whole chunks, checked on opening.

zarr returns fill values for a missing chunk and does not notice a flipped byte under its default codec; hence the
checksum in the codec, the completeness check on opening, and fill values that no real array holds (pixels hold all).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from zarr.storage import LocalStore

from pixseq.artifacts import atomic, layout, manifest
from pixseq.artifacts.codec import MOST_SIDE, Codec
from pixseq.artifacts.specs import PICTURE_SHAPES, Spec, fill_value
from pixseq.artifacts.stored import DAMAGED, BoundedStore, check_array, check_folding
from pixseq.errors import PixseqError
from pixseq.numerics.whole import starts

UNFINISHED = "pixseq_unfinished"
MOST_CHUNKS = 1 << 21  # of an array that is cut back to what is whole: zarr lists them all
BLOCK_BYTES = 16 << 20  # that are read back at once: zarr unfolds its chunks side by side
MOST_NAMED = 1000  # missing or damaged chunks: then no more are looked for
KINDS = {"tokens": ("uint16",), "pixels": ("uint8",), "features": ("float16", "float32")}


class StoreWriter:
    """Appends rows in order to NAME.partial, in whole chunks; memory holds what fills no chunk yet.

    `rows` is how many are safely written. With them is saved where the caller stood after the first `covered` of these:
    its `state`. With `resume` it goes on from there, and rows that are written already are passed over when they come
    again. On resume, a partial of another recipe raises PixseqError, or with `restart` is begun anew; of one that is
    whole and only lacks its name, `finished` is the manifest, and there is nothing to write.
    """

    def __init__(
        self,
        partial: Path,
        specs: Mapping[str, Spec],
        recipe: Mapping[str, Any],
        chunk_rows: int,
        resume: bool = False,
        restart: bool = False,
    ):
        self.path, self.specs, self.chunk_rows = partial, dict(specs), chunk_rows
        self.recipe = json.loads(manifest.canonical_json(recipe))
        self.buffer: dict[str, list[np.ndarray]] = {name: [] for name in specs}
        self.buffered, self.restart = 0, restart
        self.ahead: list[tuple[int, dict[str, Any]]] = []  # rows and state after each append that is not all written
        self.finished: manifest.Manifest | None = None
        partial.mkdir(exist_ok=True)
        if not (resume and self._reopen()):
            layout.delete(partial, keep=True)
            self._create()
        self.given = self.covered if self.finished is None else 0  # rows that the caller gave, written ones too

    def _create(self) -> None:
        from zarr.codecs import ZstdCodec

        self.rows, self.covered = 0, 0
        self.state: dict[str, Any] = {}
        self.group = zarr.create_group(self.path, zarr_format=3)
        for name, spec in self.specs.items():
            self.group.create_array(
                name,
                shape=spec.sized(0),
                chunks=spec.chunks(self.chunk_rows),
                dtype=spec.dtype,
                fill_value=fill_value(np.dtype(spec.dtype)),
                compressors=[ZstdCodec(level=1, checksum=True)],
                config={"write_empty_chunks": True},
            )
        self._commit()

    def _reopen(self) -> bool:
        """False where there is nothing to go on from: killed before the first commit."""
        if not (self.path / "zarr.json").is_file():
            return False
        group = _open_group(self.path, mode="r+")
        unfinished: Any = group.attrs.get(UNFINISHED)
        if unfinished is None:
            theirs = atomic.read_recipe(self.path)
            if not isinstance(theirs, dict) or (theirs != self.recipe and self.restart):
                return False
        else:
            if self.restart and (not isinstance(unfinished, dict) or unfinished.get("recipe") != self.recipe):
                return False
            theirs = self._checked(group, unfinished)
        if theirs != self.recipe:
            differing = sorted(k for k in {*self.recipe, *theirs} if self.recipe.get(k) != theirs.get(k))
            raise PixseqError(
                f"{self.path} was begun with another recipe (it differs in: {', '.join(differing)})",
                "repeat the command that began it, or start again without --resume",
            )
        if unfinished is None:
            self.finished = _whole(self.path, group)
            return self.finished is not None
        self.group, self.rows, self.state = group, unfinished["rows"], unfinished["state"]
        self.covered = _covered(unfinished)
        for name, spec in self.specs.items():
            entries = (
                int(starts(np.asarray(array_of(group, PICTURE_SHAPES)[: self.rows]))[-1]) if spec.whole else self.rows
            )
            array_of(group, name).resize(spec.sized(entries))
        return True

    def _checked(self, group: zarr.Group, unfinished: Any) -> dict[str, Any]:
        """The recipe that a partial was begun with. Raises PixseqError where what it tells does not fit its arrays."""
        found = unfinished if isinstance(unfinished, dict) else {}
        recipe: Any
        rows: Any
        state: Any
        recipe, rows, state = (found.get(key) for key in ("recipe", "rows", "state"))
        told = isinstance(recipe, dict) and isinstance(state, dict) and type(rows) is int
        told = told and type(_covered(found)) is int and 0 <= _covered(found) <= rows
        if not told or (recipe == self.recipe and not self._holds(group, rows)):
            raise PixseqError(
                f"{self.path} does not tell how far it came: it is damaged", "begin anew with --overwrite, no --resume"
            )
        return recipe

    def _holds(self, group: zarr.Group, rows: int) -> bool:
        """Whether the arrays of a group are those that are being written, with at least so many rows."""
        try:
            arrays = {name: array_of(group, name) for name in self.specs}
        except Exception:  # damaged metadata comes as many types
            return False
        shapes = {name: (arrays[name].shape, spec) for name, spec in self.specs.items()}
        return all(
            arrays[name].dtype == spec.dtype
            and shape == spec.sized(shape[spec.row_axis] if len(shape) > spec.row_axis else 0)
            and (spec.whole or shape[spec.row_axis] >= rows)
            and arrays[name].nchunks <= MOST_CHUNKS
            for name, (shape, spec) in shapes.items()
        )

    def append(self, rows: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Add the same number of rows to every array; `state` is where the caller stands after them.

        Rows may be any number, whatever the chunks.
        """
        counts = {array.shape[self.specs[name].row_axis] for name, array in rows.items() if not self.specs[name].whole}
        assert rows.keys() == self.specs.keys() and len(counts) == 1, (rows.keys(), counts)
        count = counts.pop()
        again = min(max(self.rows - self.given, 0), count)  # of these are written already
        for name, array in rows.items():
            entries = int(starts(rows[PICTURE_SHAPES][:again])[-1]) if self.specs[name].whole else again
            self.buffer[name].append(np.split(array, [entries], axis=self.specs[name].row_axis)[1])
        self.given += count
        self.buffered += count - again
        self.ahead.append((self.given, dict(state)))
        if self.buffered >= self.chunk_rows:
            self._flush(self.buffered - self.buffered % self.chunk_rows)

    def _flush(self, count: int) -> None:
        pixels = (
            int(starts(np.concatenate(self.buffer[PICTURE_SHAPES])[:count])[-1]) if PICTURE_SHAPES in self.specs else 0
        )
        for name, spec in self.specs.items():
            some = [rows for rows in self.buffer[name] if rows.shape[spec.row_axis]]
            held = np.concatenate(some, axis=spec.row_axis) if len(some) > 1 else some[0]  # most are one, and large
            now, later = np.split(held, [pixels if spec.whole else count], axis=spec.row_axis)
            array = array_of(self.group, name)
            start = array.shape[spec.row_axis]
            stop = start + now.shape[spec.row_axis]
            array.resize(spec.sized(stop))
            array[(slice(None),) * spec.row_axis + (slice(start, stop),)] = now
            self.buffer[name] = [later]
        self.rows += count
        self.buffered -= count
        while self.ahead and self.ahead[0][0] <= self.rows:
            self.covered, self.state = self.ahead.pop(0)
        self._commit()

    def _commit(self) -> None:
        found = {"recipe": self.recipe, "rows": self.rows, "covered": self.covered, "state": self.state}
        self.group.attrs[UNFINISHED] = found

    def finish(
        self,
        kind: str,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Mapping[str, Any]],
        summary: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> manifest.Manifest:
        """Write the last rows, read everything back for the content id, and put the manifest in place.

        `meta` is what gives the arrays their meaning (palette, class names, height ...): it enters the id and becomes
        group attributes.
        """
        if self.buffered:
            self._flush(self.buffered)
        id = store_id(self.group, kind, meta)
        format = (
            1 if kind == "pixels" and PICTURE_SHAPES not in self.specs else None
        )  # squares are what they always were
        record = manifest.build(kind, id, stage, config, inputs, summary, format)
        if (self.path / layout.OWNER).is_file():  # a partial folder, which says what it was begun with until the end
            atomic.write_text(self.path / layout.RECIPE, json.dumps(self.recipe))
        self.group.attrs.put({manifest.KEY: record, **meta})
        return record


def _covered(unfinished: Mapping[str, Any]) -> Any:
    """After how many rows its state is; where it is not told, by an older version, the state does or it is all."""
    return unfinished.get("covered", unfinished["state"].get("rows", unfinished["rows"]))


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
                f"`pixseq show {self.path} --verify` names the chunk; make the store again",
            ) from error

    def labels(self) -> np.ndarray | None:
        return self.read("labels") if "labels" in self.names else None

    def images(self) -> np.ndarray | None:
        """Which image of the source each row shows, int [N]; None where every row is an image of its own."""
        return self.read("images") if "images" in self.names else None


def _open_group(path: Path, mode: Literal["r", "r+"]) -> zarr.Group:
    try:
        store = BoundedStore(path, read_only=mode == "r")
        store.chunk_bytes = {name: check_array(path, name) for name in array_names(path)}
        return zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)
    except Exception as error:  # damaged metadata comes as many types
        raise PixseqError(f"{path} does not open as a zarr store: {error}", DAMAGED) from error


def open_store(path: str | Path, *kinds: str) -> Store:
    """Open for reading. Raises PixseqError for another kind, or if a chunk file is missing (it is named)."""
    path = Path(path)
    store = _open(path, manifest.expect(path, *kinds))
    missing, real = [], 0
    for key in (key for name in store.names for key in chunk_files(store, name)):
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


def _open(path: Path, record: manifest.Manifest) -> Store:
    try:
        store = Store(path, record, _open_group(path, mode="r"))
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


def chunk_files(store: Store, name: str) -> Iterator[str]:
    """The files of an array, by the path inside the store (zarr v3 default keys: name/c/i/j)."""
    array = store.arrays[name]
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
    return _faults(_open(Path(path), manifest.read(path)))


def _whole(partial: Path, group: zarr.Group) -> manifest.Manifest | None:
    """The manifest of a store that only lacks its name, None where something is amiss with it."""
    record: Any = group.attrs.get(manifest.KEY)
    try:
        return None if not manifest.is_manifest(record) or _faults(_open(partial, record)) else record
    except PixseqError:
        return None


def _faults(store: Store) -> list[str]:
    path = store.path
    faults: list[str] = []
    for name in store.names:
        array = store.arrays[name]
        for key in chunk_files(store, name):
            index = [int(i) for i in key.split("/")[2:]]
            if len(faults) == MOST_NAMED:
                return faults
            if not (path / key).is_file():
                faults.append(f"{key} is missing")
                continue
            try:
                array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks))]
            except Exception as error:
                faults.append(f"{key} is damaged: {error}")
    if not faults and store_id(store.group, store.manifest["kind"], store.meta) != store.manifest["id"]:
        faults.append(f"the content does not match its id {store.manifest['id']}")
    return faults


def store_id(group: zarr.Group, kind: str, meta: Mapping[str, Any]) -> str:
    """The content id of a store, read back chunk by chunk."""
    arrays = {name: array_of(group, name) for name in array_names(Path(cast(LocalStore, group.store).root))}
    contents = {name: manifest.Content(array.dtype, array.shape, _blocks(array)) for name, array in arrays.items()}
    return manifest.content_id(kind, contents, meta)


def _blocks(array: zarr.Array) -> Iterator[np.ndarray]:
    """C-order blocks of some chunks: the leading indices one by one, then runs of rows. One is read ahead."""
    axis = next((i for i, c in enumerate(array.chunks) if c > 1), array.ndim - 1)
    row_bytes = math.prod(array.shape[axis + 1 :]) * array.dtype.itemsize
    rows = array.chunks[axis] * max(BLOCK_BYTES // (array.chunks[axis] * row_bytes), 1)

    def read(place: tuple[int | slice, ...]) -> np.ndarray:
        return np.asarray(array[place])

    with ThreadPoolExecutor(1, "reading") as reading:
        ahead: Future[np.ndarray] | None = None
        for lead in _indices(array.shape[:axis]):
            for start in range(0, array.shape[axis], rows):
                upcoming = reading.submit(read, (*lead, slice(start, start + rows)))
                if ahead is not None:
                    yield ahead.result()
                ahead = upcoming
        if ahead is not None:
            yield ahead.result()
