"""A part of a source: what must be known to choose it, and a stream of just the images chosen."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from pixseq.data.records import ImageFile, Pixels, Source

FAR = 256  # images between two that are wanted, from which on seeking pays


def survey(source: Source) -> tuple[int, np.ndarray | None]:
    """How many images a source holds, and the class of each, [count], or None where it has none.

    A source that does not know them in advance (`knows`) is read once, and no picture is decoded.
    """
    if source.count is not None and knows(source):
        return source.count, source.labels() if source.has_labels and source.labels is not None else None
    count, labels = 0, array("q")
    for item in source.read(0, None):
        count += len(item.images) if isinstance(item, Pixels) else 1
        if not source.has_labels:
            continue
        if isinstance(item, Pixels):
            assert item.labels is not None
            labels.extend(item.labels.tolist())
        else:
            labels.append(-1 if item.label is None else item.label)
    return count, np.array(labels, dtype=np.int64) if source.has_labels else None


def knows(source: Source) -> bool:
    """Whether `survey` costs no pass over the pictures."""
    return source.count is not None and (source.labels is not None or not source.has_labels)


def picked(source: Source, rows: np.ndarray) -> Iterator[Pixels | ImageFile]:
    """The images numbered `rows` (ascending), in one pass; long stretches between them are skipped where possible."""
    if not len(rows):
        return
    for part in stretches(rows) if source.seeks else [rows]:
        first = int(part[0])
        yield from _kept(source.read(first, int(part[-1]) + 1), part - first)


def stretches(rows: np.ndarray) -> list[np.ndarray]:
    """Ascending `rows` cut where the next one is far."""
    return np.split(rows, np.flatnonzero(np.diff(rows) > FAR) + 1)


def _kept(items: Iterator[Pixels | ImageFile], wanted: np.ndarray) -> Iterator[Pixels | ImageFile]:
    """Of a stream of images, those at the places `wanted` (ascending)."""
    place = done = 0
    for item in items:
        if isinstance(item, ImageFile):
            if done < len(wanted) and wanted[done] == place:
                yield item
                done += 1
            place += 1
            continue
        stop = int(np.searchsorted(wanted, place + len(item.images)))
        if stop - done == len(item.images):
            yield item
        elif stop > done:
            rows = wanted[done:stop] - place
            yield Pixels(item.images[rows], None if item.labels is None else item.labels[rows])
        done, place = stop, place + len(item.images)
