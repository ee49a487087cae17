"""What a plan is checked for, so that no cell fails after it was trained: ranges, stores, labels, layers, extractor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.plan import Cell
from pixseq.config import GridFile
from pixseq.engine import exported
from pixseq.engine.extraction import PIXELS
from pixseq.engine.image_store import some_images
from pixseq.engine.images import Images
from pixseq.engine.training import check_fit
from pixseq.errors import PixseqError, UsageError
from pixseq.interop.places import file_id, is_exported
from pixseq.models.family import shape_from
from pixseq.runtime import Machine
from pixseq.studies import calibrate
from pixseq.studies.judge import REFERENCE, completes
from pixseq.studies.ranges import probe_layers
from pixseq.studies.study import EXTRACTOR, stores_of

Stores = Mapping[str, Store]  # by role


def absolute(grid: GridFile) -> GridFile:
    """The grid with paths that hold from any folder."""
    data = tuple(
        replace(each, **{role: os.path.abspath(path) for role, path in stores_of(each).items()}) for each in grid.data
    )
    how = grid.completions
    if how.extractor not in (PIXELS, REFERENCE):
        how = replace(how, extractor=os.path.abspath(how.extractor))
    return replace(grid, data=data, completions=how)


def extractor_inputs(grid: GridFile) -> dict[str, Any]:
    """The extractor as a parent of the plan. Raises UsageError for a name that is neither known nor a path."""
    how = grid.completions
    if not completes(grid) or how.extractor in (PIXELS, REFERENCE):
        return {}
    if not Path(how.extractor).exists():
        raise UsageError(
            f"completions.extractor is {how.extractor}, which does not exist",
            f"one of: {REFERENCE}, {PIXELS}, or the path of a checkpoint or a .pt2 file",
        )
    if is_exported(how.extractor):
        return {EXTRACTOR: {"path": how.extractor, "id": file_id(how.extractor)}}
    return {EXTRACTOR: reference(how.extractor, open_checkpoint(how.extractor).manifest)}


def check_stores(where: Machine, grid: GridFile, stores: Stores, remarks: list[str]) -> None:
    """What cells do with the stores of one resolution, told by what is in them."""
    train, val = stores["train"], stores["val"]
    for store in stores.values():
        train.codec.must_pair(train.path, store.codec, store.path)
    check_fit(where, grid.train, Images(some_images(train, slice(0, 1)), None, train.codec.grid))
    _check_labels(stores, remarks)
    if not completes(grid):
        return
    how, rows = grid.completions, train.codec.grid[0]
    if (how.count or 2) > len(val):
        raise UsageError(
            f"completions.count is {how.count or 2}, and {val.path} holds {len(val)} images", "lower it, or encode more"
        )
    if round(how.keep * rows) >= rows:
        raise UsageError(f"completions.keep is {how.keep}, which keeps all of {rows} rows", "0.5 keeps the top half")
    if how.keep > 0 and round(how.keep * rows) == 0:
        raise UsageError(
            f"completions.keep is {how.keep}, which keeps none of {rows} rows", "0.5 keeps the top half, 0 nothing"
        )
    for store in (train, val):
        store.codec.must_have_colours(store.path, "encode again with --palette: completions need colours")
    if how.extractor in (PIXELS, REFERENCE):
        return
    if is_exported(how.extractor):
        exported.check(where, how.extractor, val)
        return
    extractor = open_checkpoint(how.extractor)
    shape = shape_from(extractor.shape)
    if shape.reads != "tokens":
        raise PixseqError(
            f"completions.extractor {how.extractor} reads {shape.reads}, completions are tokens",
            "give a checkpoint of an Image GPT",
        )
    extractor.codec.must_pair(extractor.path, val.codec, val.path)
    _check_layer("completions.layer", how.layer, shape.n_layer, str(how.extractor))


def _check_labels(stores: Stores, remarks: list[str]) -> None:
    """Both sides of the probe have labels, or neither has, which is said."""
    train, test = stores.get("probe_train", stores["train"]), stores.get("probe_test", stores["val"])
    labels = train.labels()
    bare = list(dict.fromkeys(store.path for store in (train, test) if store.labels() is None))
    if labels is None or bare:
        remarks.append(f"{' and '.join(map(str, bare))} has no labels: accuracies will not be measured")
        return
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        raise PixseqError(
            f"{train.path} holds {len(counts)} classes of {counts.max()} images at most: nothing can be probed",
            "name another store as probe_train, of two classes and two images of one at least",
        )
    names = [store.codec.class_names for store in (train, test)]
    if None not in names and names[0] != names[1]:
        raise PixseqError(
            f"{train.path} and {test.path} have different classes", "encode both from sources with the same classes"
        )


def check_cells(where: Machine, grid: GridFile, cells: Sequence[Cell], remarks: list[str]) -> None:
    """What depends on the shapes: layers and memory. `cells` are of one resolution, its reference among them."""
    for layer in probe_layers(grid) or ():
        least = min((cell for cell in cells if not is_reference(cell)), key=lambda cell: cell.n_layer)
        _check_layer("probe.layers", layer, least.n_layer, least.id)
    for cell in filter(is_reference, cells):
        _check_layer("completions.layer", grid.completions.layer, cell.n_layer, cell.id)
    large = [cell.id for cell in cells if not calibrate.fits_memory(where, cell)]
    if large:
        timed = "their times are not known" if len(large) == len(cells) else "their times are told by smaller ones"
        remarks.append(
            f"{len(large)} cells need more than the {decimal(where.memory_bytes())} of this machine's device, the "
            f"first {large[0]}: {timed}, and they run on a larger machine only"
        )


def is_reference(cell: Cell) -> bool:
    return cell.id.startswith(REFERENCE)


def _check_layer(key: str, layer: int | None, layers: int, whose: str) -> None:
    if layer is not None and layer > layers:
        raise UsageError(f"{key} asks for layer {layer}, and {whose} has the layers 0 to {layers}", "name a lower one")
