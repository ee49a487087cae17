"""C that a compiler turns into code for this machine when it is first used, in half a second: files that are kept may
meet another machine.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
LINKED = ("-fopenmp", "-fPIC", "-shared")
SECONDS = 60  # that a compiler may take


def library(source: Path, defined: Sequence[str]) -> ctypes.CDLL | None:
    """The code. None: there is no compiler (`CC` names one, else it is cc), it fails, or nowhere may code be put."""
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if not compiler:
            return None
        # A network's disk keeps a file that is open, and its folder.
        with tempfile.TemporaryDirectory(prefix="pixseq-", ignore_cleanup_errors=True) as folder:
            target = Path(folder) / "code.so"
            command = [*compiler, *FLAGS, *defined, *LINKED, str(source), "-o", str(target), "-lm"]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
            return ctypes.CDLL(str(target))
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: of a quote in CC that does not end
        return None
