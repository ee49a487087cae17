"""The signals that ask a command to end: Ctrl-C, a scheduler's TERM and its early USR1, a terminal that goes away.

A stopped process ends with its own code, whatever its threads do and whatever signals follow.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from pixseq.errors import Stop

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def to_heed() -> tuple[signal.Signals, ...]:
    """Those that this process should answer: under nohup, a hangup is meant to be passed over."""
    return tuple(n for n in STOPPING if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN))


def heed() -> None:
    """Raise Stop where one comes, until the interpreter ends: then all is done, and a late one must not kill."""
    for number in to_heed():
        signal.signal(number, _stop)
    atexit.unregister(_ignore)
    atexit.register(_ignore)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stop(signal.Signals(number).name)


def _ignore() -> None:
    for number in to_heed():
        signal.signal(number, signal.SIG_IGN)


def pass_over() -> None:
    """From now on they change nothing: the process is about to end. Processes that it starts heed them as ever."""
    for number in to_heed():
        signal.signal(number, lambda number, frame: None)


_begun: list[Callable[[], object]] = []


def ends_with_us(end: Callable[[], object]) -> None:
    """What `end` ends is not outlived by this process however it is left; it may have ended before."""
    _begun.append(end)


def leave(code: int) -> NoReturn:
    """End a stopped process. Threads that still compute are not waited for, and not outlived by the interpreter either:
    ending them, it aborts where they are in C++.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        for end in _begun:
            end()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
