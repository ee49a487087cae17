"""The only room that knows machines: device, precision, seeds, ranks and compilation here, what keeps a GPU busy in
cuda.py, how fast a machine multiplies in rates.py.

On one CPU process every function here is close to an identity, so that stages have no special cases.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from pixseq import progress
from pixseq.cores import host_memory_bytes, usable_cores
from pixseq.errors import PixseqError, UsageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Machine:
    """Where a stage computes. `rank` of `world` processes, as torchrun starts them."""

    device: torch.device
    precision: str  # "fp32" | "bf16"
    rank: int = 0
    world: int = 1
    sharers: int = 1  # processes that compute in the memory of the device

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute in bf16 with float32 weights, or leave all in float32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def used(self) -> dict[str, str]:
        """What a result says of how it was computed."""
        return {"precision": self.precision, "device": str(self.device)}

    def share(self, n: int) -> slice:
        """This rank's part of n rows."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        if self.world == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        self.sum([found])
        return bool(found > 0)

    def sum(self, values: Iterable[Tensor]) -> None:
        """Add each tensor over the ranks, in place."""
        if self.world > 1:
            with _together():
                for value in values:
                    torch.distributed.all_reduce(value)

    def keep_freed_memory(self) -> None:
        """Steps on a CPU take the memory that the last one freed: fresh pages are a tenth of a bf16 training step.

        Where the C library is glibc, by its thresholds for giving memory back and for mapping each piece anew.
        """
        if self.device.type == "cpu":
            with contextlib.suppress(AttributeError, OSError, TypeError):
                libc = ctypes.CDLL(None)
                libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
                libc.mallopt(M_MMAP_THRESHOLD, 2**30)

    @property
    def leads(self) -> bool:
        """True on the one rank that writes and talks."""
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            with _together():
                torch.distributed.barrier()

    def memory_bytes(self) -> int:
        """This process's part of all memory of the device (not of what is free now, so that choices repeat)."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory // self.sharers
        return host_memory_bytes() // self.sharers


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What all ranks do at once. Raises PixseqError where one of them has ended, or cannot be reached."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PixseqError(
            f"another process of this run has ended, or cannot be reached: {line}",
            "what it said tells why; training goes on by the same command with --resume",
        ) from None


def devices_for(device: str, jobs: int) -> list[str]:
    """A device for each of `jobs` processes: they go round the CUDA devices, unless `device` names one or the CPU."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    return [device if count < 2 else f"cuda:{job % count}" for job in range(jobs)]


@contextlib.contextmanager
def machine(device: str = "auto", precision: str = "auto", ranks: bool = False) -> Iterator[Machine]:
    """The device and precision asked for; with `ranks`, joins the other processes when started by torchrun.

    Precision auto is bf16 where the chip is faster in it, see _has_bf16_units, else fp32. torch takes a thread a core,
    but does not know how few a container leaves it.
    Raises UsageError for what this machine does not have, and for several processes where the stage is of one.
    """
    if device not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:(0|[1-9][0-9]?)", device):
        raise UsageError(f"there is no device {device!r}", "one of: auto, cpu, cuda, or a card as cuda:1")
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"there is no precision {precision!r}", "one of: auto, fp32, bf16")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but torch sees no CUDA device here", "use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not ranks:
        raise UsageError(f"this stage runs in one process, torchrun started {world}", "start it without torchrun")
    on = torch.device(device)
    share_memory = sharers(on, world)
    if on.type == "cuda":
        on = _card(on, world)
        torch.cuda.set_device(on)
    if on.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    if precision == "auto":
        precision = "bf16" if _has_bf16_units(on) else "fp32"
    if world > 1:
        with _together():
            if on.type == "cuda":
                torch.distributed.init_process_group("nccl", device_id=on)
            else:
                torch.distributed.init_process_group("gloo")
        if rank:
            progress.enable(False)
    progress.say_soon(f"computing on {on} in {precision}")
    done = False
    try:
        yield Machine(on, precision, rank, world, share_memory)
        done = True
    finally:
        progress.unsay()
        if world > 1 and (done or on.type == "cpu"):  # NCCL's end waits for the others, of which none may come
            torch.distributed.destroy_process_group()


def _card(named: torch.device, world: int) -> torch.device:
    """With its number: each process of a host has one of its own. Raises UsageError where there are too few."""
    if named.index is not None and world > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > 1:
        raise UsageError(f"several processes of one run cannot share {named}", "--device cuda gives each a card")
    card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if named.index is None else named.index)
    count = torch.cuda.device_count()
    if card.index >= count:
        seen = f"torch sees {count} CUDA device{'s' * (count != 1)} here"
        last = f"the last is cuda:{count - 1}, and torchrun can start a process for each"
        raise UsageError(f"there is no {card}: {seen}", last)
    return card


JOBS = "PIXSEQ_JOBS_ON_DEVICE"  # set for processes that were started to work side by side on one device


def sharers(device: torch.device, world: int) -> int:
    """How many processes compute in one device's memory: of the ranks those of a host in the host's (on GPUs each has
    one of its own), and for each of them the jobs beside it.
    """
    ranks = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return ranks * int(os.environ.get(JOBS, 1))


def _has_bf16_units(device: torch.device) -> bool:
    """CUDA from Ampere on; on a CPU AMX, ARM's of SVE, and AVX-512's products of pairs where they are quick: matrix
    products in them take half of fp32's time on AMD's cores, and 1.8 times as long on Intel's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    chip = torch.cpu.get_capabilities()
    pairs = chip.get("avx512_bf16") and not str(chip.get("cpu_name")).startswith("Intel")
    return bool(chip.get("amx_bf16") or chip.get("sve_bf16") or pairs)


class Placeable(Protocol):
    """What can stand on a device; `kernels` are the names of functions on it to compile there."""

    @property
    def kernels(self) -> tuple[str, ...]: ...

    def to(self, device: torch.device, /) -> Self: ...


Net = TypeVar("Net", bound=Placeable)
MOST_FORMS = 256  # of compiled code: a process may train many models, as those of a study


def placed(model: Net, machine: Machine) -> Net:
    """`model` on the machine's device, with its kernels compiled there (see models/order.py)."""
    for name in model.kernels:
        setattr(model, name, compiled(getattr(model, name), machine, None))
    return model.to(machine.device)


def compiled(function: Callable, machine: Machine, wanted: bool | None) -> Callable:
    """`function` compiled: by default on CUDA only. Where the compiler fails, it goes on uncompiled and says so."""
    if not (machine.device.type == "cuda" if wanted is None else wanted):
        return function
    from torch._dynamo import config as forms
    from torch._functorch import config as gradients

    forms.recompile_limit = max(forms.recompile_limit, MOST_FORMS)
    gradients.force_non_lazy_backward_lowering = True  # once the way there is behind, it is late to go on without
    fast = torch.compile(function, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal fast
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if fast is function:
                raise
            what, *why = str(error).splitlines()
            progress.say(f"torch.compile failed, going on without it ({' '.join([what, *why[:1]])})")
            fast = function
            return fast(*args, **kwargs)

    return call


def generator(*seed: int) -> torch.Generator:
    """A CPU generator seeded by several numbers, so that streams for different purposes never meet."""
    import numpy as np

    state = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
