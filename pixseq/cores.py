"""How much there is to share out: cores, threads and memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.pool import ThreadPool


def usable_cores() -> int:
    """Cores that this process may use: not all of the machine's, where a scheduler or a container gave it some."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.ceil(min(bound, quota())), 1)


def quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that control groups leave to this process, as `docker run --cpus` does; inf: all."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return math.inf
    least, tree = math.inf, root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = tree / "cpu" if controllers else tree
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see its own group as the root of the tree
            if folder.is_relative_to(top):
                least = min(least, _allowed(folder))
    return least


def _allowed(group: Path) -> float:
    """cgroup v2 has "QUOTA PERIOD" or "max PERIOD" in one file, v1 two files, with the quota -1 for none."""
    try:
        if (group / "cpu.max").is_file():
            given, period = (group / "cpu.max").read_text().split()
        else:
            given, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if given in ("max", "-1") else int(given) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPool]:
    """A pool of threads. A failure in one ends once the others have ended what they do: the interpreter aborts where it
    must end a thread that is in C++. A signal that stops the process waits for nobody, see signals.leave.
    """
    from multiprocessing.pool import ThreadPool

    with ThreadPool(count) as pool:
        try:
            yield pool
        except Exception:
            pool.terminate()  # what has not begun
            pool.join()
            raise
