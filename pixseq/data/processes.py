"""Processes that make rows of files: a sixth of what a small JPEG costs is Python's, which threads run one at a time.

They are interpreters of their own, not forks, which would hold the locks of our files and those of our threads. Each is
sent chunks of files over a socket, and ends where that is closed: none outlives us, however we end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import numpy as np

from pixseq.bounded.room import Room
from pixseq.data import resample
from pixseq.data.chunks import Chunk, RowMaker
from pixseq.data.decode import prepare_process
from pixseq.data.records import ImageFile
from pixseq.errors import PixseqError

UNASKED = 8 << 20  # bytes that a process unfolds a picture to without a word
# Names of files are the same bytes to them, and what we keep out stays out.
PYTHON = ("-X", f"utf8={sys.flags.utf8_mode}", "-I" if sys.flags.isolated else "-P")
# The modules of ours, wherever they are found, and none that lies where the user stands.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from pixseq.data.processes import serve; serve(int(sys.argv[1]))"


class Processes:
    """`count` of them, or as many as there is room for. `chunk` may be called by as many threads at once."""

    def __init__(self, count: int, maker: RowMaker):
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        begun: list[subprocess.Popen] = []
        self.end = weakref.finalize(self, _end, begun)
        self._given: set[int] = set()  # those that have the code of resample.c, by their sockets
        with suppress(OSError):
            for _ in range(count):
                ours, theirs = Pipe()
                with theirs:
                    begun.append(_begin(theirs.fileno()))
                ours.send((maker, UNASKED))
                self._idle.put(ours)

    def chunk(self, files: Sequence[ImageFile], numbers: np.ndarray, room: Room) -> Chunk | None:
        """As RowMaker.chunk. None: it must be made here, see `_made`, or there is no process."""
        try:
            process = self._idle.get_nowait()
        except Empty:
            return None
        try:
            chunk = self._ask(process, files, numbers, room)
        except (OSError, EOFError):  # it was killed, or could not begin
            if not self.end.alive:
                raise
            return None
        self._idle.put(process)
        return chunk

    def _ask(self, process: Connection, files: Sequence[ImageFile], numbers: np.ndarray, room: Room) -> Chunk | None:
        code = None if process.fileno() in self._given else resample.made()
        if code is not None:
            self._given.add(process.fileno())
        process.send((files, numbers, code))
        with ExitStack() as held:
            while isinstance(answer := process.recv(), int):
                held.close()
                if answer:
                    held.enter_context(room.entered())(answer)
                    process.send(None)
        return answer


def _begin(socket: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable or "", *PYTHON, "-c", PROGRAM, str(socket), *sys.path],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # else numpy begins a thread a core, and none has work
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[socket],
        process_group=0,  # Ctrl-C is ours to answer
    )


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def serve(socket: int) -> None:
    """What such a process does: chunks as they are asked for, until nobody asks."""
    ours = Connection(socket)
    with suppress(OSError, EOFError):
        maker, unasked = ours.recv()
        prepare_process(maker.prep.max_pixels)
        resample.leave_to_others()
        while True:
            files, numbers, code = ours.recv()
            if code is not None:
                resample.take(code)
            ours.send(_made(maker, files, numbers, _Asked(ours, unasked)))


def _made(maker: RowMaker, files: Sequence[ImageFile], numbers: np.ndarray, room: _Asked) -> Chunk | None:
    """None: who asks must make it, to raise a fault, or because files may be there for them alone, as in /dev/fd."""
    try:
        chunk = maker.chunk(files, numbers, room)
    except PixseqError:
        return None
    paths = [file.data for file in files if isinstance(file.data, str)]
    return None if chunk.tally["skipped"] and not all(os.access(path, os.R_OK) for path in paths) else chunk


class _Asked:
    """The room of the process that asks, in one that is asked."""

    def __init__(self, process: Connection, unasked: int):
        self.process, self.unasked = process, unasked

    @contextmanager
    def entered(self) -> Iterator[Callable[[int], None]]:
        taken = False

        def take(size: int) -> None:
            nonlocal taken
            if size > self.unasked:
                self.process.send(size)
                self.process.recv()
                taken = True

        try:
            yield take
        finally:
            if taken:
                self.process.send(0)
