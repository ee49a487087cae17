"""A short part of the soak, in a process of its own: it forks."""

import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_whatever_goes_wrong():
    words = [sys.executable, Path(__file__).parent / "soak.py", "--trials", "12", "--seed", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing lost, nothing broken" in done.stdout, done.stdout + done.stderr
