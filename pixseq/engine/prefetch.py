"""The batch of the next step, made while the device computes this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pixseq.engine.step import Batch
from pixseq.runtime import Machine
from pixseq.runtime.cuda import bind_thread


class Prefetch:
    """`make` gives the batch of a step, whenever it is made; of `steps` in all. One is made ahead where the device is
    not the CPU, which would only be divided, and where the making is the CPU's, see Images.on_device.
    """

    def __init__(self, machine: Machine, make: Callable[[int], Batch], steps: int, worthwhile: bool):
        self.make, self.steps = make, steps
        self.thread = None
        if worthwhile and machine.device.type != "cpu":
            self.thread = ThreadPoolExecutor(1, "batches", bind_thread, (machine.device,))
        self.next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        if self.thread is None:
            return self.make(step)
        ahead, self.next = self.next, None
        made = ahead[1].result() if ahead is not None and ahead[0] == step else self.make(step)
        if step + 1 < self.steps:
            self.next = step + 1, self.thread.submit(self.make, step + 1)
        return made
