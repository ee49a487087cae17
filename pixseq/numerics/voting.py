"""The class of what has several predictions: the modal one (Image GPT §4.6), ties broken at random.

Shapes: n views, M predictions of each, K classes.
"""

from __future__ import annotations

import numpy as np

from pixseq.streams import Stream

CELLS_AT_ONCE = 1 << 23  # of a table of views against classes


def accuracy(predictions: np.ndarray, labels: np.ndarray, masks: int, seed: int) -> float:
    """Share of the labels [n] that are voted for; `predictions` [n * M] are by row."""
    return float((vote(predictions, masks, np.random.default_rng([seed, Stream.PROBE_TIE])) == labels).mean())


def vote(predictions: np.ndarray, masks: int, rng: np.random.Generator) -> np.ndarray:
    """Classes [n * M] -> the most frequent class of each M consecutive ones, [n]; ties are broken at random."""
    if masks == 1:
        return predictions
    classes, votes = np.unique(predictions, return_inverse=True)
    votes, found = votes.reshape(-1, masks), np.empty(len(predictions) // masks, classes.dtype)
    block = max(1, CELLS_AT_ONCE // len(classes))
    for start in range(0, len(votes), block):
        counts = tally(votes[start : start + block], None, len(classes))
        counts = counts + rng.random(counts.shape)  # less than one vote: it decides only between equals
        found[start : start + block] = classes[counts.argmax(axis=1)]
    return found


def elected(predictions: np.ndarray, masks: int, seed: int, first: int) -> np.ndarray:
    """As `vote`, of images from number `first` on: each breaks ties by its own stream, so that no batch matters."""
    if masks == 1:
        return predictions
    counts = tally(predictions.reshape(-1, masks), None, int(predictions.max()) + 1)
    streams = (np.random.default_rng([seed, first + i, Stream.EVALUATION_TIE]) for i in range(len(counts)))
    return (counts + np.stack([stream.random(counts.shape[1]) for stream in streams])).argmax(axis=1)


def tally(classes: np.ndarray, weights: np.ndarray | None, K: int) -> np.ndarray:
    """Classes from 0 to K - 1 and their weights [n, M], None for ones -> summed weight of each class [n, K]."""
    n = len(classes)
    cells = np.arange(n)[:, None] * K + classes
    return np.bincount(cells.ravel(), None if weights is None else weights.ravel(), minlength=n * K).reshape(n, K)
