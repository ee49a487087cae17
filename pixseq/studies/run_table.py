"""The runs that a fit reads, from a plan folder or a CSV, checked and with nothing dropped silently."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import fit as document
from pixseq.artifacts.fit import Excluded, Run
from pixseq.bounded.structure import read_json
from pixseq.errors import PixseqError, UsageError
from pixseq.interop.places import file_id
from pixseq.numerics.isoflop import SAME_BUDGET, group_budgets
from pixseq.studies import columns, csv_export
from pixseq.studies.columns import REQUIRED, ROLES
from pixseq.studies.csv_export import TEXT
from pixseq.studies.run_row import RunRow

# How a metric was measured, kept beside it.
MEASURED_WITH = {"frechet_distance": document.MEASURED_WITH}
# flops / (6 params tokens): from a forward pass alone (1/3) to narrow models with attention at 64x64 RGB (17), and room
RATIO = (0.2, 40.0)


@dataclass
class Table:
    """Runs to fit, what is left out and why, and where they come from."""

    runs: list[Run]
    metrics: list[str]
    excluded: list[Excluded] = field(default_factory=list)
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
        table = checked([RunRow.of(one.to_json()) for one in opened.results()], str(path), metrics)
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
    table.inputs = {"runs": {"path": str(path), "id": file_id(path)}}
    return table


def _tokens_per_image(rows: Sequence[RunRow]) -> dict[str, float] | None:
    """Of each resolution, where every row tells it, in a column n_ctx or tokens_per_image."""
    found: dict[str, set[Any]] = {}
    for row in rows:
        count: Any = row.others.get("tokens_per_image", row.others.get("n_ctx"))
        if row.resolution is None or not _is_number(count) or count <= 0:
            return None
        found.setdefault(f"{row.resolution:.0f}", set()).add(count)
    return {side: counts.pop() for side, counts in found.items()} if all(len(c) == 1 for c in found.values()) else None


def is_plan(path: Path) -> bool:
    """A folder whose manifest says so."""
    try:
        found = read_json(path / "manifest.json", "")
    except (OSError, PixseqError):
        return False
    return isinstance(found, dict) and found.get("kind") == "plan"


def checked(rows: Sequence[RunRow], name: str, metrics: Sequence[str] | None = None) -> Table:
    """Rows as read -> a table. Rows that are not done, and metrics that a row lacks, are listed as excluded."""
    chosen = _chosen(rows, name, metrics)
    table, kept = Table([], chosen), []
    seen: dict[tuple, RunRow] = {}
    for row in rows:
        if row.status not in (None, "done"):
            table.excluded.append(Excluded(row.id, f"{row.status}: {row.reason}" if row.reason else str(row.status)))
            continue
        _check_counts(row, name)
        values = {metric: _value(row, metric, name) for metric in chosen}
        table.excluded += [Excluded(row.id, f"has no {key}") for key, value in values.items() if value is None]
        same = (row.resolution, row.seed, row.params, row.tokens, row.flops, *values.values())
        if same in seen and any(value is not None for value in values.values()):
            reason = f"it is {seen[same].name} once more, the same in every number"
            table.excluded.append(Excluded(row.id, reason))
            continue
        seen[same] = row
        kept.append((row, values))
    if not kept:
        raise PixseqError(f"{name}: none of {len(rows)} runs is done", "train them with: pixseq scaling run PLAN")
    done = [row for row, _ in kept]
    _check_resolutions(done, name)
    budgets = _budgets(done, name)
    table.runs = [_run(row, budget, values) for (row, values), budget in zip(kept, budgets)]
    return table


def _value(row: RunRow, metric: str, name: str) -> float | None:
    value = row.others.get(metric)
    if value is not None and not math.isfinite(value):
        raise PixseqError(f"{name}: {row.name} has {metric} = {value}", "give a number, or leave it empty")
    return None if value is None else float(value)


def _run(row: RunRow, budget: float, values: dict[str, float | None]) -> Run:
    """Of a row whose counts are checked."""
    beside = [key for metric in values for key in MEASURED_WITH.get(metric, ())]
    return Run(
        id=row.id,
        resolution=None if row.resolution is None else int(row.resolution),
        budget=budget,
        **{key: float(getattr(row, key)) for key in REQUIRED},
        seed=None if row.seed is None else int(row.seed),
        values=values,
        beside={key: row.others[key] for key in beside if row.others.get(key) is not None},
    )


def _check_counts(row: RunRow, name: str) -> None:
    """Sizes, cost and budget are positive."""
    for key in (*REQUIRED, *(["budget"] if row.budget is not None else [])):
        value = getattr(row, key)
        if value is None or not (0 < value < math.inf):
            raise PixseqError(f"{name}: {row.name} has {key} = {value}", "it must be a positive number")


def _check_ratio(runs: Sequence[Run], name: str) -> None:
    """FLOPs that someone else counted can be those of the params and tokens under some way to count."""
    for run in runs:
        expected = 6 * run.params * run.tokens
        ratio = run.flops / expected
        if not RATIO[0] <= ratio <= RATIO[1]:
            raise PixseqError(
                f"{name}: {RunRow(run.id).name} has flops {run.flops:.4g}, but 6 params tokens is {expected:.4g} "
                f"({ratio:.3g} times)",
                "no way of counting explains that: params and tokens are plain counts (not millions), and tokens are "
                "those of the whole run, every epoch",
            )


def _check_resolutions(rows: Sequence[RunRow], name: str) -> None:
    """All runs have one, or none."""
    lacking = [row for row in rows if row.resolution is None]
    if 0 < len(lacking) < len(rows):
        raise PixseqError(f"{name}: {lacking[0].name} has no resolution, others have", "give each run its own")
    for row in rows:
        if row.resolution is not None and row.resolution != int(row.resolution):
            raise PixseqError(f"{name}: {row.name} has resolution {row.resolution}", "a number of pixels")


def _budgets(rows: Sequence[RunRow], name: str) -> list[float]:
    """Of each row. Where rows have none, those of a resolution are grouped by their FLOPs.

    Raises PixseqError where no resolution has three budgets: any power law goes through two.
    """
    budgets, most = np.empty(len(rows)), 0
    for resolution in {row.resolution for row in rows}:
        ours = [place for place, row in enumerate(rows) if row.resolution == resolution]
        given = [rows[place].budget for place in ours]
        if None in given:
            grouped, index = group_budgets(np.array([rows[place].flops for place in ours]))
            budgets[ours] = grouped[index]
        else:
            budgets[ours] = np.array(given, float)
        most = max(most, len(np.unique(budgets[ours])))
    if most < 3:
        found = ", ".join(f"{budget:.3g}" for budget in np.unique(budgets))
        raise PixseqError(
            f"{name}: finished runs at {most} compute budget{'s' * (most > 1)} ({found}), a fit needs three",
            f"add runs at other budgets; FLOPs within {SAME_BUDGET:.0%} of each other count as one budget",
        )
    return budgets.tolist()


def _chosen(rows: Sequence[RunRow], name: str, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for, or all there are."""
    numeric = {key: None for row in rows for key, value in row.others.items() if _is_number(value) or value is None}
    numbers = [key for key in numeric if key not in TEXT and any(_is_number(row.others.get(key)) for row in rows)]
    found = [key for key in numbers if not columns.is_setting(key)]
    if metrics is None:
        if not found:
            raise PixseqError(f"{name}: there is no metric beside params, tokens and flops", "add a column, as loss")
        return found
    chosen = []
    for metric in metrics:
        match = [key for key in numbers if key == metric]
        match = match or [key for key in found if columns.plain(key) == columns.plain(metric)]
        if len(match) == 1:
            chosen.append(match[0])
            continue
        if match:
            raise UsageError(f"--metric {metric} may be any of: {', '.join(match)}", "name it in full")
        if metric in ROLES or metric in TEXT:
            raise UsageError(f"--metric {metric} is a run's size, cost or shape", f"measured: {', '.join(found)}")
        close = difflib.get_close_matches(metric, found, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(found) or 'none'}"
        raise UsageError(f"--metric {metric}: {name} has no such column with values", hint)
    return list(dict.fromkeys(chosen))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
