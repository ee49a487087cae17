"""The runs that a fit reads, from a plan folder or a CSV, checked and with nothing dropped silently.

A row is as read: {"id", "resolution", "budget", "params", "tokens", "flops", METRIC: number or None, ...}.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import fit as document
from pixseq.artifacts.fit import Run
from pixseq.bounded.structure import read_json
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.isoflop import SAME_BUDGET, group_budgets
from pixseq.studies import columns, csv_export
from pixseq.studies.columns import REQUIRED
from pixseq.studies.csv_export import TEXT

# What else a row may say of its run: neither measured nor fitted.
SHAPE = ("resolution", "budget", "seed")
# How a metric was measured, kept beside it.
MEASURED_WITH = {"frechet_distance": document.MEASURED_WITH}
# flops / (6 params tokens): from a forward pass alone (1/3) to narrow models with attention at 64x64 RGB (17), and room
RATIO = (0.2, 40.0)

Row = dict[str, Any]


@dataclass
class Table:
    """Runs to fit, what is left out and why, and where they come from."""

    runs: list[Run]
    metrics: list[str]
    excluded: list[Row] = field(default_factory=list)
    counting: str | None = None
    params_counted: str | None = None
    tokens_per_image: dict[str, float] | None = None  # by resolution, which JSON spells as text; None: not known
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(source: str | Path, metrics: Sequence[str] | None = None, chosen: Sequence[str] = ()) -> Table:
    """The table of a plan folder or a CSV; `metrics` None: every column that is not a run's size, cost or shape.

    `chosen` says which columns of a CSV are what, as texts ROLE=COLUMN.

    Raises PixseqError for anything that cannot be fitted, UsageError for a metric that is no column.
    """
    path = Path(source)
    if is_plan(path):
        if chosen:
            raise UsageError("--column is for a CSV", f"{path} is a plan, whose columns are known")
        from pixseq.studies import study

        opened = study.open_study(path)
        table = checked(opened.results(), str(path), metrics)
        table.counting, table.params_counted = opened.counting, opened.params_counted
        table.tokens_per_image = {
            str(cell.resolution): cell.tokens / (cell.steps * cell.batch_size) for cell in opened.cells
        }
        table.inputs = {"runs": dict(opened.reference)}
        return table
    if path.is_dir():
        raise PixseqError(f"{path} is a folder, but no scaling plan", "make one with: pixseq scaling plan GRID.yaml")
    if not path.is_file():
        raise PixseqError(f"{path} does not exist", "give a plan folder, or a CSV with params, tokens, flops, metrics")
    found = csv_export.read_table(path, metrics, chosen)
    table = checked(found.rows, str(path), metrics)
    _check_ratio(table.runs, str(path))
    table.notes = found.notes + table.notes
    if found.derived:
        table.counting = "6nd"
    table.tokens_per_image = _tokens_per_image(found.rows)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table.inputs = {"runs": {"path": str(path), "id": f"sha256:{digest}"}}
    return table


def _tokens_per_image(rows: Sequence[Row]) -> dict[str, float] | None:
    """Of each resolution, where every row tells it, in a column n_ctx or tokens_per_image."""
    found: dict[str, set[Any]] = {}
    for row in rows:
        count: Any = row.get("tokens_per_image", row.get("n_ctx"))
        if row.get("resolution") is None or not _is_number(count) or count <= 0:
            return None
        found.setdefault(f"{row['resolution']:.0f}", set()).add(count)
    return {side: counts.pop() for side, counts in found.items()} if all(len(c) == 1 for c in found.values()) else None


def is_plan(path: Path) -> bool:
    """A folder whose manifest says so."""
    try:
        found = read_json(path / "manifest.json", "")
    except (OSError, PixseqError):
        return False
    return isinstance(found, dict) and found.get("kind") == "plan"


def checked(rows: Sequence[Row], name: str, metrics: Sequence[str] | None = None) -> Table:
    """Rows as read -> a table. Rows that are not done, and metrics that a row lacks, are listed as excluded."""
    chosen = _chosen(rows, name, metrics)
    table, sized = Table([], chosen), []
    seen: dict[tuple, Row] = {}
    for row in rows:
        if row.get("status") not in (None, "done"):
            reason = row["status"] if not row.get("reason") else f"{row['status']}: {row['reason']}"
            table.excluded.append({"id": row.get("id"), "reason": reason})
            continue
        _check_counts(row, name)
        run = {"id": row.get("id"), "resolution": row.get("resolution"), "budget": row.get("budget")}
        run |= {key: float(row[key]) for key in REQUIRED}
        if row.get("seed") is not None:
            run["seed"] = int(row["seed"])
        for metric in chosen:
            value = row.get(metric)
            if value is not None and not math.isfinite(value):
                raise PixseqError(f"{name}: {_named(row)} has {metric} = {value}", "give a number, or leave it empty")
            run[metric] = None if value is None else float(value)
            if value is None:
                table.excluded.append({"id": row.get("id"), "reason": f"has no {metric}"})
            run |= {key: row[key] for key in MEASURED_WITH.get(metric, ()) if row.get(key) is not None}
        same = (run["resolution"], run.get("seed"), *(run[key] for key in (*REQUIRED, *chosen)))
        if same in seen and any(run[metric] is not None for metric in chosen):
            reason = f"it is {_named(seen[same])} once more, the same in every number"
            table.excluded.append({"id": row.get("id"), "reason": reason})
            continue
        seen[same] = row
        sized.append(run)
    if not sized:
        raise PixseqError(f"{name}: none of {len(rows)} runs is done", "train them with: pixseq scaling run PLAN")
    _check_resolutions(sized, name)
    _set_budgets(sized, name)
    table.runs = [_run(run, chosen) for run in sized]
    return table


def _run(row: Row, metrics: Sequence[str]) -> Run:
    id, resolution, budget, params, tokens, flops = (row[key] for key in ("id", "resolution", "budget", *REQUIRED))
    values = {metric: row[metric] for metric in metrics}
    beside = {key: row[key] for key in document.MEASURED_WITH if key in row}
    return Run(id, resolution, budget, params, tokens, flops, row.get("seed"), values, beside)


def _named(row: Row) -> str:
    name = row.get("id")
    if name is None:
        return "a run"
    return name if name.startswith("line ") else f"the run {name}"


def _check_counts(row: Row, name: str) -> None:
    """Sizes, cost and budget are positive."""
    for key in (*REQUIRED, *(["budget"] if row.get("budget") is not None else [])):
        value = row.get(key)
        if value is None or not (0 < value < math.inf):
            raise PixseqError(f"{name}: {_named(row)} has {key} = {value}", "it must be a positive number")


def _check_ratio(runs: Sequence[Run], name: str) -> None:
    """FLOPs that someone else counted can be those of the params and tokens under some way to count."""
    for run in runs:
        expected = 6 * run.params * run.tokens
        ratio = run.flops / expected
        if not RATIO[0] <= ratio <= RATIO[1]:
            raise PixseqError(
                f"{name}: {_named(vars(run))} has flops {run.flops:.4g}, but 6 params tokens is {expected:.4g} "
                f"({ratio:.3g} times)",
                "no way of counting explains that: params and tokens are plain counts (not millions), and tokens are "
                "those of the whole run, every epoch",
            )


def _check_resolutions(runs: list[Row], name: str) -> None:
    """All runs have one, or none."""
    given = [run["resolution"] for run in runs]
    if any(value is None for value in given) and not all(value is None for value in given):
        lacking = next(run for run in runs if run["resolution"] is None)
        raise PixseqError(f"{name}: {_named(lacking)} has no resolution, others have", "give each run its own")
    for run in runs:
        if run["resolution"] is not None:
            if run["resolution"] != int(run["resolution"]):
                raise PixseqError(f"{name}: {_named(run)} has resolution {run['resolution']}", "a number of pixels")
            run["resolution"] = int(run["resolution"])


def _set_budgets(runs: list[Row], name: str) -> None:
    """Runs without a budget are grouped by their FLOPs, within each resolution.

    Raises PixseqError where no resolution has three budgets: any power law goes through two.
    """
    most = 0
    for resolution in {run["resolution"] for run in runs}:
        ours = [run for run in runs if run["resolution"] == resolution]
        if any(run["budget"] is None for run in ours):
            budgets, index = group_budgets(np.array([run["flops"] for run in ours]))
            for run, k in zip(ours, index):
                run["budget"] = float(budgets[k])
        for run in ours:
            run["budget"] = float(run["budget"])
        most = max(most, len({run["budget"] for run in ours}))
    if most < 3:
        found = ", ".join(f"{budget:.3g}" for budget in sorted({run["budget"] for run in runs}))
        raise PixseqError(
            f"{name}: finished runs at {most} compute budget{'s' * (most > 1)} ({found}), a fit needs three",
            f"add runs at other budgets; FLOPs within {SAME_BUDGET:.0%} of each other count as one budget",
        )


def _chosen(rows: Sequence[Row], name: str, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, or all there are."""
    numeric = {key: None for row in rows for key, value in row.items() if _is_number(value) or value is None}
    numbers = [key for key in numeric if any(_is_number(row.get(key)) for row in rows)]
    known = {*REQUIRED, *TEXT, *SHAPE}
    found = [key for key in numbers if key not in known and not columns.is_setting(key)]
    if metrics is None:
        if not found:
            raise PixseqError(f"{name}: there is no metric beside params, tokens and flops", "add a column, as loss")
        return found
    chosen = []
    for metric in metrics:
        match = [key for key in numbers if key not in known and key == metric]
        match = match or [key for key in found if columns.plain(key) == columns.plain(metric)]
        if len(match) == 1:
            chosen.append(match[0])
            continue
        if match:
            raise UsageError(f"--metric {metric} may be any of: {', '.join(match)}", "name it in full")
        if metric in known:
            raise UsageError(f"--metric {metric} is a run's size, cost or shape", f"measured: {', '.join(found)}")
        close = difflib.get_close_matches(metric, found, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(found) or 'none'}"
        raise UsageError(f"--metric {metric}: {name} has no such column with values", hint)
    return list(dict.fromkeys(chosen))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
