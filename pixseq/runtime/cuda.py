"""What keeps a GPU and the CPU from waiting for each other: recorded steps, copies on their way, numbers fetched late.

On a CPU every function here is close to an identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pixseq import progress

AHEAD = 32  # steps of sampling that a device has before it


def recorded(device: torch.device, steps: Sequence[Callable[[], None]]) -> Sequence[Callable[[], None]]:
    """Steps as CUDA graphs, one launch each: of those whose numbers all lie in the device's memory, at the same place
    each time. Each runs once before, so that its kernels are loaded; what that leaves behind is for the caller to set.

    Elsewhere, and where one cannot be recorded, they are what they were.
    """
    if device.type != "cuda":
        return steps
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for step in steps:
            step()
        graphs = _graphs(steps, stream)
    before.wait_stream(stream)
    return steps if graphs is None else [graph.replay for graph in graphs]


def _graphs(steps: Sequence[Callable[[], None]], stream: torch.cuda.Stream) -> list[torch.cuda.CUDAGraph] | None:
    """They take turns in one memory. None: one of them cannot be recorded, which is told."""
    graphs, memory = [], torch.cuda.graph_pool_handle()
    try:
        for step in steps:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=memory, stream=stream):
                step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        progress.say(f"no CUDA graph could be made, going on without ({str(error).splitlines()[0]})")
        return None
    return graphs


def once_done(device: torch.device, advance: Callable[[int], None]) -> Callable[[int], None]:
    """`advance`, but told of a step when the device has done it, while AHEAD more wait for the device, which so is
    never idle; of these last ones it is not told.
    """
    if device.type != "cuda":
        return advance
    begun: deque[tuple[torch.cuda.Event, int]] = deque()

    def told(n: int) -> None:
        begun.append((torch.cuda.Event(blocking=True), n))
        begun[-1][0].record()
        if len(begun) > AHEAD:
            event, done = begun.popleft()
            event.synchronize()
            advance(done)

    return told


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the CPU's memory where a GPU fetches it from without anybody waiting."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device, or on its way there: what follows on the device comes after it."""
    return pinned(x, device).to(device, non_blocking=True)


def on_the_way(values: Mapping[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Numbers that a device may still be computing; what is returned waits for them, and for nothing after them."""
    stacked = torch.stack([value.float() for value in values.values()])
    host, done = stacked, None
    if stacked.is_cuda:
        host = torch.empty(stacked.shape, pin_memory=True).copy_(stacked, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def arrived() -> dict[str, float]:
        if done is not None:
            done.synchronize()
        return dict(zip(values, host.tolist()))

    return arrived


def bind_thread(device: torch.device) -> None:
    """A thread that touches no other GPU than its process does."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
