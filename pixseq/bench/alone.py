"""One row of a table in a process of its own: the time of a call, and the most memory that it takes.

The processes are forks of one that has imported what all of them need: imports are not part of what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from pixseq.bench.settings import US, Settings
from pixseq.choices import Precision
from pixseq.errors import PixseqError

IMPORTED = ["pixseq.bench.run", "pixseq.artifacts.arrays", "pixseq.data.sources", "sklearn.cluster"]


def measured(
    settings: Settings, stage: str, by: str, precision: str | None, rounds: int = 0, seconds: float = 0.0
) -> dict[str, Any]:
    """`peak_bytes`, of the first call over what was there when it began, and with `rounds` the `seconds` of so many
    calls after it, of which none begins when `seconds` are over. Raises PixseqError where it fails.
    """
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload(IMPORTED)
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, settings, stage, by, precision, rounds, seconds).result()
    except BrokenProcessPool:
        sizes = {key: value for key, value in asdict(settings).items() if isinstance(value, int) and key != "seed"}
        told = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise PixseqError(
            f"the process of {stage} by {by} was killed, perhaps for its memory, at {told}", "choose smaller sizes"
        ) from None


def measure(
    settings: Settings, stage: str, by: str, precision: str | None, rounds: int, seconds: float
) -> dict[str, Any]:
    """The same, in this process."""
    from pixseq.bench import ceilings, run
    from pixseq.bench.rounds import interleaved

    if precision is not None:
        settings = replace(settings, precision=cast(Precision, precision))
    with run.opened(settings, () if by == US else (by,)) as bench:
        (work,) = (work for work in run.TASKS[stage](bench).works if work.by == by)
        call, settle = work.prepare(), ceilings.settle(bench.where)
        gc.collect()
        before = _forget_peak(bench.where.device.type)
        call()
        settle()
        found: dict[str, Any] = {"peak_bytes": max(_peak(bench.where.device.type) - before, 0)}
        if rounds:
            found["seconds"] = interleaved([call], rounds, seconds, settle)[0]
    return found


def _forget_peak(device: str) -> int:
    """Bytes that are held now, of which the peak is counted from here on. What was freed is given back before, where
    the C library is glibc: else a call would take it again, and its memory would not be seen.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)
