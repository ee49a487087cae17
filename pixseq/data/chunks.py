"""A few files of a source to rows, in one thread or process.

Shapes: N rows, S the side, P the pixels of whole pictures together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pixseq.data.decode import BadPicture, decode
from pixseq.data.pictures import joined
from pixseq.data.preparation import Preparation
from pixseq.data.records import ImageFile
from pixseq.data.resample import sides
from pixseq.errors import PixseqError
from pixseq.text import shown

MOST_RATIO = 16  # of the sides of a picture that stays whole: of longer ones a chunk would take gigabytes


class Shared(Protocol):
    """Memory that is shared with others, see bounded/room.py."""

    def entered(self) -> AbstractContextManager[Callable[[int], None]]: ...


@dataclass(frozen=True)
class Chunk:
    """What `count` source images became; fewer rows where pictures were skipped.

    images uint8 [N, S, S, 3], labels int [N], numbers int [N]; whole pictures have `shapes` int32 [N, 2] and their
    pixels uint8 [P, 3] as `images`.
    """

    images: np.ndarray
    labels: np.ndarray | None
    numbers: np.ndarray
    count: int
    tally: Counter[str] = field(default_factory=Counter)
    problems: tuple[str, ...] = ()
    shapes: np.ndarray | None = None


@dataclass(frozen=True)
class RowMaker:
    """How rows are made of files: all that another process must know."""

    prep: Preparation
    has_labels: bool

    def chunk(self, files: Sequence[ImageFile], numbers: np.ndarray, room: Shared) -> Chunk:
        """Raises PixseqError for a bad picture, unless they are skipped, and where memory does not suffice for one."""
        rows: list[np.ndarray] = []
        labels: list[int | None] = []
        kept: list[int] = []
        problems: list[str] = []
        tally: Counter[str] = Counter()
        for file, number in zip(files, numbers):
            try:
                if self.has_labels and file.label is None:
                    raise BadPicture("it has no label, unlike others")
                with room.entered() as take:
                    new, done = self._decoded(file, number, take)
            except BadPicture as error:
                problem = f"{shown(file.name)}: {shown(error)}"
                if self.prep.on_error == "fail":
                    hint = f"{error.hint}, or pass over such pictures with --on-error skip"
                    raise PixseqError(problem, hint) from error
                problems.append(problem)
                tally["skipped"] += 1
                continue
            except MemoryError as error:  # no fault of the picture's: elsewhere it would not be missing
                raise PixseqError(
                    f"{shown(file.name)}: the memory to decode it could not be allocated",
                    "decode fewer at once (--workers 0), or leave such out by --max-pixels and --on-error skip",
                ) from error
            rows += [*new]
            labels += [file.label] * len(new)
            kept += [number] * len(new)
            for name in ("images", *done):
                tally[name] += 1
        targets = np.array(labels, dtype=np.int64) if self.has_labels else None
        return self.of_rows(rows, targets, np.array(kept, dtype=np.int64), len(files), tally, *problems)

    def of_rows(
        self,
        rows: Iterable[np.ndarray],
        labels: np.ndarray | None,
        numbers: np.ndarray,
        count: int,
        tally: Counter[str],
        *problems: str,
    ) -> Chunk:
        """`rows` are uint8 [N, S, S, 3], or N pictures [h, w, 3] where they stay whole."""
        if self.prep.resize != "whole":
            squares = np.asarray(rows, np.uint8).reshape(-1, self.prep.size, self.prep.size, 3)
            return Chunk(squares, labels, numbers, count, tally, problems)
        pixels, shapes = joined(rows)
        return Chunk(pixels, labels, numbers, count, tally, problems, shapes)

    def _decoded(self, file: ImageFile, number: int, take: Callable[[int], None]) -> tuple[np.ndarray, list[str]]:
        """The rows of a file, and what was done to it: the whole picture is let go of on return."""
        prep = self.prep
        image, done = decode(file.data, prep.backdrop, prep.max_pixels, prep.bit_depth, take)
        width, height = sides(image)
        if prep.resize == "whole" and max(width, height) > MOST_RATIO * min(width, height):
            raise BadPicture(
                f"{width} x {height} pixels: whole pictures are at most {MOST_RATIO} times as long as wide",
                "cut it up, or encode squares with --resize crop",
            )
        return prep.rows(image, [number]), done
