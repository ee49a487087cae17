"""k-means of some ten thousand weighted points, to the very bits of scikit-learn's on one thread, by all cores.

Greedy k-means++ (Arthur and Vassilvitskii 2007, with several candidates a centre), then Lloyd's steps until the centres
hardly move. Whose point is whose is found side by side, and sums are added in the order of the points: the number of
threads changes no bit. Palettes that scikit-learn started keep their ids, and it need not be imported.

Shapes: points [n, 3] float64, weights [n] above 0, K centres.
"""

from __future__ import annotations

import numpy as np

from pixseq.cores import threads, usable_cores

MAX_ITER, TOLERANCE = 300, 1e-4  # steps; and the squared shift of all centres, as a share of the variance
ROWS = 256  # compared with all centres at once: a megabyte of distances, which stays in cache


def weighted_kmeans(points: np.ndarray, weights: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres [K, 3] of at least as many points."""
    tolerance = np.var(points, axis=0).mean() * TOLERANCE
    mean = points.mean(axis=0)
    centred = points - mean
    centres = _plus_plus(centred, weights, clusters, np.random.RandomState(seed))
    return _lloyd(centred, weights, centres, tolerance) + mean


def _plus_plus(points: np.ndarray, weights: np.ndarray, clusters: int, random: np.random.RandomState) -> np.ndarray:
    """Points that lie apart: each next one is the best of some, drawn by their squared distance to those before."""
    squares = np.einsum("ij,ij->i", points, points)

    def distances(chosen: np.ndarray) -> np.ndarray:
        found = -2 * (points[chosen] @ points.T)
        found += squares[chosen][:, None]
        found += squares
        return np.maximum(found, 0, out=found)

    trials = 2 + int(np.log(clusters))
    first = random.choice(len(points), p=weights / weights.sum())
    picked, least = [first], distances(np.array([first]))[0]
    error = least @ weights
    for _ in range(1, clusters):
        drawn = np.searchsorted(np.cumsum(weights * least), random.uniform(size=trials) * error)
        candidates = np.minimum(drawn, len(points) - 1)  # rounding may lead beyond the last
        nearer = distances(candidates)
        np.minimum(least, nearer, out=nearer)
        errors = (nearer @ weights[:, None])[:, 0]
        best = errors.argmin()
        least, error = nearer[best], errors[best]
        picked.append(candidates[best])
    return points[picked]


def _lloyd(points: np.ndarray, weights: np.ndarray, centres: np.ndarray, tolerance: float) -> np.ndarray:
    """Centres after steps that each move them to the means of their points, until no point changes its centre, or the
    centres hardly move.
    """
    weighted = (points * weights[:, None]).T.copy()
    owners = np.full(len(points), -1, np.intp)
    cores = usable_cores()
    share = -(-len(points) // (cores * ROWS)) * ROWS  # whole blocks, the same whatever the number of threads
    starts = range(0, len(points), share)
    with threads(cores) as pool:
        for _ in range(MAX_ITER):
            before, old = owners.copy(), centres
            pool.starmap(_assign, [(points, old, owners, start, start + share) for start in starts])
            counts = np.bincount(owners, weights, len(centres))
            sums = np.stack([np.bincount(owners, values, len(centres)) for values in weighted], axis=1)
            if not counts.all():
                _relocate(points, weights, old, owners, counts, sums)
            centres = sums * (1 / np.where(counts > 0, counts, np.inf))[:, None]
            centres[counts == 0] = centres[counts.argmax()]
            shifts = np.sqrt(((centres - old) ** 2).sum(axis=1))
            if np.array_equal(owners, before) or (shifts**2).sum() <= tolerance:
                break
    return centres


def _assign(points: np.ndarray, centres: np.ndarray, owners: np.ndarray, start: int, stop: int) -> None:
    """Write the nearest centre of each of some points into `owners`; the lowest of equal ones."""
    squares, twice = np.einsum("ij,ij->i", centres, centres), -2 * centres.T
    room = np.empty((ROWS, len(centres)))
    for first in range(start, min(stop, len(points)), ROWS):
        block = points[first : min(first + ROWS, stop)]
        beyond = np.matmul(block, twice, out=room[: len(block)])  # squared distances less the point's own square
        beyond += squares
        beyond.argmin(axis=1, out=owners[first : first + len(block)])


def _relocate(
    points: np.ndarray,
    weights: np.ndarray,
    centres: np.ndarray,
    owners: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Clusters without points take, in place, those that are farthest from their centres."""
    distances = ((points - centres[owners]) ** 2).sum(axis=1)
    empty = np.flatnonzero(counts == 0)
    if distances.max() == 0:
        return
    for cluster, point in zip(empty, np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]):
        moved, weight = points[point] * weights[point], weights[point]
        sums[owners[point]] -= moved
        sums[cluster] = moved
        counts[cluster] = weight
        counts[owners[point]] -= weight
