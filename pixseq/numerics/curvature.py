"""The covariance of rows by its eigenvectors: what is known of a regression's curvature before its first step.

Wide rows, more features than rows, are turned into axes of their own, which loses nothing.
Shapes: n rows, D features, K classes, r directions of the eigendecomposition.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixseq.numerics.blocks import Rows
from pixseq.streams import Stream

FULL_SIDE = 2048  # features of G, or wide rows, up to which all eigenvectors are found
SKETCHED = 512  # directions of G beyond that


class Spectrum(NamedTuple):
    """G = Q diag(values) Q' on the directions Q [D, r], and about `rest` on all others."""

    Q: Tensor | None  # None: the axes themselves
    values: Tensor
    rest: float | None  # None: there are no others

    def solve(self, right: Tensor, shares: Tensor, ridge: float) -> Tensor:
        """(shares_k G + ridge)^-1 applied to column k of `right` [D, K] float64."""
        scale = 1 / (self.values[:, None] * shares + ridge)
        if self.Q is None:
            return right * scale
        along = self.Q.T @ right.to(self.Q.dtype)
        if self.rest is None:
            return (self.Q @ (along * scale).to(self.Q.dtype)).double()
        others = 1 / (self.rest * shares + ridge)
        return right * others + (self.Q @ (along * (scale - others)).to(self.Q.dtype)).double()


def spectrum(rows: Rows) -> Spectrum:
    """Of the covariance of the rows: all of it, or of wide ones a sketch."""
    mean = rows.mean.to(rows.dtype)
    if rows.D > FULL_SIDE:
        return _sketch(rows, mean)
    gram = sum(rows.map(lambda X, _: ((X - mean).T @ (X - mean)).double())) / rows.n
    values, Q = torch.linalg.eigh(gram.to(rows.dtype))
    return Spectrum(Q, values.double().clamp_min(0), None)


def are_wide(X: np.ndarray) -> bool:
    """Whether rows are so few that they are turned into axes of their own, see `narrowed`."""
    return len(X) < X.shape[1] and len(X) <= FULL_SIDE


def narrowed(X: np.ndarray, device: str) -> tuple[np.ndarray, Tensor, Spectrum]:
    """Rows [n, D] of more features than rows -> the same rows in axes of their own, float64 [n, r], these axes [D, r]
    and the curvature.

    Exact: the best weights lie where the rows do, so r < n coordinates tell them.
    """
    centred = torch.from_numpy(X).to(device).double()
    centred -= centred.mean(0)
    values, U = torch.linalg.eigh(centred @ centred.T)
    kept = values > 1e-12 * values[-1]
    kept[-1] = True  # also of rows that are all equal
    sizes = values[kept].clamp_min(0).sqrt()
    axes = centred.T @ (U[:, kept] / sizes.clamp_min(1e-100))
    return (U[:, kept] * sizes).cpu().numpy(), axes, Spectrum(None, sizes**2 / len(X), None)


def _sketch(rows: Rows, mean: Tensor) -> Spectrum:
    """Nystrom's approximation from G's product with random directions (Frangella, Tropp and Udell 2023, algorithm 2.1).

    The least value found stands for all directions left out: rather too large, which costs steps, than too small.
    """
    rng = np.random.default_rng([0, Stream.CURVATURE_SKETCH])
    drawn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((rows.D, SKETCHED))))[0].to(rows.device)
    narrow = drawn.to(rows.dtype)
    Y = sum(rows.map(lambda X, _: ((X - mean).T @ ((X - mean) @ narrow)).double())) / rows.n
    shift = torch.finfo(rows.dtype).eps * Y.norm()
    Y = Y + shift * drawn
    core = drawn.T @ Y
    lower = torch.linalg.cholesky((core + core.T) / 2 + shift * torch.eye(SKETCHED, device=rows.device))
    Q, singular, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, Y.T, upper=False).T, full_matrices=False)
    values = (singular**2 - shift).clamp_min(0)
    return Spectrum(Q.to(rows.dtype), values, float(values[-1]))
