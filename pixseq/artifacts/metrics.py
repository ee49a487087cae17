"""Metrics: the numbers of one measurement as a JSON file, and the log of a training run as JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixseq.artifacts import disk, manifest
from pixseq.artifacts.owning import writing
from pixseq.bounded.files import open_regular
from pixseq.bounded.structure import parse_json, read_object
from pixseq.errors import PixseqError

MOST_LINE = 1 << 20  # bytes of a log's row


def write_metrics(
    path: str | Path,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    numbers: Mapping[str, Any],
    overwrite: bool = False,
) -> manifest.Manifest:
    """Write `numbers` (plain JSON values, units in their names) beside a manifest under the key `pixseq`.

    Raises PixseqError for a number that is not finite, for which JSON has no word.
    """
    record = manifest.build("metrics", _id(path, numbers), stage, config, inputs, summary={})
    with writing(path, overwrite, stage) as partial:
        partial.write_text(json.dumps({manifest.KEY: record, **numbers}, indent=1, ensure_ascii=False) + "\n")
    return record


def metrics_id(path: str | Path) -> str:
    """The content id of the numbers in a metrics file."""
    return _id(path, read_metrics(path)[1])


def _id(path: str | Path, numbers: Mapping[str, Any]) -> str:
    try:
        return manifest.content_id("metrics", {}, numbers)
    except ValueError:
        raise PixseqError(
            f"{path}: the numbers are not all finite, and JSON has no word for others",
            "what they were measured on is damaged or diverged: pixseq check MODEL tells",
        ) from None


def read_metrics(path: str | Path) -> tuple[manifest.Manifest, dict[str, Any]]:
    """The manifest and the numbers. Raises PixseqError where `path` holds no metrics."""
    record = manifest.expect(path, "metrics")
    found = read_object(path, manifest.DAMAGED)
    return record, {key: value for key, value in found.items() if key != manifest.KEY}


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl, each with its whole `step`. A last line cut short by a kill is left out.

    Raises PixseqError for anything else.
    """
    rows: list[dict[str, Any]] = []
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE)
            try:
                row = parse_json(line, finite=False) if line else None
            except ValueError as error:
                if line.endswith(b"\n") or len(line) == MOST_LINE:
                    raise PixseqError(f"{path} line {number} is not JSON: {error}", "the log is damaged") from None
                row = None
            if row is None:
                return rows
            rows.append(_checked_row(row, f"{path} line {number}"))
    return rows


def _checked_row(row: Any, place: str) -> dict[str, Any]:
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 62:
        raise PixseqError(f"{place} tells no step", "the log is damaged")
    for key in ("loss", "val_loss", "ema_val_loss"):
        if not isinstance(row.get(key, 0.0), int | float):
            raise PixseqError(f"{place}: its {key} is no number", "the log is damaged")
    return row


class Log:
    """Appends one JSON object a line, each written at once so that a kill loses nothing before it."""

    def __init__(self, path: Path, resume_step: int | None = None, validated: bool = True):
        """On resume, rows after `resume_step` are dropped: they will be made again; so is its own validation, unless
        the step was `validated`.
        """
        rows = read_log(path) if resume_step is not None and path.is_file() else []
        kept = [row for row in rows if row["step"] < resume_step]
        if validated:
            kept += [row for row in rows if row["step"] == resume_step and "val_loss" in row]
        if path.is_file() or not path.exists():  # not the null device that other ranks write to
            disk.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
