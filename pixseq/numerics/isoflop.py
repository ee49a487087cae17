"""IsoFLOP profiles: at each compute budget the best model size by a parabola, and power laws through the optima.

Hoffmann et al. 2022, Approach 2: at a budget C the metric y is fitted by y* + p (log N - log N*)^2; log N* and log D*
are regressed on log C. On a surface E + A N^-alpha + B D^-beta that is exact only where alpha == beta and the sizes lie
evenly around the optimum; elsewhere it is biased, the more the wider the sizes reach (arXiv 2603.22339), which is why
the laws of `laws.py` stand beside it. Least squares would let one diverged run turn a parabola over, so runs far off
the parabola of the others are left out first.

n runs, K budgets, S resamples. N params, D tokens, C FLOPs. Logs are natural. A run's weight is its inverse variance, 1
where nothing is known of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SAME_BUDGET = 0.10  # how far the FLOPs of one budget's runs lie apart: a run has whole steps of whole batches
MIN_RUNS = 4  # three points are met exactly by any parabola, which then says nothing about its own error
MIN_BUDGETS = 3  # two points are met exactly by any power law
FAR = 6.0  # standard errors off the parabola of a budget's other runs: no run of ordinary noise or bend lies there
SCATTERED = 0.02  # of y: runs that lie this far off their parabola, and FAR times as far as elsewhere, tell nothing
PAIRS = 30  # runs of a budget up to which two far ones, which may hide each other, are looked for together
CONSTANT_RATIO = 0.02  # a FLOPs ratio that changes by less than this over all sizes is taken as constant


def group_budgets(flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs [n] -> budgets [K], ascending, and the budget of each run [n].

    In ascending order a run belongs to the open budget while its FLOPs are within SAME_BUDGET of that budget's first.
    A budget's FLOPs are the median of its runs.
    """
    order = np.argsort(flops, kind="stable")
    index, first, k = np.empty(len(flops), int), -np.inf, -1
    for run in order:
        if flops[run] > first * (1 + SAME_BUDGET) or k < 0:
            first, k = flops[run], k + 1
        index[run] = k
    return np.array([np.median(flops[index == k]) for k in range(index.max() + 1)]), index


@dataclass(frozen=True)
class Ratio:
    """log of FLOPs / (6 N D) as a smooth function of log N: 0 everywhere where FLOPs are counted as 6 N D.

    Attention makes it fall with size: 1 + T / (6 d) at width d and T positions. Between shapes of one size it jumps, so
    it is a cubic through all sizes, not an interpolation; outside the sizes it keeps its value at the nearest one.
    """

    low: float
    high: float
    coefficients: np.ndarray  # of a polynomial in (log N - low) / (high - low), highest power first

    @property
    def constant(self) -> bool:
        return len(self.coefficients) == 1

    @property
    def plain(self) -> bool:
        """FLOPs are 6 N D."""
        return self.constant and abs(float(self.coefficients[0])) <= np.log1p(CONSTANT_RATIO)

    def __call__(self, log_n: np.ndarray) -> np.ndarray:
        place = (np.clip(log_n, self.low, self.high) - self.low) / max(self.high - self.low, 1e-12)
        return np.polyval(self.coefficients, place)

    def log_tokens(self, log_c: np.ndarray, log_n: np.ndarray) -> np.ndarray:
        """log D of a model of size N trained with C FLOPs."""
        return log_c - np.log(6) - log_n - self(log_n)


