"""The digits embedded in scikit-learn, 1,797 handwritten ones of 8x8: the sources that need no download.

`digits` are they as they come. `digits-placed` are the same ones at random places of a larger canvas, where the value
of a pixel says little and the shape of the strokes all: what raw pixels cannot tell, and a model has to learn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pixseq.data.records import Pixels, Source, pick_split
from pixseq.streams import Stream

TRAIN = 1437  # the first 1,437 images; the last 360 are the test. Not shuffled: neighbours often come from one hand.
SIDE = 8
CLASSES = [str(digit) for digit in range(10)]
FROM = "scikit-learn"  # where the labels come from

# of digits-placed
CANVAS = 12  # its side
PLACEMENTS = {"train": 3, "test": 1}  # of each digit, all at different places
SEED = 0  # fixed, as the pictures of any other source are


def open_digits(split: str) -> Source:
    split = pick_split("digits", ("train", "test"), split)

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        yield Pixels(*(each[start:stop] for each in _load(split)))

    def labels() -> np.ndarray:
        return _load(split)[1]

    count = _count(split)
    return Source("digits", "digits", split, count, CLASSES, True, read, labels=labels, labels_from=FROM, shares=True)


def open_placed(split: str) -> Source:
    """Every digit of the split once, each at a place of its own, then every digit again at another place."""
    split = pick_split("digits-placed", ("train", "test"), split)
    times = PLACEMENTS[split]

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        images, labels = _load(split)
        yield Pixels(placed(images, times)[start:stop], np.tile(labels, times)[start:stop])

    def labels() -> np.ndarray:
        return np.tile(_load(split)[1], times)

    def shows() -> np.ndarray:
        return np.tile(np.arange(_count(split)), times)

    return Source(
        name="digits-placed",
        path="digits-placed",
        split=split,
        count=times * _count(split),
        class_names=CLASSES,
        has_labels=True,
        read=read,
        labels=labels,
        labels_from=FROM,
        shares=True,
        shows=shows if times > 1 else None,
        recipe={"canvas": CANVAS, "placements": times, "seed": SEED},
    )


def placed(images: np.ndarray, times: int) -> np.ndarray:
    """uint8 [times * N, CANVAS, CANVAS] of images [N, 8, 8]: black around each, which lies whole inside.

    The `times` places of one image are different ones of the 25.
    """
    room = CANVAS - SIDE + 1  # places along a side
    rng = np.random.default_rng([SEED, len(images), Stream.DIGIT_PLACES])
    places = rng.permuted(np.tile(np.arange(room**2), (len(images), 1)), axis=1)[:, :times].T.ravel()
    out = np.zeros((times * len(images), CANVAS, CANVAS), np.uint8)
    for canvas, image, place in zip(out, np.tile(images, (times, 1, 1)), places):
        top, left = divmod(place, room)
        canvas[top : top + SIDE, left : left + SIDE] = image
    return out


def _load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 8, 8] and their labels [N], from scikit-learn's file: to import it takes a second."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None  # it is required
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", np.uint8, delimiter=",")
    rows = table[:TRAIN] if split == "train" else table[TRAIN:]
    images = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
    return images.reshape(-1, SIDE, SIDE), rows[:, -1].astype(np.int64)


def _count(split: str) -> int:
    return TRAIN if split == "train" else 360
