"""Tables of runs as they are exported: CSV by commas, semicolons or tabs, in UTF-8 or UTF-16, with foreign names.

What is not read, and what is taken in place of a column that is missing, is said in notes.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixseq.bounded.files import read_bytes
from pixseq.errors import PixseqError
from pixseq.studies import columns
from pixseq.studies.columns import REQUIRED
from pixseq.studies.run_row import RunRow

MOST_TABLE = 1 << 26  # bytes
TEXT = ("id", "status", "reason", "frechet_extractor")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
SPACED = re.compile(r"[+-]?\d{1,3}([ \u00a0\u202f']\d{3})+([.,]\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
CHART = re.compile(r" - .*__(MIN|MAX)$")  # what Weights & Biases exports of a chart

Cells = dict[str, Any]  # of a line, by the role or the name of their columns


@dataclass
class Read:
    """Rows of a table: numbers as floats, empty cells as None; a row without an id is called by its line."""

    rows: list[RunRow]
    notes: list[str] = field(default_factory=list)
    derived: str | None = None  # which of params, tokens and flops is worked out from the others


def read_table(path: Path, metrics: Sequence[str] | None, chosen: Sequence[str] = ()) -> Read:
    """With `metrics` named, other columns may hold anything. `chosen`: see columns.assigned."""
    header, lines, comma = _lines(path)
    header, lines = _unfolded(header, lines)
    twice = [key for key in dict.fromkeys(header) if key and header.count(key) > 1]
    if twice:
        raise PixseqError(f"{path} has two columns {twice[0]}", "give each a name of its own")
    cells = {name: [line[place] for _, line in lines] for place, name in enumerate(header)}
    roles = columns.assigned(path, header, cells, chosen)
    missing = [key for key in REQUIRED if key not in roles]
    if len(missing) > 1:
        raise _without(path, header, missing)
    if not lines:
        raise PixseqError(f"{path} holds names, but no run", "add a line for each run")
    keys = columns.renamed(header, roles)
    found = Read([], derived=missing[0] if missing else None)
    words = [name for name, key in keys.items() if key not in (*roles, *TEXT) and _is_words(cells[name])]
    aside = [name or "(without a name)" for name in header if name not in keys]
    named = {part: name for part, name in roles.items() if name != part and part not in TEXT}
    if named:
        found.notes.append("columns: " + ", ".join(f"{part} is {name!r}" for part, name in named.items()))
    if words:
        found.notes.append(f"columns of text are not fitted: {', '.join(words)}")
    if aside:
        found.notes.append(f"columns that are not read: {', '.join(aside)}")
    needed = _needed(keys, roles, words, metrics)
    for number, line in lines:
        row: Cells = {
            keys[name]: _cell(path, number, name, keys[name], text, keys[name] in needed, comma)
            for name, text in zip(header, line)
            if name in keys and name not in words
        }
        row["id"] = row.get("id") or f"line {number}"
        if isinstance(row.get("status"), str) and row["status"].lower() in columns.DONE:
            row["status"] = "done"
        found.rows.append(RunRow.of(_with_derived(row, found.derived)))
    if found.derived:
        by = "6 params tokens (6nd)" if found.derived == "flops" else f"flops / (6 {_other(found.derived)})"
        found.notes.append(f"there is no column of {found.derived}: {by} are taken")
    return found


def _needed(
    keys: Mapping[str, str], roles: Mapping[str, str], words: Sequence[str], metrics: Sequence[str] | None
) -> set[str]:
    """Keys whose cells must be numbers."""
    if metrics is None:
        wanted = {key for name, key in keys.items() if name not in words}
    else:
        asked = {columns.plain(metric) for metric in metrics}
        wanted = {key for name, key in keys.items() if columns.plain(name) in asked}
    return ({*roles} | wanted) - {*TEXT}


def _without(path: Path, header: Sequence[str], missing: Sequence[str]) -> PixseqError:
    shown = ", ".join(header)
    hint = "a first line of names: params, tokens, flops and any metrics; or say which is which: --column params=NAME"
    if any(CHART.search(name) for name in header):
        hint = "this is the export of a chart: export the table of runs, with the columns of size, tokens and metrics"
    return PixseqError(f"{path} has no column {' or '.join(missing)}; its first line is {shown[:100]!r}", hint)


def _with_derived(row: Cells, missing: str | None) -> Cells:
    """With that one of params, tokens and flops = 6 N D which has no column."""
    if missing is None:
        return row
    if missing == "flops":
        return {**row, "flops": 6 * row["params"] * row["tokens"]}
    other = row[_other(missing)]
    return {**row, missing: row["flops"] / (6 * other) if other else math.nan}


def _other(count: str) -> str:
    return "params" if count == "tokens" else "tokens"


# ---- lines


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], bool]:
    """The names, the lines with their numbers, and whether a comma is a decimal point."""
    text = re.sub(r"^sep=.\r?\n", "\n", _text(path))  # what Excel writes before the names
    first = next((line for line in text.splitlines() if line.strip()), "")
    between = max("\t;,", key=lambda mark: (_known(first, mark), first.count(mark)))
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
        read = [(lines.line_num, [cell.strip() for cell in cells]) for cells in lines]
    except csv.Error as error:
        raise PixseqError(f"{path} is no CSV: {error}", "separate by commas, quote with double quotes") from None
    read = [(number, cells) for number, cells in read if any(cells)]
    if not read:
        raise PixseqError(f"{path} is empty", "a first line of names (params, tokens, flops, loss), then a line a run")
    header = read[0][1]
    for number, cells in read[1:]:
        if len(cells) != len(header):
            raise PixseqError(
                f"{path} line {number} has {len(cells)} cells, the first line has {len(header)}",
                "give each line a cell for each name",
            )
    comma = _is_decimal_comma(path, [cell for _, cells in read[1:] for cell in cells])
    return header, read[1:], comma


def _text(path: Path) -> str:
    data = read_bytes(path, MOST_TABLE)
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PixseqError(f"{path} is not text", "give a CSV with params, tokens, flops and metrics") from None


def _known(line: str, mark: str) -> int:
    """How many columns of known roles a first line names, if `mark` stands between its cells."""
    return len({columns.role(cell) for cell in next(csv.reader([line], delimiter=mark), [])} - {None})


def _is_decimal_comma(path: Path, cells: Sequence[str]) -> bool:
    """Whether commas within cells are decimal points; else they part thousands."""
    some = [cell for cell in cells if DECIMAL_COMMA.fullmatch(cell) or GROUPED.fullmatch(cell)]
    grouped = [cell for cell in some if GROUPED.fullmatch(cell)]
    if len(grouped) < len(some):
        return True
    points = any(re.fullmatch(r"[+-]?\d*\.\d+([eE].*)?", cell) for cell in cells)
    if some and not points and all(cell.count(",") == 1 for cell in some):
        raise PixseqError(
            f"{path}: {some[0]} may be a number with three decimals, or a thousand and more",
            "write numbers as 1200000 or 1.2e6",
        )
    return False


def _unfolded(header: list[str], lines: list[tuple[int, list[str]]]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Columns whose cells are mappings, as Weights & Biases' own script writes them, become a column a key."""
    folded = {
        place: [_mapping(cells[place]) for _, cells in lines]
        for place, name in enumerate(header)
        if columns.plain(name) in ("config", "summary") and lines and all(cells[place][:1] == "{" for _, cells in lines)
    }
    for place, found in folded.items():
        keys = list(dict.fromkeys(key for each in found for key in each))
        header = [*header, *(f"{header[place]}/{key}" for key in keys)]
        lines = [
            (number, [*cells, *(str(each.get(key, "")) for key in keys)]) for (number, cells), each in zip(lines, found)
        ]
    kept = [place for place in range(len(header)) if place not in folded]
    return [header[place] for place in kept], [(number, [cells[place] for place in kept]) for number, cells in lines]


