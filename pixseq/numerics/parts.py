"""Which rows stand for all of them, where a part is taken: of every class alike its share, from all over the set.

Class folders are sorted by class and video frames by time, so the first rows of a set are never a fair part of it.
Shapes: n rows, K classes; rows that are chosen are numbers from 0 to n - 1, ascending.
"""

from __future__ import annotations

import numpy as np

from pixseq.streams import Stream


def choose_rows(n: int, wanted: int, labels: np.ndarray | None = None) -> np.ndarray:
    """`wanted` of `n` rows, all of them where there are no more: int64 [min(wanted, n)].

    With `labels` [n] every class has its share (see `shares`), and its rows lie evenly spread over those of the class;
    without, rows lie evenly spread over all. Nothing is drawn, so that the same rows stand for the same set everywhere.
    """
    if wanted >= n:
        return np.arange(n)
    if labels is None:
        return _spread(n, wanted)
    rows, counts = _by_class(labels)
    parts = np.split(rows, np.cumsum(counts)[:-1])
    return np.sort(np.concatenate([part[_spread(len(part), k)] for part, k in zip(parts, shares(counts, wanted))]))


def is_mixed(labels: np.ndarray) -> bool:
    """Whether the classes `labels` [n] follow each other as in a shuffled set, so that its first rows are a fair part:
    as many neighbours differ as would by chance, less three deviations of that, and more than in a sorted set.
    """
    n, (_, counts) = len(labels), np.unique(labels, return_counts=True)
    chance = 1 - ((counts / n) ** 2).sum()
    least = chance * (n - 1) - 3 * np.sqrt(n * chance * (1 - chance))
    return bool(np.count_nonzero(np.diff(labels)) >= max(least, len(counts)))


def hold_out(n: int, fraction: float, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """A random part of `n` rows, for validation: at least one row, never all of them, and set by the seed alone.

    With `labels` [n] every class gives its share, and keeps at least one row.
    """
    wanted = min(max(round(n * fraction), 1), n - 1)
    rng = np.random.default_rng([seed, 0, Stream.HELD_OUT])
    if labels is not None:
        rows, counts = _by_class(labels)
        room = counts - 1
        if room.any():
            parts = np.split(rows, np.cumsum(counts)[:-1])
            given = shares(room, min(wanted, int(room.sum())))
            return np.sort(np.concatenate([rng.permutation(part)[:k] for part, k in zip(parts, given)]))
    return np.sort(rng.permutation(n)[:wanted])


def split_validation(
    n: int, fraction: float, seed: int, images: np.ndarray | None = None, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of train and of validation, sorted: a random part of at least one image each, set by the seed alone.

    `images` [n] says which image each row shows: all rows of one go to the same side. None: each row its own. With
    `labels` [n] every class gives its share, by `hold_out`. Raises ValueError where there is one image only.
    """
    names, first, images = np.unique(np.arange(n) if images is None else images, return_index=True, return_inverse=True)
    count = len(names)
    if count < 2:
        raise ValueError("one image leaves none to hold out")
    if labels is None:
        drawn = np.random.default_rng([seed, 0, Stream.VALIDATION_SPLIT]).permutation(count)
        held = drawn[: min(max(round(count * fraction), 1), count - 1)]
    else:
        held = hold_out(count, fraction, labels[first], seed)
    apart = np.isin(images, held)
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def two_samples(
    n: int, size: int, labels: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two random samples of `size` <= n // 2 rows each, without a row in common: int64 [size] each.

    With `labels` [n] every class has its share of both, and in one at most a row more than in the other.
    """
    order = rng.permutation(n)
    if labels is None:
        return order[:size], order[size : 2 * size]
    taken = order[choose_rows(n, 2 * size, labels[order])]
    by_class = taken[np.argsort(labels[taken], kind="stable")]
    return by_class[::2], by_class[1::2]


def shares(counts: np.ndarray, wanted: int) -> np.ndarray:
    """`wanted` <= sum(counts) divided among classes of `counts` [K] in proportion, each rounded up or down: int64 [K].

    Where there are enough for it, a class whose share rounds to nothing gets one all the same.
    """
    small = np.zeros(len(counts), bool)
    while True:
        given = np.where(small, 1, _rounded(np.where(small, 0, counts), wanted - int(small.sum())))
        missing = (given == 0) & (counts > 0)
        if wanted < np.count_nonzero(counts) or not missing.any():
            return given
        small |= missing


def _rounded(counts: np.ndarray, wanted: int) -> np.ndarray:
    """Proportional shares that sum to `wanted`: differences of the rounded cumulative ones."""
    ends, total = np.cumsum(counts, dtype=np.int64), max(int(counts.sum()), 1)
    return np.diff((2 * ends * wanted + total) // (2 * total), prepend=0)


def _spread(n: int, wanted: int) -> np.ndarray:
    """The first of each of `wanted` equal stretches of `n` rows."""
    return np.arange(wanted, dtype=np.int64) * n // max(wanted, 1)


def _by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows class by class, ascending within one, and how many a class has."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.argsort(classes, kind="stable"), counts
