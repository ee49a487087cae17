"""C that a compiler turns into code for this machine when it is first used, in half a second: files that are kept may
meet another machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from pixseq import signals

# Apple's clang 14 knows no -march=native on ARM, and gcc none on POWER.
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64", "ppc64le") else "-march=native"
FLAGS = ("-O3", NATIVE, "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
LINKED = ("-fPIC", "-shared")
THREADS = ("-fopenmp",)  # of code that has them; where it is refused, one thread gains little over torch's many
OPENMP_OF_LLVM = re.compile(rb"libi?omp5?[-.][\w.-]+")  # that of clang; gcc has its own
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
        self.made = b""  # the file of the code
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
            if _brings_another_openmp(self._target):
                raise OSError("two copies of LLVM's OpenMP end a program")
            self.made = self._target.read_bytes()
            return ctypes.CDLL(str(self._target))
        finally:
            self._end()


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    folder.cleanup()


def _brings_another_openmp(code: Path) -> bool:
    """Whether it needs LLVM's OpenMP where this process has it by another name, as torch of conda may."""
    needed, loaded = set(OPENMP_OF_LLVM.findall(code.read_bytes())), Path("/proc/self/maps")
    if sys.platform == "darwin":  # where each file is another, and torch has its own
        return bool(needed)
    return bool(needed and loaded.exists() and set(OPENMP_OF_LLVM.findall(loaded.read_bytes())) - needed)


def library(source: Path, given: Sequence[str]) -> ctypes.CDLL | None:
    """The code. None: there is no compiler, it fails, nowhere may code be put, or it cannot be loaded."""
    try:
        return Compiler(source, given).code()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
