"""C that a compiler turns into code for this machine when it is first used, in half a second: files that are kept may
meet another machine.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from pixseq import signals

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
LINKED = ("-fopenmp", "-fPIC", "-shared")
SECONDS = 60  # that a compiler may take


class Compiler:
    """One at work on a file, in processes of its own, which end with this object or with the program."""

    def __init__(self, source: Path, given: Sequence[str]):
        """`CC` names it, else it is cc. Raises OSError, and ValueError of what is no command."""
        command = shlex.split(os.environ.get("CC", "cc"))  # ValueError: of a quote that does not end
        if not command:
            raise ValueError("CC is empty")
        # A network's disk keeps a file that is open, and its folder.
        folder = tempfile.TemporaryDirectory(prefix="pixseq-", ignore_cleanup_errors=True)
        self._target = Path(folder.name) / "code.so"
        try:
            self._process = subprocess.Popen(
                [*command, *FLAGS, *given, *LINKED, str(source), "-o", str(self._target), "-lm"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": folder.name},
                process_group=0,
            )
        except BaseException:
            folder.cleanup()
            raise
        self._end = weakref.finalize(self, _end, self._process, folder)
        signals.ends_with_us(self._end)

    @property
    def is_done(self) -> bool:
        return self._process.poll() is not None

    def code(self) -> ctypes.CDLL:
        """Waits for it. Raises OSError, and SubprocessError where it failed or takes too long."""
        try:
            if self._process.wait(SECONDS):
                raise subprocess.CalledProcessError(self._process.returncode, self._process.args)
            return ctypes.CDLL(str(self._target))
        finally:
            self._end()


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    folder.cleanup()


def library(source: Path, given: Sequence[str]) -> ctypes.CDLL | None:
    """The code. None: there is no compiler, it fails, or nowhere may code be put."""
    try:
        return Compiler(source, given).code()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