def _mapping(text: str) -> dict[str, Any]:
    """Its plain values; {} where it cannot be read."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(re.sub(r"\b(nan|inf)\b", "None", text) if read is ast.literal_eval else text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict):
            return {str(key): value for key, value in found.items() if isinstance(value, str | int | float)}
    return {}


# ---- cells


def number(text: str, decimal_comma: bool = False) -> float | None:
    """None where it is none. Thousands may stand apart by commas, spaces or apostrophes."""
    if decimal_comma and DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    elif GROUPED.fullmatch(text):
        text = text.replace(",", "")
    elif SPACED.fullmatch(text):
        text = re.sub(r"[ \u00a0\u202f']", "", text).replace(",", ".")
    try:
        return float(text)
    except ValueError:
        return None


def _is_words(cells: Sequence[str]) -> bool:
    """Whether a column is text: most of what it holds is no number."""
    full = [cell for cell in cells if cell]
    return sum(number(cell) is None and not DECIMAL_COMMA.fullmatch(cell) for cell in full) > len(full) / 2


def _cell(path: Path, line: int, name: str, key: str, text: str, needed: bool, comma: bool) -> Any:
    """A number, or None for an empty cell; text only where no number is needed."""
    if not text:
        if key in REQUIRED:
            raise PixseqError(f"{path} line {line} has no {key}", "every run needs params, tokens and flops")
        return None
    if key in TEXT:
        return text
    value = number(text, comma)
    if value is not None and math.isfinite(value):
        return value
    if not needed:
        return text
    if value is not None:
        raise PixseqError(f"{path} line {line}: {name} is {text}", "give a finite number, or leave a metric empty")
    hint = "write numbers as 1200000 or 1.2e6"
    if key not in REQUIRED:
        hint += ", or name the columns to fit with --metric"
    raise PixseqError(f"{path} line {line}: {name} is {text!r}, no number", hint)
