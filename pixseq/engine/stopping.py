"""Stopping a run well: a signal is answered at once, what was done is saved, then the run ends.

Schedulers give half a minute, and a backward pass of a large micro-batch may take longer: Python's own handlers wait
until it returns. So a thread, which the system wakes by a pipe, answers and saves the state of the last finished step
while the step under way goes on, and the step is cut short as soon as Python is reached again. Several ranks can only
stop together: there the first rank saves, and all end with the step under way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pixseq import progress, signals
from pixseq.errors import Stop
from pixseq.runtime import Machine


class Stopping:
    """What asks a run to end, and who may save it when. `save` is called by one thread at a time."""

    def __init__(self, name: str, machine: Machine, save: Callable[[], None]):
        self.name, self.machine, self._save = name, machine, save
        self.asked: str | None = None  # the signal that came
        self._saved = False  # since it came
        self._cuttable = self._over = False
        self._lock = threading.Lock()  # held while anything may change that a state consists of
        self._held = False  # by the main thread

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heeded inside; in another thread than the main one there are none."""
        self._hold()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        heeded = signals.to_heed()
        thread = threading.Thread(target=self._watch, args=(reader, heeded), daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in heeded}
        try:
            yield
        finally:  # what answers signals outside may raise, so it takes over when all is tidy
            self._hold()
            self._over = True
            self._let_go()
            os.write(writer, b"\0")
            thread.join()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    @contextlib.contextmanager
    def may_be_cut(self) -> Iterator[None]:
        """Work that changes nothing of the state and may be thrown away: one rank alone raises Stop here."""
        self._let_go()
        try:
            self._cuttable = True
            if self.asked and self.machine.world == 1:
                raise Stop(self.asked)
            yield
        finally:
            self._cuttable = False
            self._hold()

    def save(self) -> None:
        """Save the state as it is, in the main thread."""
        self._hold()
        self._save()
        self._saved = True

    def _hold(self) -> None:
        if not self._held:  # a signal may have come just before it was to be held again
            self._lock.acquire()
            self._held = True

    def _let_go(self) -> None:
        self._held = False
        self._lock.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of Python's instructions."""
        self.asked = self.asked or signal.Signals(number).name
        if self._cuttable and self.machine.world == 1:
            self._cuttable = False
            raise Stop(self.asked)

    def _watch(self, reader: int, heeded: tuple[signal.Signals, ...]) -> None:
        """In the thread: a byte is the number of a signal, zero the end of the run."""
        again, aside = False, None
        while number := os.read(reader, 1)[0]:
            if number not in heeded:
                continue
            self._answer(signal.Signals(number).name, again)
            if not again and self.machine.leads:
                aside = threading.Thread(target=self._save_aside, daemon=True)  # further signals are answered meanwhile
                aside.start()
            again = True
        if aside is not None:
            aside.join()

    def _save_aside(self) -> None:
        with self._lock:
            if self._over:
                return
            with contextlib.suppress(Exception):  # the main thread will save too, and say what is wrong
                self._save()
                self._saved = True

    def _answer(self, what: str, again: bool) -> None:
        if not self.machine.leads:
            return
        if again:
            how = "the state is saved, ending" if self._saved else "the state is being saved, which is not cut short"
        else:
            how = "stopping; the state is being saved, --resume will go on from it"
        progress.tell(f"{self.name}: {what}: {how}")
