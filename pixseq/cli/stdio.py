"""Standard streams that are closed, full or gone: no fault of the program, nor a reason to lose its work."""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any, Literal, TextIO


def secure() -> None:
    """Called first of all: closed streams become the null device, and stderr one that nothing fails to write to.

    A file that is opened while the number of a standard stream is free would take it, and what is meant for the
    stream with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    if not isinstance(sys.stderr, Patient):
        sys.stderr = Patient(sys.stderr or _null("w"))


def silence(stream: Any) -> None:
    """Turn what a stream writes to into the null device, so that what is left in it does not fail at the exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def is_gone(error: OSError, stream: Any) -> bool:
    """Whether what a stream wrote to is closed, or a terminal that hung up; not a file that failed."""
    terminal = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return error.errno == errno.EBADF or (error.errno == errno.EIO and terminal)


def _null(mode: Literal["r", "w"]) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8")


class Patient:
    """A text stream that goes silent where it cannot be written: its terminal hung up, its disk is full."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
