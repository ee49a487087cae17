"""How far apart two feature sets lie: the Fréchet distance of their Gaussians, and KID beside it.

The distance is |m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means m and covariances S over n - 1 (Heusel et
al. 2017, eq. 6). No matrix root is needed for its trace. Where S_a = F_a' F_a and S_b = F_b' F_b, the eigenvalues of
S_a S_b are the squared singular values of F_a F_b', for any such factors F:

- "cross-Gram", where a set has no more rows than features: F is then the centred rows themselves, F_a F_b' the Gram
  matrix between the sets, and the trace the sum of its singular values. Of a larger set beside it F is as below.
- "eigenvalues", where both have more: F_a is the Cholesky factor of S_a, and the eigenvalues of the symmetric
  F_a S_b F_a' are those of S_a^(1/2) S_b S_a^(1/2). Pivoted, so that a singular S_a is no exception: features behind a
  layer norm obey a linear equation. A root by eigh costs more and keeps fewer digits of ill-conditioned features.

Two samples of one Gaussian lie apart too, by up to about d / (2 n) of their total variance, since S is only estimated.
KID, the squared maximum mean discrepancy of a polynomial kernel (Bińkowski et al. 2018), is unbiased at every n.

Shapes: a is [n, d], b is [m, d], of any real type and finite; all sums are float64, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 1024  # rows made float64 at once


@dataclass(frozen=True)
class Kid:
    """`se` is the standard error; None where a set has fewer than three rows."""

    value: float
    se: float | None


def form(n: int, m: int, d: int) -> str:
    """Which form `frechet_distance` takes: "eigenvalues" or "cross-Gram"."""
    return "eigenvalues" if min(n, m) > d else "cross-Gram"


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """In squared units of the features. Both sets need two rows or more."""
    mean_a, mean_b = _mean(a), _mean(b)
    shift = float(((mean_a - mean_b) ** 2).sum())
    if form(len(a), len(b), a.shape[1]) == "eigenvalues":
        covariance_a, covariance_b = _covariance(a, mean_a), _covariance(b, mean_b)
        variance = np.trace(covariance_a) + np.trace(covariance_b)
        root = np.sqrt(_eigenvalues(covariance_a, covariance_b).clip(min=0)).sum()  # rounding makes zeros negative
    else:
        factor_a, factor_b = _factor(a, mean_a), _factor(b, mean_b)
        variance = (factor_a**2).sum() + (factor_b**2).sum()
        root = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return max(shift + float(variance) - 2 * float(root), 0.0)


def kid(a: np.ndarray, b: np.ndarray) -> Kid:
    """The unbiased estimate of MMD^2 under the kernel (x.y / d + 1)^3, over all pairs: it may be negative.

    The standard error is the jackknife's, from the estimates that leave out one row of a or one of b. It is too large
    by up to the root of two where the two distributions are equal.
    """
    n, m = len(a), len(b)
    within_a, within_b = _sums_within(a), _sums_within(b)  # [n], [m]: sums over the other rows of the same set
    across_a, across_b = _sums_across(a, b)  # [n], [m]: sums over the rows of the other set
    all_a, all_b, across = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = all_a / (n * (n - 1)), all_b / (m * (m - 1))
    value = float(mean_a + mean_b - 2 * across / (n * m))
    if min(n, m) < 3:
        return Kid(value, None)
    less_a = (all_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b - 2 * (across - across_a) / ((n - 1) * m)
    less_b = mean_a + (all_b - 2 * within_b) / ((m - 1) * (m - 2)) - 2 * (across - across_b) / (n * (m - 1))
    return Kid(value, float(np.sqrt((n - 1) * less_a.var() + (m - 1) * less_b.var())))


# ---- the two factors


def _mean(x: np.ndarray) -> np.ndarray:
    return sum(block.sum(axis=0) for _, block in _blocks(x)) / len(x)


def _covariance(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """[d, d]."""
    total = np.zeros((len(mean), len(mean)))
    for _, block in _blocks(x):
        centred = block - mean
        total += centred.T @ centred
    return total / (len(x) - 1)


def _eigenvalues(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of first @ second, both covariances [d, d]: of the symmetric L' second L, where first = L L'."""
    from scipy.linalg.lapack import dsygst

    lower, order, _ = _cholesky(first)
    product, _ = dsygst(second[order][:, order].T, lower, itype=2, lower=1, overwrite_a=1)
    return np.linalg.eigvalsh(product, UPLO="L")


def _factor(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """F with F' F the covariance, [min(n, d) or fewer, d]."""
    if len(x) <= len(mean):
        return (x.astype(np.float64) - mean) / np.sqrt(len(x) - 1)
    lower, order, rank = _cholesky(_covariance(x, mean))
    factor = np.empty((rank, len(mean)))
    factor[:, order] = np.tril(lower)[:, :rank].T
    return factor


def _cholesky(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(L [d, d], order [d], rank): covariance[order][:, order] = L L', where L has zeros in all columns from `rank` on.

    Above its diagonal stands what LAPACK leaves there.
    """
    from scipy.linalg.lapack import dpstrf

    lower, pivots, rank, _ = dpstrf(covariance.T, lower=1)  # transposed: the layout of LAPACK, not copied to it
    lower[:, rank:] = 0
    return lower, pivots - 1, int(rank)


# ---- kernel sums


def _blocks(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows as float64, and where they stand."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        yield rows, x[rows].astype(np.float64)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner


def _sums_within(x: np.ndarray) -> np.ndarray:
    """For each row, the sum of its kernel with all others: [n]."""
    sums = np.zeros(len(x))
    for here, left in _blocks(x):
        for there, right in _blocks(x[: here.stop]):
            values = _kernel(left, right)
            if there == here:
                np.fill_diagonal(values, 0)
            else:
                sums[there] += values.sum(axis=0)
            sums[here] += values.sum(axis=1)
    return sums


def _sums_across(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel over the rows of the other set: [n], [m]."""
    of_x, of_y = np.zeros(len(x)), np.zeros(len(y))
    for here, left in _blocks(x):
        for there, right in _blocks(y):
            values = _kernel(left, right)
            of_x[here] += values.sum(axis=1)
            of_y[there] += values.sum(axis=0)
    return of_x, of_y
