"""How much there is to share out: cores, threads and memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.pool import ThreadPool


def usable_cores() -> int:
    """Cores that this process may use: not all of the machine's, where a scheduler gave it some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
