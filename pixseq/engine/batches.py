"""Which images a step sees, and how they are augmented: pure functions of seed and step.

A resumed run, or one on another number of ranks, therefore sees the same images in the same order.
Shapes: B images, T tokens; a token grid is [rows, columns, channels] with T their product.
"""

from __future__ import annotations

import functools

import numpy as np

from pixseq.streams import Stream

PAD = 4  # pixels of reflection padding, as for CIFAR in §3.1


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """int64 [batch_size]: rows for this step. Epochs are permutations, laid end to end; batches may straddle them."""
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, n)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _permutation(seed, int(epoch), n)[within[here]]
    return rows


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, Stream.BATCH_ORDER]).permutation(n)


WHOLE = slice(None)


def augment(
    tokens: np.ndarray,
    grid: tuple[int, int, int],
    how: str,
    seed: int,
    step: int,
    batch: int | None = None,
    share: slice = WHOLE,
) -> np.ndarray:
    """tokens [B, T] -> [B, T]. "flip": half of them mirrored; "crop-flip": also a random crop of the reflected padding.

    Only pixels move, so that tokens of any palette can be augmented without the pictures they came from. Tokens that
    are the `share` of a larger `batch` are moved as they are in it.
    """
    if how == "none":
        return tokens
    b, (h, w, c) = len(tokens), grid
    rows, columns = places(b, grid, how, seed, step, batch, share)
    moved = tokens.reshape(b, h, w, c)[np.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.reshape(b, -1)


def places(
    b: int, grid: tuple[int, int, int], how: str, seed: int, step: int, batch: int | None, share: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows int [B, H] and the columns int [B, W] of each picture come from when it is augmented."""
    h, w, _ = grid
    rng, batch = np.random.default_rng([seed, step, Stream.TOKEN_AUGMENTATION]), batch or b
    flip = rng.random(batch)[share] < 0.5
    columns = np.where(flip[:, None], np.arange(w)[::-1], np.arange(w))
    rows = np.broadcast_to(np.arange(h), (b, h))
    if how == "crop-flip":
        shift = rng.integers(-PAD, PAD + 1, (2, batch, 1))[:, share]
        rows, columns = _reflected(rows + shift[0], h), _reflected(columns + shift[1], w)
    return rows, columns


def _reflected(index: np.ndarray, n: int) -> np.ndarray:
    """Indices outside [0, n) mirrored at the edges without repeating the edge itself."""
    index = np.abs(index)
    return np.where(index >= n, 2 * (n - 1) - index, index)
