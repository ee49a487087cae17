"""How many cores there are to share out."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may use: not all of the machine's, where a scheduler gave it some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
