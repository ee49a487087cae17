"""Room that threads share for what small inputs unfold to: who would take more than is left waits for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Room:
    """`most` bytes. One that needs more than all of it has it for itself."""

    def __init__(self, most: int):
        self.most, self.left, self.changed = most, most, threading.Condition()

    @contextmanager
    def entered(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes so many bytes, once, and waits for them; they are given back at the end."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            size = min(size, self.most)
            if size <= 0:
                return
            with self.changed:
                self.changed.wait_for(lambda: self.left >= size)
                self.left -= size
            taken = size

        try:
            yield take
        finally:
            if taken:
                with self.changed:
                    self.left += taken
                    self.changed.notify_all()