def flops_ratio(params: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> Ratio:
    """The ratio of runs [n], by least squares."""
    log_n = np.log(params)
    log_ratio = np.log(flops) - np.log(6) - log_n - np.log(tokens)
    low, high = float(log_n.min()), float(log_n.max())
    degree = min(3, len(np.unique(params)) - 1)
    if degree:
        place = (log_n - low) / (high - low)
        cubic = Ratio(low, high, np.polyfit(place, log_ratio, degree))
        if np.ptp(cubic(np.linspace(low, high, 50))) > np.log1p(CONSTANT_RATIO):
            return cubic
    return Ratio(low, high, np.array([log_ratio.mean()]))


@dataclass(frozen=True)
class Parabola:
    """y = value + curvature (log N - vertex)^2: floats, or arrays [S] where y was [S, n]. `fitted` [.., n]."""

    vertex: np.ndarray
    value: np.ndarray
    curvature: np.ndarray
    fitted: np.ndarray


def parabola(log_n: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> Parabola:
    """Least squares of y [n] or [S, n] over log N [n], weighted by [n]; at least three different sizes.

    A line's vertex is nan.
    """
    centre = log_n.mean()
    scale = np.abs(log_n - centre).max()
    place = (log_n - centre) / scale
    basis = np.stack([np.ones_like(place), place, place**2])  # [3, n]
    root = np.ones_like(place) if weight is None else np.sqrt(weight)
    r, q, p = np.moveaxis((y * root) @ np.linalg.pinv(basis * root), -1, 0)
    flat = np.abs(p) <= 1e-12 * np.abs(y).max(axis=-1)  # rounding alone
    p = np.where(flat, np.nan, p)
    vertex = -q / (2 * p)
    fitted = np.stack([r, q, np.where(flat, 0, p)], axis=-1) @ basis
    return Parabola(centre + scale * vertex, r - q**2 / (4 * p), np.where(flat, 0, p) / scale**2, fitted)


def power_law(log_c: np.ndarray, log_v: np.ndarray, used: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """v = coefficient C^exponent by least squares of log v [.., K] on log C [K] -> exponent and log coefficient.

    `used` [.., K] leaves budgets out; log v may be nan there. Fewer than two used give nan.
    """
    used = np.ones(log_v.shape, bool) if used is None else used
    count = np.maximum(used.sum(axis=-1, keepdims=True), 1)
    x = np.where(used, log_c, 0)
    v = np.where(used, log_v, 0)
    mean_x, mean_v = x.sum(axis=-1, keepdims=True) / count, v.sum(axis=-1, keepdims=True) / count
    dx, dv = np.where(used, x - mean_x, 0), np.where(used, v - mean_v, 0)
    square = (dx**2).sum(axis=-1)
    exponent = (dx * dv).sum(axis=-1) / np.where(square > 0, square, np.nan)
    return exponent, (mean_v[..., 0] - exponent * mean_x[..., 0])


# ---- runs far off


def far_off(log_n: np.ndarray, y: np.ndarray, index: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs [n] that lie FAR off the parabola of their budget's others, and budgets [K] that are scattered for all that.

    Distances are measured by the noise of all budgets, or of the run's own where that is greater, so that a bend that
    is no parabola's is no fault of a run. A budget keeps MIN_RUNS sizes; where it has no more, a bad run of it cannot
    be told from the others, and the budget is called scattered.
    """
    groups = [np.flatnonzero(index == k) for k in range(index.max() + 1)]
    shares = [_Budget(log_n[at], y[at] / (np.median(np.abs(y[at])) or 1.0), weight[at]) for at in groups]
    fitted = [one for one in shares if one.sizes(()) >= MIN_RUNS]
    far, scattered = np.zeros(len(y), bool), np.zeros(len(groups), bool)
    if not fitted:
        return far, scattered
    whole = np.median([one.noise(()) for one in fitted])
    # Where every budget has a bad run, the noise is that of the others, which one degree of freedom does not tell.
    tell = [one for one in fitted if len(one.y) > MIN_RUNS + 1]
    without = [one.noise(one.least(1)) * (3 if len(one.y) > MIN_RUNS + 2 else 12) for one in tell]
    noise = max(min(whole, np.median(without)) if tell else whole, 1e-6)
    for k, (at, one) in enumerate(zip(groups, shares)):
        if one.sizes(()) >= MIN_RUNS:
            out = one.far(noise)
            far[at[list(out)]] = True
            scattered[k] = one.noise(out) > max(FAR * noise, SCATTERED)
    return far, scattered


@dataclass(frozen=True)
class _Budget:
    """The runs of one budget: log N, y as a share of its median, weight."""

    log_n: np.ndarray
    y: np.ndarray
    weight: np.ndarray

    def kept(self, out: tuple[int, ...]) -> np.ndarray:
        return np.delete(np.arange(len(self.y)), list(out))

    def sizes(self, out: tuple[int, ...]) -> int:
        return len(np.unique(self.log_n[self.kept(out)]))

    def basis(self) -> np.ndarray:
        """[n, 3], weighted."""
        place = (self.log_n - self.log_n.mean()) / np.ptp(self.log_n)
        return np.stack([np.ones_like(place), place, place**2], axis=1) * np.sqrt(self.weight)[:, None]

    def misfit(self, out: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Weighted distances [n] from the parabola of the runs not `out`, and how many deviations each should be."""
        kept, basis = self.kept(out), self.basis()
        y = self.y * np.sqrt(self.weight)
        inverse = np.linalg.pinv(basis[kept])
        return y - basis @ (inverse @ y[kept]), np.sqrt(1 + ((basis @ inverse) ** 2).sum(axis=1))

    def noise(self, out: tuple[int, ...]) -> float:
        """The standard deviation at weight 1; 0 where three runs are kept."""
        kept = self.kept(out)
        return float(np.sqrt((self.misfit(out)[0][kept] ** 2).sum() / max(len(kept) - 3, 1)))

    def least(self, count: int, beside: tuple[int, ...] = ()) -> tuple[int, ...]:
        """`beside` and the `count` runs without which the others lie nearest to a parabola; () where none may go."""
        sets = [(*beside, *more) for more in itertools.combinations(self.kept(beside).tolist(), count)]
        sets = [out for out in sets if self.sizes(out) >= MIN_RUNS]
        return min(sets, key=self.noise, default=())

    def far(self, noise: float) -> tuple[int, ...]:
        out: tuple[int, ...] = ()
        while len(out) <= len(self.y) // 3:
            counts = (2, 1) if len(self.y) <= PAIRS else (1,)
            found = (self.least(count, out) for count in counts)
            more = next((each for each in found if each and self._all_far(each, noise)), None)
            if more is None:
                break
            out = more
        return out

    def _all_far(self, out: tuple[int, ...], noise: float) -> bool:
        misfit, factor = self.misfit(out)
        distance = np.abs(misfit) / factor / max(noise, self.noise(out))
        return bool((distance[list(out)] > FAR).all())


# ---- a whole profile


@dataclass(frozen=True)
class Profile:
    """The parabolas of all budgets [K], of the runs that are `used` [n], and the laws through those that can be used.

    `status` [K] is "ok", "edge" (the vertex lies outside the sizes run), "not convex", "scattered" (runs too far off
    their parabola) or "too few runs" (sizes, that is; its parabola is None). Only "ok" ones enter the laws, which are
    (exponent, log coefficient), or None with fewer than MIN_BUDGETS of them.
    """

    parabolas: list[Parabola | None]
    status: list[str]
    used: np.ndarray
    params_law: tuple[float, float] | None
    tokens_law: tuple[float, float] | None


def profile(
    log_n: np.ndarray,
    y: np.ndarray,
    index: np.ndarray,
    log_c: np.ndarray,
    ratio: Ratio,
    weight: np.ndarray | None = None,
) -> Profile:
    """log N [n], the metric y [n] to be minimised, the budget of each run [n], log C [K], weights [n]."""
    weight = np.ones(len(y)) if weight is None else weight
    far, scattered = far_off(log_n, y, index, weight)
    parabolas: list[Parabola | None] = []
    status = []
    for k in range(len(log_c)):
        ours = (index == k) & ~far
        sizes = log_n[ours]
        if len(np.unique(sizes)) < MIN_RUNS:
            parabolas.append(None)
            status.append("too few runs")
            continue
        found = parabola(sizes, y[ours], weight[ours])
        parabolas.append(found)
        status.append("scattered" if scattered[k] else _status(found, sizes))
    usable = np.array([one == "ok" for one in status])
    if usable.sum() < MIN_BUDGETS:
        return Profile(parabolas, status, ~far, None, None)
    vertices = np.array([found.vertex for found, ok in zip(parabolas, usable) if found is not None and ok])
    laws = _laws(log_c[usable], vertices, np.ones(len(vertices), bool), ratio)
    params_law, tokens_law = ((float(exponent), float(level)) for exponent, level in laws)
    return Profile(parabolas, status, ~far, params_law, tokens_law)


def _status(found: Parabola, sizes: np.ndarray) -> str:
    if not found.curvature > 0:
        return "not convex"
    return "ok" if sizes.min() < found.vertex < sizes.max() else "edge"


def _laws(
    log_c: np.ndarray, vertices: np.ndarray, used: np.ndarray, ratio: Ratio
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    log_d = ratio.log_tokens(log_c, vertices)
    return power_law(log_c, vertices, used), power_law(log_c, log_d, used)


def bootstrap(
    found: Profile,
    log_n: np.ndarray,
    y: np.ndarray,
    index: np.ndarray,
    log_c: np.ndarray,
    ratio: Ratio,
    picks: np.ndarray,
    weight: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The laws of S resamples: params and tokens, each [S, 2] of (exponent, log coefficient); nan where one failed.

    Residuals are resampled, since a budget has too few runs to leave some out. They are pooled over the usable budgets,
    each as a share of its budget's mean y and enlarged by sqrt(n / (n - 3)) for the three numbers fitted to it. `picks`
    [S, n] in [0, 1) chooses a residual for each run. What makes the profile no parabola counts as noise, so the spread
    covers most of that bias, not all. A resample follows the rules of the fit: what is no longer an
    inside minimum is left out, and fewer than MIN_BUDGETS is a failure.
    """
    met = [(k, one) for k, (one, status) in enumerate(zip(found.parabolas, found.status)) if one and status == "ok"]
    usable = [k for k, _ in met]
    runs = [np.flatnonzero((index == k) & found.used) for k in usable]
    root, shares = np.ones(len(y)) if weight is None else np.sqrt(weight), []
    for (_, one), at in zip(met, runs):
        seen = y[at]
        residuals = root[at] * (seen - one.fitted) / np.abs(seen).mean()
        shares.append(residuals * np.sqrt(len(seen) / (len(seen) - 3)))
    pool = np.concatenate(shares)
    drawn_vertices, inside = [], []
    for (_, one), at in zip(met, runs):
        sizes, seen = log_n[at], y[at]
        residuals = pool[(picks[:, at] * len(pool)).astype(int)] * np.abs(seen).mean() / root[at]
        drawn = parabola(sizes, one.fitted + residuals, root[at] ** 2)
        inside.append((drawn.curvature > 0) & (drawn.vertex > sizes.min()) & (drawn.vertex < sizes.max()))
        drawn_vertices.append(drawn.vertex)
    used, log_c = np.stack(inside, axis=1), log_c[usable]
    vertices = np.where(used, np.stack(drawn_vertices, axis=1), 0.0)
    failed = used.sum(axis=1) < MIN_BUDGETS
    laws = []
    for exponent, intercept in _laws(log_c, vertices, used, ratio):
        law = np.stack([exponent, intercept], axis=1)
        law[failed] = np.nan
        laws.append(law)
    return laws[0], laws[1]
