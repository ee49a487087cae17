"""The plan of a scaling study: a folder whose manifest.json also holds its cells; what each makes goes to `cells/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixseq.artifacts import atomic, manifest
from pixseq.errors import PixseqError

Cell = dict[str, Any]


def write_plan(
    path: str | Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    cells: Sequence[Cell],
    summary: Mapping[str, Any],
) -> manifest.Manifest:
    """Write a new plan, or other cells into one that is there, in one step; what cells have made stays."""
    path = Path(path)
    record = manifest.build("plan", _id(cells), "scaling plan", config, inputs, summary)
    text = json.dumps({**record, "cells": list(cells)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if (path / "manifest.json").is_file():
        atomic.write_text(path / "manifest.json", text)
        return record
    with atomic.writing(path, command="scaling plan") as partial:
        (partial / "cells").mkdir(parents=True)
        (partial / "manifest.json").write_text(text)
    return record


def read_plan(path: str | Path) -> tuple[manifest.Manifest, list[Cell]]:
    """The manifest and the cells. Raises PixseqError where `path` holds no plan."""
    record = manifest.expect(path, "plan")
    cells = record.pop("cells", None)
    if not isinstance(cells, list):
        raise PixseqError(f"{path}/manifest.json lists no cells", "it is damaged: plan again, into another folder")
    return record, cells


def plan_id(path: str | Path) -> str:
    """The content id of a plan's cells."""
    return _id(read_plan(path)[1])


def _id(cells: Sequence[Cell]) -> str:
    return manifest.content_id("plan", {}, {"cells": list(cells)})
