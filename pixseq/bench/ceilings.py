"""What this machine can do at most: matrix products at the shapes that are used, and copies of memory; and its name."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pixseq.bench.settings import Copy, Product
from pixseq.cores import usable_cores
from pixseq.runtime import Machine

SECONDS = 0.2  # that each is tried for
COPIED = 1 << 27  # bytes


def rate(ceiling: Product | Copy, where: Machine, precision: str) -> float:
    """Floating point operations, or bytes, a second: the best of several tries."""
    if isinstance(ceiling, Copy):
        source = torch.zeros(COPIED // 4, device=where.device)
        target = torch.empty_like(source)
        return 2 * COPIED / _least(lambda: target.copy_(source), settle(where))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.randn(ceiling.rows, ceiling.inner, device=where.device, dtype=dtype)
    rights = torch.randn(ceiling.copies, ceiling.inner, ceiling.outer, device=where.device, dtype=dtype)

    def products() -> None:
        for right in rights:
            torch.mm(left, right)

    with torch.inference_mode():
        seconds = _least(products, settle(where))
    return 2 * ceiling.copies * ceiling.rows * ceiling.inner * ceiling.outer / seconds


def _least(call: Callable[[], object], settle: Callable[[], None]) -> float:
    """Seconds of the fastest try, after one to warm up."""
    call()
    settle()
    least, began = float("inf"), time.perf_counter()
    while least == float("inf") or time.perf_counter() - began < SECONDS:
        started = time.perf_counter()
        call()
        settle()
        least = min(least, time.perf_counter() - started)
    return least


def settle(where: Machine) -> Callable[[], None]:
    """What waits until the device has done all that it was told."""
    return torch.cuda.synchronize if where.device.type == "cuda" else lambda: None


def release(where: Machine) -> None:
    """Give memory that is no longer used back to the device, of which others take theirs."""
    gc.collect()
    if where.device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def limited(count: int | None) -> Iterator[None]:
    """So many cores and threads for all that computes, ours and peers'; None: as they are."""
    from threadpoolctl import threadpool_limits

    cores, before = usable_cores(), torch.get_num_threads()
    if count is None:
        yield
        return
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if allowed is not None and count < cores:
            os.sched_setaffinity(0, sorted(allowed)[:count])  # which our own pools of threads count
        torch.set_num_threads(count)
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
        if allowed is not None:
            os.sched_setaffinity(0, allowed)


def described(where: Machine) -> dict[str, Any]:
    """The machine as a table of its figures names it. `load` is of the last minute, in jobs."""
    gpu = torch.cuda.get_device_name(where.device) if where.device.type == "cuda" else None
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(where.device),
        "memory_bytes": where.memory_bytes(),
        "auto": where.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
