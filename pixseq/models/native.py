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
    """The code. None: there is no compiler (`CC` names one, else it is cc), or it fails."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler:
        return None
    with tempfile.TemporaryDirectory(prefix="pixseq-") as folder:
        target = Path(folder) / "code.so"
        command = [*compiler, *FLAGS, *defined, *LINKED, str(source), "-o", str(target), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError):
            return None
