"""The plan of a scaling study: a folder whose manifest.json also holds its cells; what each makes goes to `cells/`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixseq.artifacts import disk, manifest
from pixseq.artifacts.owning import writing
from pixseq.bounded import forms
from pixseq.errors import PixseqError

MOST_WIDTH = 1 << 16  # of a model: no machine trains wider ones
# What every reader of a cell relies on.
COUNTS = {
    "n_layer": MOST_WIDTH,
    "d_model": MOST_WIDTH,
    "params": forms.EXACT,
    "tokens": forms.EXACT,
    "steps": forms.EXACT,
    "batch_size": 1 << 31,
}
NUMBERS = ("budget", *COUNTS, "lr", "flops")
CELL = forms.fields(
    {
        **dict.fromkeys(NUMBERS, forms.positive),
        **{key: forms.whole(1, most) for key, most in COUNTS.items()},
        "data": forms.whole(0, forms.EXACT),
    },
    {
        "seed": forms.whole(0, forms.EXACT),
        "sweep": forms.positive,
        "epochs": forms.number,
        "seconds": forms.maybe(forms.number),
        "memory_gigabytes": forms.number,
    },
)
FOLDERS = ("cells", "reference")  # in a plan's: what is made of its cells, and of what judges them
CELL_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|[.](?![.]|partial$)){0,99}", re.IGNORECASE)
DAMAGED = "it is damaged, or no plan that pixseq wrote: plan again, into another folder"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a study: its shape and recipe, its cost, and which of the grid's data it is of.

    `budget` and `flops` are training FLOPs, wanted and spent; `seed` is above the grid's; `seconds` are expected, None:
    not measured. A cell of a sweep of learning rates says by which factor in `sweep`.
    """

    id: str
    resolution: int
    budget: float
    data: int
    seed: int = 0
    n_layer: int
    d_model: int
    n_head: int = 1
    params: int
    tokens: int
    steps: int
    batch_size: int
    lr: float
    flops: float
    epochs: float = 0.0
    seconds: float | None = None
    memory_gigabytes: float = 0.0
    sweep: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without a seed or a sweep where there is none."""
        return {key: value for key, value in vars(self).items() if value or key not in ("seed", "sweep")}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Cell:
        """Of a cell that `read_plan` has checked."""
        return cls(**{key: found[key] for key in cls.__dataclass_fields__ if key in found})


def write_plan(
    path: str | Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    cells: Sequence[Cell],
    summary: Mapping[str, Any],
) -> manifest.Manifest:
    """Write a new plan, or other cells into one that is there, in one step; what cells have made stays."""
    path, listed = Path(path), [cell.to_json() for cell in cells]
    record = manifest.build("plan", _id(listed), "scaling plan", config, inputs, summary)
    text = json.dumps({**record, "cells": listed}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if (path / "manifest.json").is_file():
        disk.write_text(path / "manifest.json", text)
        return record
    with writing(path, command="scaling plan") as partial:
        (partial / "cells").mkdir(parents=True)
        (partial / "manifest.json").write_text(text)
    return record


def read_plan(path: str | Path) -> tuple[manifest.Manifest, list[Cell]]:
    """The manifest and the cells, whose folders lie in the plan's.

    Raises PixseqError where `path` holds no plan, where its cells are not those of its content id, where an id is no
    name of a folder, and where what it is run in is a link to elsewhere.
    """
    record, listed = _read(path)
    if _id(listed) != record["id"]:
        raise PixseqError(f"{path}: its cells are not those of its id {record['id']}", DAMAGED)
    _check_cells(path, listed)
    cells = [Cell.from_json(cell) for cell in listed]
    used = [
        *FOLDERS,
        *(f"cells/{cell.id}" for cell in cells),
        *(f"reference/r{cell.resolution}" for cell in cells),
    ]
    for folder in (Path(path, name) for name in used):
        if folder.is_symlink():
            raise PixseqError(
                f"{folder} is a link, and what is made there would lie outside the plan",
                "put the whole plan where there is room: it may be moved, or be a link itself",
            )
    return record, cells


def _read(path: str | Path) -> tuple[manifest.Manifest, list[dict[str, Any]]]:
    record = manifest.expect(path, "plan")
    cells = record.pop("cells", None)
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise PixseqError(f"{path}/manifest.json lists no cells", DAMAGED)
    return record, cells


def _check_cells(path: str | Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """What becomes part of a path: ids that are names and distinct, also where case does not count; resolutions."""
    seen: set[str] = set()
    for cell in cells:
        id, side = cell.get("id"), cell.get("resolution")
        if not isinstance(id, str) or not CELL_ID.fullmatch(id):
            raise PixseqError(f"{path} has a cell of the id {id!r}, which is no name of a folder in it", DAMAGED)
        if id.lower() in seen:
            raise PixseqError(f"{path} has two cells of the id {id!r}", DAMAGED)
        if type(side) is not int or side < 1:
            raise PixseqError(f"{path} has a cell {id} of the resolution {side!r}, which is no side", DAMAGED)
        forms.require(cell, CELL, f"{path} has a cell {id}", DAMAGED)
        seen.add(id.lower())


def plan_id(path: str | Path) -> str:
    """The content id of a plan's cells."""
    return _id(_read(path)[1])


def _id(cells: Sequence[Mapping[str, Any]]) -> str:
    try:
        return manifest.content_id("plan", {}, {"cells": list(cells)})
    except (ValueError, RecursionError) as error:  # not finite, or text that UTF-8 cannot say
        raise PixseqError(f"the cells of a plan have no content id: {error}", DAMAGED) from None
