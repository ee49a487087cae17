"""The digits embedded in scikit-learn: 1,797 handwritten 8x8 digits, the source that needs no download."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pixseq.data.records import Pixels, Source, pick_split

TRAIN = 1437  # the first 1,437 images; the last 360 are the test. Not shuffled: neighbours often come from one hand.


def open_digits(split: str) -> Source:
    split = pick_split("digits", ("train", "test"), split)

    rows = slice(0, TRAIN) if split == "train" else slice(TRAIN, None)

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
        yield Pixels(images[rows][start:stop], bunch.target[rows][start:stop])

    def labels() -> np.ndarray:
        from sklearn.datasets import load_digits

        return load_digits().target[rows]

    names = [str(digit) for digit in range(10)]
    count = TRAIN if split == "train" else 360
    why = "scikit-learn"
    return Source("digits", "digits", split, count, names, True, read, labels=labels, labels_from=why, shares=True)
