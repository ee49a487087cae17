"""Talk on stderr: a bar with rate and time left on a terminal, a plain line every ten seconds elsewhere.

Silent until `enable()` is called, so that a stage called from a notebook prints nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

from pixseq.text import printable

SOON_SECONDS, FIRST_LINE_SECONDS, LINE_EVERY_SECONDS = 1.5, 2.0, 10.0

_enabled = False
_warnings: list[str] = []
_last_said: str | None = None
_soon: threading.Timer | None = None


def enable(on: bool = True) -> None:
    """Turn the talk on (the command line does, unless --quiet)."""
    global _enabled
    _enabled = on
    _warnings.clear()  # of what was done before


def enabled() -> bool:
    return _enabled


def say(text: str) -> None:
    """One line on stderr."""
    if _enabled:
        tell(text)


def say_soon(text: str) -> None:
    """Say it in a moment, after what waits to be said too, unless something else is said before, such as a fault."""
    global _soon
    if _enabled:
        waiting = _soon.args if _soon is not None and not _soon.finished.is_set() else ()
        unsay()
        _soon = threading.Timer(SOON_SECONDS, say, ["; ".join([*waiting, text])])
        _soon.daemon = True
        _soon.start()


def unsay() -> None:
    """What waits to be said no longer needs to be."""
    if _soon is not None:
        _soon.cancel()


def note(text: str) -> None:
    """What is good to know."""
    say(f"note: {text}")


def warn(text: str) -> None:
    """What can spoil a result: said when it is met, and again as the last lines of a command, by `last_words`."""
    if text not in _warnings:
        _warnings.append(text)
    say(_warning(text))


def last_words() -> None:
    """Say again what can spoil the result, unless nothing was said since."""
    unsay()
    if _warnings and _last_said != _warning(_warnings[-1]):
        for text in _warnings:
            say(_warning(text))
    _warnings.clear()


def _warning(text: str) -> str:
    return f"warning: {text}"


def tell(text: str) -> None:
    """One line on stderr, also where the talk is off: an answer, or a fault. Nobody there to read it is no fault."""
    global _last_said
    _last_said = text
    unsay()
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            text = printable(text)
            if text.startswith(("warning: ", "error: ")) and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
                head, colon, rest = text.partition(":")
                text = f"\x1b[1;{33 if head == 'warning' else 31}m{head}{colon}\x1b[0m{rest}"
            print(text, file=sys.stderr, flush=True)


class Bar:
    """Counts work done; `note` is a short text shown beside the count (a loss, a layer)."""

    def __init__(self, name: str, total: int | None, unit: str, start: int = 0):
        self.name, self.total, self.unit = name, total, unit
        self.start = start
        self.done: float = start
        self.text = ""
        self.began = time.monotonic()
        self.next_line = self.began + FIRST_LINE_SECONDS
        self.lock = threading.Lock()

    def advance(self, n: float = 1) -> None:
        """So many more are done; a part of one counts in the rate and the time left."""
        self.done += n
        self.show()

    def reach(self, done: int) -> None:
        """So many are done in all."""
        self.done = done
        self.show()

    def note(self, text: str) -> None:
        self.text = text

    def rate(self) -> float:
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def whole(self) -> int:
        """How many are done entirely: parts add up to a little less or more."""
        return int(self.done + 1e-6)

    def show(self) -> None:
        with self.lock:
            if time.monotonic() >= self.next_line:
                self.next_line = time.monotonic() + LINE_EVERY_SECONDS
                say(self.line())

    def count(self) -> str:
        """37/50 images; 37 images of a stream, whose end is not known."""
        slow = self.done != self.whole() and self.rate() < 1 / LINE_EVERY_SECONDS
        done = f"{self.done:.2f}" if slow else self.whole()
        return f"{done}{'' if self.total is None else f'/{self.total}'} {self.unit}"

    def line(self) -> str:
        left = ""
        if self.total is not None and self.rate() > 0 and self.done < self.total:
            left = f", {clock((self.total - self.done) / self.rate())} left"
        text = f"  {self.text}" if self.text else ""
        if self.done == self.start:
            return f"{self.name}: {self.count()}, none yet after {clock(time.monotonic() - self.began)}{text}"
        return f"{self.name}: {self.count()}, {per_second(self.rate())}{left}{text}"


class RichBar(Bar):
    """The same counts, drawn by rich on a terminal."""

    def __init__(self, name: str, total: int | None, unit: str, start: int, progress: Progress):
        super().__init__(name, total, unit, start)
        self.progress = progress
        self.task = progress.add_task(printable(name), total=total, completed=start, count=self.count(), note="")

    def show(self) -> None:
        count = f"{self.count()} {per_second(self.rate())}"
        self.progress.update(self.task, completed=self.done, count=count, note=printable(self.text))


@contextmanager
def _beating(bar: Bar) -> Iterator[None]:
    """Lines go on while nothing is finished, so that a first step of a minute is seen to run."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(max(bar.next_line - time.monotonic(), 0.1)):
            bar.show()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def track(name: str, total: int | None = None, unit: str = "images", start: int = 0) -> Iterator[Bar]:
    """A bar for one loop. `start` is what an earlier run had already done; it does not count in the rate."""
    if not _on_terminal():
        bar = Bar(name, total, unit, start)
        if not _enabled:
            yield bar
            return
        with _beating(bar):
            yield bar
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (  # without markup: names are the user's, and [/b] is one
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),  # in a narrow terminal the bar gives way, not the times
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        yield RichBar(name, total, unit, start, drawn)


class Board:
    """A table that changes, for work with many parts; elsewhere than on a terminal, a plain line an event."""

    def __init__(self, head: Sequence[str], live: Live | None = None):
        self.head, self.live = head, live

    def show(self, rows: Callable[[], Sequence[Sequence[str]]]) -> None:
        """Draw the table anew, on a terminal; `rows` is not called elsewhere."""
        if self.live is not None:
            from rich.table import Column, Table
            from rich.text import Text

            drawn = Table(*(Column(Text(printable(cell))) for cell in self.head), box=None, pad_edge=False)
            for row in rows():
                drawn.add_row(*(Text(printable(cell)) for cell in row))
            self.live.update(drawn)

    def say(self, text: str) -> None:
        """An event: above the table, or on a line of its own."""
        if self.live is not None:
            self.live.console.print(printable(text), markup=False, highlight=False, emoji=False)
        else:
            say(text)


@contextmanager
def board(head: Sequence[str]) -> Iterator[Board]:
    """A board with these columns."""
    if not _on_terminal():
        yield Board(head)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=2) as live:
        yield Board(head, live)


def _on_terminal() -> bool:
    return _enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def per_second(rate: float) -> str:
    """A rate for people: 0.12/s, 12.3/s, 1,234,568/s."""
    return f"{rate:,.0f}/s" if rate >= 999.5 else f"{rate:.3g}/s"


def clock(seconds: float) -> str:
    """A duration for people: 42s, 3m10s, 2h05m, 12d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400:,}d{whole % 86400 // 3600:02d}h"
