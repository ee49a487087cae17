"""Stores of arrays written row by row, in whole chunks, so that an interrupted one can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pixseq.artifacts import disk, layout, manifest
from pixseq.artifacts.arrays import array_of, chunk_faults, faults, open_group, opened, store_id
from pixseq.artifacts.locking import read_recipe
from pixseq.artifacts.specs import PICTURE_SHAPES, Spec, fill_value
from pixseq.errors import PixseqError
from pixseq.numerics.whole import pixel_count

UNFINISHED = "pixseq_unfinished"
MOST_CHUNKS = 1 << 21  # of an array that is cut back to what is whole: zarr lists them all


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
        """False where there is nothing to go on from: killed before the first commit, or what was written did not reach
        the disk before the power went.
        """
        if not (self.path / "zarr.json").is_file():
            return False
        group = open_group(self.path, mode="r+")
        unfinished: Any = group.attrs.get(UNFINISHED)
        if unfinished is None:
            theirs = read_recipe(self.path)
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
        shapes_first = sorted(self.specs.items(), key=lambda each: each[1].whole)
        for name, spec in shapes_first:
            entries = self.rows
            if spec.whole:
                entries = pixel_count(np.asarray(array_of(group, PICTURE_SHAPES)[: self.rows]))
            array_of(group, name).resize(spec.sized(entries))
            if any(chunk_faults(self.path, name, array_of(group, name))):
                return False
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
            entries = pixel_count(rows[PICTURE_SHAPES][:again]) if self.specs[name].whole else again
            self.buffer[name].append(np.split(array, [entries], axis=self.specs[name].row_axis)[1])
        self.given += count
        self.buffered += count - again
        self.ahead.append((self.given, dict(state)))
        if self.buffered >= self.chunk_rows:
            self._flush(self.buffered - self.buffered % self.chunk_rows)

    def _flush(self, count: int) -> None:
        pixels = 0
        if PICTURE_SHAPES in self.specs:
            pixels = pixel_count(np.concatenate(self.buffer[PICTURE_SHAPES])[:count])
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
        are_squares = kind == "pixels" and PICTURE_SHAPES not in self.specs
        format = 1 if are_squares else None  # they are what they always were
        record = manifest.build(kind, id, stage, config, inputs, summary, format)
        if (self.path / layout.OWNER).is_file():  # a partial folder, which says what it was begun with until the end
            disk.write_text(self.path / layout.RECIPE, json.dumps(self.recipe))
        self.group.attrs.put({manifest.KEY: record, **meta})
        return record


def _covered(unfinished: Mapping[str, Any]) -> Any:
    """After how many rows its state is; where it is not told, by an older version, the state does or it is all."""
    return unfinished.get("covered", unfinished["state"].get("rows", unfinished["rows"]))


def _whole(partial: Path, group: zarr.Group) -> manifest.Manifest | None:
    """The manifest of a store that only lacks its name, None where something is amiss with it."""
    record: Any = group.attrs.get(manifest.KEY)
    try:
        return None if not manifest.is_manifest(record) or faults(opened(partial, record)) else record
    except PixseqError:
        return None
