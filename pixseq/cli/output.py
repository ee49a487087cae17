"""stdout carries one document: a path, a table, or one JSON line."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixseq import progress
from pixseq.cli import stdio
from pixseq.cli.brief import in_brief
from pixseq.errors import CLOSED_PIPE, PixseqError
from pixseq.text import json_line, one_line, printable


def talk(quiet: bool, doing: str | None = None) -> None:
    """Progress on stderr from here on, unless quiet. `doing` is said where the first word of a stage takes long."""
    progress.enable(not quiet)
    if doing is not None:
        progress.say_soon(doing)


def made(path: Path, manifest: Mapping[str, Any] | None, as_json: bool) -> None:
    """What a stage made: its path, or its manifest; on stderr what came out. None: another rank reports."""
    if manifest is not None:
        if (brief := in_brief(manifest)) is not None:
            progress.say(brief)
        emit(to_json(manifest) if as_json else str(path))


def to_json(value: Any) -> str:
    """One line, in which nothing steers a terminal.

    Raises PixseqError for a number that is not finite, for which JSON has no word.
    """
    try:
        return json_line(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise PixseqError(
            "the result holds a number that is not finite, which JSON cannot say",
            "without --json it is shown; what it was measured on is damaged or diverged",
        ) from None


def emit(text: str) -> None:
    """Write to stdout, on a terminal without what would steer it; a closed pipe ends the program silently.

    Raises PixseqError where stdout takes no more, as on a full disk: what was made stands all the same.
    """
    try:
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
    except OSError as error:
        gone = stdio.is_gone(error, sys.stdout)
        stdio.silence(sys.stdout)  # or Python complains at exit
        if error.errno == errno.EPIPE:
            raise SystemExit(CLOSED_PIPE) from None
        if gone:
            return  # as good as closed: nobody wants to hear
        why = f"the result cannot be written to stdout: {error.strerror}"
        raise PixseqError(why, "what was made stands: pixseq show tells of it") from None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, numbers to the right; None is a dash."""
    cells = [[cell_text(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    numeric = [all(row[i] is None or isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell_text(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"
    return one_line(str(value))
