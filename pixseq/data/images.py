"""From a source to batches of uint8 pictures, square or whole: they are read, decoded and prepared side by side.

Shapes: B source images a batch, N = B * max(views, 1) rows, S the side, P the pixels of all rows of a batch together.
The same pictures come out whatever the number of worker threads and wherever reading starts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pixseq.bounded.room import Room
from pixseq.data.decode import MIN_SIDE, BadPicture, decode, prepare_process
from pixseq.data.picking import picked
from pixseq.data.pictures import joined
from pixseq.data.preparation import Preparation
from pixseq.data.records import ImageFile, Pixels, Source
from pixseq.data.resample import three_channels
from pixseq.errors import PixseqError
from pixseq.text import shown

DECODE_CHUNK = 16  # files a thread takes at once: enough to hide the hand-over
DECODE_CHUNK_BYTES = 16 << 20  # ... or this much, so that few large files are not many in flight
IN_FLIGHT_BYTES = 256 << 20  # of encoded pictures that wait for their turn, of whatever size each is
DECODED_BYTES = 640 << 20  # of pictures that unfold to far more than their files have: the others wait
HELD_BYTES = 32 << 20  # of whole pictures that are held at once, or one
MOST_RATIO = 16  # of the sides of a picture that stays whole: of longer ones a chunk would take gigabytes
RESIZE_CHUNK = 256
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


@dataclass(frozen=True)
class _Result:
    """What one chunk of `count` source images became; fewer rows where pictures were skipped."""

    images: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray
    count: int
    tally: Counter = field(default_factory=Counter)
    problems: tuple[str, ...] = ()
    shapes: np.ndarray | None = None  # of whole pictures, see ImageBatch


class Reader:
    """Streams images [start, start + limit) of a source as batches of `batch_size` source images, prepared.

    `rows` are the numbers of the images that are wanted, ascending; None: all. Start and limit then count among them.
    Memory holds a batch and a bounded number of chunks in flight. `workers` threads decode and resize (Pillow lets go
    of the GIL); 0 works in the caller's. `counts` says what was met so far (images, skipped, exif_rotated,
    alpha_composited, sixteen_bit, cmyk, grey, animated_first_frame; only what occurred), `problems` the first pictures
    skipped. Raises PixseqError for a bad picture (unless on_error is skip) and for labels outside the classes.
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
        prepare_process(prep.max_pixels)

    def __iter__(self) -> Iterator[ImageBatch]:
        tally: Counter = Counter()
        self.counts, self.problems = {}, []
        held: list[_Result] = []
        index = self.start
        for result in self._results():
            held.append(result)
            index += result.count
            tally += result.tally
            self.counts = dict(tally)
            self.problems += result.problems[: KEPT_PROBLEMS - len(self.problems)]
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

    def _batch(self, held: list[_Result], stop: int) -> Iterator[ImageBatch]:
        """At most one batch: none, if all its pictures were skipped."""
        some = [result.images for result in held if len(result.images)]
        if not some:
            return
        images = np.concatenate(some) if len(some) > 1 else some[0]  # most are one, and large
        labels = None
        if self.source.has_labels:
            labels = np.concatenate([result.labels for result in held])
            most = len(self.source.class_names or ()) or np.iinfo(np.int32).max
            wrong = labels[(labels < 0) | (labels >= most)]
            if len(wrong):
                raise PixseqError(
                    f"{shown(self.source.path)} has the label {wrong[0]}, but its classes are 0 to {most - 1}",
                    "mend the labels, or leave them out",
                )
        numbers = np.concatenate([result.numbers for result in held]).astype(np.int32)
        shapes = np.concatenate([result.shapes for result in held]) if self.prep.resize == "whole" else None
        yield ImageBatch(images, None if labels is None else labels.astype(np.int32), numbers, stop, shapes)

    def _results(self) -> Iterator[_Result]:
        """The chunks' results in order, at most a few chunks ahead of the one asked for."""
        if self.workers == 0:
            for job in self._jobs():
                yield job()
            return
        window: deque[tuple[Future[_Result], int]] = deque()
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

    def _jobs(self) -> Iterator[partial[_Result]]:
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
                yield partial(self._files, waiting, index)
                index, waiting, waiting_bytes = index + len(waiting), [], 0
        if waiting:
            yield partial(self._files, waiting, index)

    @property
    def _chunk(self) -> int:
        """How many files a thread takes at once."""
        return min(DECODE_CHUNK, max(HELD_BYTES // self._most_kept, 1))

    @property
    def _most_kept(self) -> int:
        """Bytes that are left of a picture, at most; 1 where they are few."""
        return MOST_RATIO * self.prep.size**2 * 3 if self.prep.resize == "whole" else 1

    def _held_by(self, job: partial[_Result]) -> int:
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

    def _arrays(self, images: np.ndarray, labels: np.ndarray | None, index: int) -> _Result:
        count, numbers = len(images), self._numbers(index, len(images))
        if labels is not None and self.prep.on_error == "skip" and (labels == -1).any():
            has = labels != -1
            images, labels, numbers = images[has], labels[has], numbers[has]
        tally = Counter(images=len(images), grey=len(images) * (images.ndim == 3), skipped=count - len(images))
        if self.prep.is_ready(images) or not len(images):
            size = (self.prep.size, self.prep.size)
            rows = images if len(images) else np.empty((0, *size, 3), np.uint8)
            return self._result(three_channels(rows), labels, numbers, count, tally)
        if min(images.shape[1:3]) < MIN_SIDE:
            raise PixseqError(f"{shown(self.source.path)} has pictures of {images.shape[2]} x {images.shape[1]} pixels")
        views = max(self.prep.views, 1)
        labels = None if labels is None else np.repeat(labels, views)
        return self._result(self.prep.rows(images, numbers), labels, np.repeat(numbers, views), count, tally)

    def _result(
        self,
        rows: Iterable[np.ndarray],
        labels: np.ndarray | None,
        numbers: np.ndarray,
        count: int,
        tally: Counter,
        *problems: str,
    ) -> _Result:
        """`rows` are uint8 [N, S, S, 3], or N pictures [h, w, 3] where they stay whole."""
        if self.prep.resize != "whole":
            squares = np.asarray(rows, np.uint8).reshape(-1, self.prep.size, self.prep.size, 3)
            return _Result(squares, labels, numbers, count, tally, problems)
        pixels, shapes = joined(rows)
        return _Result(pixels, labels, numbers, count, tally, problems, shapes)

    def _files(self, files: list[ImageFile], index: int) -> _Result:
        rows: list[np.ndarray] = []
        labels: list[int | None] = []
        numbers: list[int] = []
        problems: list[str] = []
        tally: Counter[str] = Counter()
        for file, number in zip(files, self._numbers(index, len(files))):
            try:
                if self.source.has_labels and file.label is None:
                    raise BadPicture("it has no label, unlike others")
                with self.room.entered() as take:
                    new, done = self._decoded(file, number, take)
            except BadPicture as error:
                problem = f"{shown(file.name)}: {shown(error)}"
                if self.prep.on_error == "fail":
                    hint = f"{error.hint}, or pass over such pictures with --on-error skip"
                    raise PixseqError(problem, hint) from error
                problems.append(problem)
                tally["skipped"] += 1
                continue
            rows += [*new]
            labels += [file.label] * len(new)
            numbers += [number] * len(new)
            tally.update(["images", *done])
        targets = np.array(labels, dtype=np.int64) if self.source.has_labels else None
        return self._result(rows, targets, np.array(numbers, dtype=np.int64), len(files), tally, *problems)

    def _decoded(self, file: ImageFile, number: int, take: Callable[[int], None]) -> tuple[np.ndarray, list[str]]:
        """The rows of a file, and what was done to it: the whole picture is let go of on return."""
        image, done = decode(file.data, self.prep.backdrop, self.prep.max_pixels, self.prep.bit_depth, take)
        if self.prep.resize == "whole" and max(image.size) > MOST_RATIO * min(image.size):
            raise BadPicture(
                f"{image.width} x {image.height} pixels: whole pictures are at most {MOST_RATIO} times as long as wide",
                "cut it up, or encode squares with --resize crop",
            )
        return self.prep.rows(image, [number]), done
