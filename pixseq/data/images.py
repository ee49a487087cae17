"""From a source to batches of uint8 pictures, square or whole: they are read, decoded and prepared side by side.

Shapes: B source images a batch, N = B * max(views, 1) rows, S the side, P the pixels of all rows of a batch together.
The same pictures come out whatever the number of worker threads and wherever reading starts.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from pixseq.bounded.room import Room
from pixseq.cores import usable_cores
from pixseq.data.chunks import MOST_RATIO, Chunk, RowMaker
from pixseq.data.decode import MIN_SIDE, prepare_process
from pixseq.data.picking import picked
from pixseq.data.preparation import Preparation
from pixseq.data.processes import Processes
from pixseq.data.records import ImageFile, Pixels, Source
from pixseq.data.resample import three_channels
from pixseq.errors import PixseqError
from pixseq.text import shown

DECODE_CHUNK = 16  # files a thread takes at once: enough to hide the hand-over
DECODE_SECONDS = 0.03  # ... or as many as take so long, to hide that to another process too
DECODED_CHUNK_BYTES = 1 << 20  # ... of which this much is left
DECODE_CHUNK_BYTES = 16 << 20  # ... or this much is read, so that few large files are not many in flight
IN_FLIGHT_BYTES = 256 << 20  # of encoded pictures that wait for their turn, of whatever size each is
DECODED_BYTES = 640 << 20  # of pictures that unfold to far more than their files have: the others wait
HELD_BYTES = 32 << 20  # of whole pictures that are held at once, or one
RESIZE_CHUNK = 256
WORTH = 8000  # files: processes begin in a fifth of a second, and save a tenth of the time of small files on two cores
KEPT_PROBLEMS = 20


@dataclass(frozen=True)
class ImageBatch:
    """images uint8 [N, S, S, 3], labels int32 [N]; `stop` is where to start from to go on after it.

    `numbers` int32 [N] says which image of the source each row shows. Whole pictures have `shapes` int32 [N, 2], and
    their pixels uint8 [P, 3] as `images`.
    """

    images: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray
    stop: int
    shapes: np.ndarray | None = None


class Reader:
    """Streams images [start, start + limit) of a source as batches of `batch_size` source images, prepared.

    `rows` are the numbers of the images that are wanted, ascending; None: all. Start and limit then count among them.
    Memory holds a batch and a bounded number of chunks in flight. `workers` threads decode and resize (which lets go
    of the GIL), and of many files processes, one a core at most; 0 works in the caller's. `counts` says what was met so
    far (images, skipped, exif_rotated, alpha_composited, sixteen_bit, cmyk, grey, animated_first_frame; only what
    occurred), `problems` the first pictures skipped. Raises PixseqError for a bad picture (unless on_error is skip) and
    for labels outside the classes. Who may leave it early closes what is iterated: it ends processes, and a signal that
    comes meanwhile is not lost in the collection of garbage.
    """

    def __init__(
        self,
        source: Source,
        prep: Preparation,
        start: int = 0,
        limit: int | None = None,
        batch_size: int = 1024,
        workers: int = 0,
        rows: np.ndarray | None = None,
    ):
        self.source, self.prep, self.rows = source, prep, rows
        self.start, self.stop = start, None if limit is None else start + limit
        self.batch_size, self.workers = batch_size, workers
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []
        self.room = Room(DECODED_BYTES)
        self.maker = RowMaker(prep, source.has_labels)
        self.processes: Processes | None = None
        self._seconds = math.inf  # that a file took lately
        prepare_process(prep.max_pixels)

    def __iter__(self) -> Generator[ImageBatch]:
        tally: Counter = Counter()
        self.counts, self.problems = {}, []
        held: list[Chunk] = []
        index = self.start
        with closing(self._chunks()) as chunks:
            for chunk in chunks:
                held.append(chunk)
                index += chunk.count
                tally += chunk.tally
                self.counts = dict(tally)
                self.problems += chunk.problems[: KEPT_PROBLEMS - len(self.problems)]
                full = self.prep.resize == "whole" and sum(each.images.nbytes for each in held) >= HELD_BYTES
                if full or (index - self.start) % self.batch_size == 0:
                    yield from self._batch(held, index)
                    held = []
        yield from self._batch(held, index)
        if index > self.start == 0 and not tally["images"]:
            raise PixseqError(
                f"none of the {tally['skipped']} pictures of {shown(self.source.path)} could be used",
                f"the first: {self.problems[0]}",
            )

    def _batch(self, held: list[Chunk], stop: int) -> Iterator[ImageBatch]:
        """At most one batch: none, if all its pictures were skipped."""
        some = [chunk.images for chunk in held if len(chunk.images)]
        if not some:
            return
        images = np.concatenate(some) if len(some) > 1 else some[0]  # most are one, and large
        labels = None
        if self.source.has_labels:
            labels = np.concatenate([chunk.labels for chunk in held])
            most = len(self.source.class_names or ()) or np.iinfo(np.int32).max
            wrong = labels[(labels < 0) | (labels >= most)]
            if len(wrong):
                raise PixseqError(
                    f"{shown(self.source.path)} has the label {wrong[0]}, but its classes are 0 to {most - 1}",
                    "mend the labels, or leave them out",
                )
        numbers = np.concatenate([chunk.numbers for chunk in held]).astype(np.int32)
        shapes = np.concatenate([chunk.shapes for chunk in held]) if self.prep.resize == "whole" else None
        yield ImageBatch(images, None if labels is None else labels.astype(np.int32), numbers, stop, shapes)

    def _chunks(self) -> Generator[Chunk]:
        """In order, at most a few ahead of the one asked for."""
        if self.workers == 0:
            for job in self._jobs():
                yield job()
            return
        window: deque[tuple[Future[Chunk], int]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for job in self._jobs():
                window.append((pool.submit(job), self._held_by(job)))
                while len(window) > 2 * self.workers or sum(size for _, size in window) > IN_FLIGHT_BYTES:
                    yield window.popleft()[0].result()
            while window:
                yield window.popleft()[0].result()
        finally:  # without waiting: a generator that is left ends where garbage is collected, in any thread
            pool.shutdown(wait=False, cancel_futures=True)
            self._end_processes()

    def _jobs(self) -> Iterator[partial[Chunk]]:
        """The source cut into chunks, none of which crosses the end of a batch."""
        waiting: list[ImageFile] = []
        index, waiting_bytes = self.start, 0
        for item in self._items():
            if isinstance(item, Pixels):
                done = 0
                while done < len(item.images):
                    size = (
                        self._room(index) if self.prep.is_ready(item.images) else min(RESIZE_CHUNK, self._room(index))
                    )
                    part = slice(done, done + size)
                    images = item.images[part]
                    yield partial(self._arrays, images, None if item.labels is None else item.labels[part], index)
                    done += len(images)
                    index += len(images)
                continue
            if not waiting:
                most = min(self._chunk, self._room(index))
            waiting.append(item)
            waiting_bytes += len(item.data)
            if len(waiting) == most or waiting_bytes > DECODE_CHUNK_BYTES:
                self._begin_processes(index)
                yield partial(self._files, waiting, index)
                index, waiting, waiting_bytes = index + len(waiting), [], 0
        if waiting:
            yield partial(self._files, waiting, index)

    @property
    def _chunk(self) -> int:
        """How many files a thread takes at once."""
        if self.prep.resize == "whole":
            return min(DECODE_CHUNK, max(HELD_BYTES // self._most_kept, 1))
        left = DECODED_CHUNK_BYTES // (3 * self.prep.size**2 * max(self.prep.views, 1))
        return max(DECODE_CHUNK, min(left, int(DECODE_SECONDS / self._seconds)))

    @property
    def _most_kept(self) -> int:
        """Bytes that are left of a picture, at most; 1 where they are few."""
        return MOST_RATIO * self.prep.size**2 * 3 if self.prep.resize == "whole" else 1

    def _held_by(self, job: partial[Chunk]) -> int:
        """The bytes of encoded pictures in a chunk, and of what whole ones become."""
        files = job.args[0]
        if not isinstance(files, list):
            return 0
        kept = len(files) * self._most_kept
        return kept + sum(len(file.data) for file in files if isinstance(file.data, bytes))

    def _items(self) -> Iterator[Pixels | ImageFile]:
        if self.rows is None:
            return self.source.read(self.start, self.stop)
        return picked(self.source, self.rows[self.start : self.stop])

    def _numbers(self, index: int, count: int) -> np.ndarray:
        """The numbers in the source of `count` images, from the one at `index` on."""
        return np.arange(index, index + count) if self.rows is None else self.rows[index : index + count]

    def _room(self, index: int) -> int:
        return self.batch_size - (index - self.start) % self.batch_size

    def _arrays(self, images: np.ndarray, labels: np.ndarray | None, index: int) -> Chunk:
        count, numbers = len(images), self._numbers(index, len(images))
        if labels is not None and self.prep.on_error == "skip" and (labels == -1).any():
            has = labels != -1
            images, labels, numbers = images[has], labels[has], numbers[has]
        tally = Counter(images=len(images), grey=len(images) * (images.ndim == 3), skipped=count - len(images))
        if self.prep.is_ready(images) or not len(images):
            size = (self.prep.size, self.prep.size)
            rows = images if len(images) else np.empty((0, *size, 3), np.uint8)
            return self.maker.of_rows(three_channels(rows), labels, numbers, count, tally)
        if min(images.shape[1:3]) < MIN_SIDE:
            raise PixseqError(f"{shown(self.source.path)} has pictures of {images.shape[2]} x {images.shape[1]} pixels")
        views = max(self.prep.views, 1)
        labels = None if labels is None else np.repeat(labels, views)
        return self.maker.of_rows(self.prep.rows(images, numbers), labels, np.repeat(numbers, views), count, tally)

    def _files(self, files: list[ImageFile], index: int) -> Chunk:
        begin, numbers, processes = time.perf_counter(), self._numbers(index, len(files)), self.processes
        chunk = processes.chunk(files, numbers, self.room) if processes else None
        chunk = chunk or self.maker.chunk(files, numbers, self.room)
        self._seconds = (time.perf_counter() - begin) / len(files)
        return chunk

    def _begin_processes(self, index: int) -> None:
        """Once many files were met, or are known to follow, if there is more than one core to use."""
        known = self.source.count if self.rows is None else len(self.rows)
        left = min(known or 0, self.stop or math.inf) - index
        if self.processes is None and max(index - self.start, left) >= WORTH:
            count = min(self.workers, usable_cores())  # more threads may wait for a disk
            if count > 1:
                self.processes = Processes(count, self.maker)

    def _end_processes(self) -> None:
        processes, self.processes = self.processes, None
        if processes is not None:
            processes.end()
