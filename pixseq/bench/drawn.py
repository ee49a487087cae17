"""Data to time with, drawn by a seed: pictures that are as smooth as photographs, tokens, features."""

from __future__ import annotations

import numpy as np

from pixseq.streams import Stream

BLOCK = 1024  # pictures at once, so that drawing takes no more memory than what is drawn


def pictures(count: int, size: int, seed: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: planes of colour that bend a little, and noise."""
    rng = np.random.default_rng([seed, Stream.BENCH_PICTURES])
    made = np.empty((count, size, size, 3), np.uint8)
    places = np.linspace(-1, 1, size, dtype=np.float32)
    waves = np.stack([np.ones_like(places), places, np.cos(3 * places)])
    for first in range(0, count, BLOCK):
        block = made[first : first + BLOCK]
        weights = rng.normal(0, 35, (len(block), 3, 3, 3)).astype(np.float32)
        shades = np.einsum("nabc,ah,bw->nhwc", weights, waves, waves, optimize=True)
        shades += 128 + rng.normal(0, 6, shades.shape).astype(np.float32)
        block[:] = shades.clip(0, 255)
    return made


def tokens(count: int, positions: int, colors: int, seed: int) -> np.ndarray:
    """uint16 [count, positions]: speed does not depend on which they are."""
    return np.random.default_rng([seed, Stream.BENCH_TOKENS]).integers(0, colors, (count, positions), dtype=np.uint16)


def features(count: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [count, width] and labels int32 [count]: classes overlap, and variances fall as a power, along axes that
    lie askew: such features take solvers of first order many steps, as those of real layers do.
    """
    rng = np.random.default_rng([seed, Stream.BENCH_FEATURES])
    labels = rng.permutation(np.arange(count, dtype=np.int32) % classes)
    scales = np.arange(1, width + 1, dtype=np.float32) ** -0.75
    means = rng.normal(0, 1.6 * width**-0.5, (classes, width)).astype(np.float32)
    askew = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    X = np.empty((count, width), np.float32)
    for first in range(0, count, BLOCK):
        rows = slice(first, first + BLOCK)
        inner = rng.normal(size=(len(X[rows]), width)).astype(np.float32) + means[labels[rows]]
        X[rows] = (inner * scales) @ askew
    return X, labels
