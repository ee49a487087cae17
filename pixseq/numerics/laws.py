"""The law L(N, D) = E + A N^-alpha + B D^-beta fitted to runs, in two ways, and the best N and D it gives at a budget.

- Direct (Hoffmann et al. 2022, Approach 3): log L as the log-sum-exp of the three terms' logs, Huber loss with delta
  1e-3 on log L, a grid of starts.
- Variable projection (arXiv 2603.22339): at fixed alpha and beta the model is linear in E, A, B >= 0, solved in closed
  form, so only a plane is searched. Least squares would let one diverged run carry the law away, so the plane's best
  cells are the starts of an MM-estimate (Yohai 1987): least absolute values tell the scale of the noise, and a
  biweight of that scale makes the fit, nearly least squares among ordinary runs and blind to what lies far off.

Both work on logs centred at the runs' mean, log(N / N0) and log(D / D0): the same model, but log A is the term's size
among the runs instead of its size at one parameter, where it is all but a function of alpha. The error is summed over
runs, never averaged: a mean of Huber losses is of the order of 1e-6, where a minimiser's tolerance stops it at once
(what the replication arXiv 2404.10102 blames for the published constants).

n runs, S fits at once (starts or resamples), K budgets, P exponents a side. A run's weight is its inverse variance, 1
where nothing is known of it. theta [S, 5] = log of the A term at the centre, alpha, log of the B term, beta, log E.
Logs are natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixseq.numerics.isoflop import Ratio

HUBER_DELTA = 1e-3
BIWEIGHT = 6.0  # scales from which on a run counts for nothing: 98 % of least squares' efficiency under normal noise
LEAST_SCALE = 1e-6  # of log L: no run is measured more finely
EXPONENTS = (0.01, 3.0)  # where alpha and beta are looked for; a fit at either end has not found one
NOTHING = 1e-4  # a term that makes up a smaller share of L than this at every run is not there
MIN_RUNS = 6  # one more than there are constants
GRID = 32  # exponents a side that variable projection tries
CELLS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Runs:
    """log N and log D about their means, log L, weights: [n]."""

    log_n: np.ndarray
    log_d: np.ndarray
    log_y: np.ndarray
    centre: tuple[float, float]
    weight: np.ndarray

    @classmethod
    def of(cls, params: np.ndarray, tokens: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> Runs:
        """All positive."""
        log_n, log_d = np.log(params), np.log(tokens)
        centre = float(log_n.mean()), float(log_d.mean())
        weight = np.ones(len(log_n)) if weight is None else weight
        return cls(log_n - centre[0], log_d - centre[1], np.log(y), centre, weight)


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A N^-alpha + B D^-beta. Every constant is an array [S]."""

    E: np.ndarray
    A: np.ndarray
    alpha: np.ndarray
    B: np.ndarray
    beta: np.ndarray

    @classmethod
    def of(cls, theta: np.ndarray, runs: Runs) -> Law:
        a, alpha, b, beta, e = theta.T
        return cls(np.exp(e), np.exp(a + alpha * runs.centre[0]), alpha, np.exp(b + beta * runs.centre[1]), beta)

    def __call__(self, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
        """L at log N and log D, both [K] or [S, K] -> [S, K]."""
        size = np.exp(np.log(self.A)[:, None] - self.alpha[:, None] * log_n)
        data = np.exp(np.log(self.B)[:, None] - self.beta[:, None] * log_d)
        return self.E[:, None] + size + data

    def optimum(self, log_c: np.ndarray, ratio: Ratio) -> tuple[np.ndarray, np.ndarray]:
        """The log N and log D [S, K] of the least L at log C [K], under C = 6 N D ratio(N).

        With a constant ratio by the closed form, whose exponents are beta / (alpha + beta) and alpha / (alpha + beta);
        else by search, up to a thousandfold beyond the sizes run.
        """
        alpha, beta = self.alpha[:, None], self.beta[:, None]
        if ratio.constant:
            log_nd = ratio.log_tokens(log_c, np.zeros(1))
            gain = np.log(self.alpha * self.A)[:, None] - np.log(self.beta * self.B)[:, None]
            log_n = (gain + beta * log_nd) / (alpha + beta)
        else:
            log_n = self._searched(log_c, ratio)
        return log_n, ratio.log_tokens(log_c, log_n)

    def _searched(self, log_c: np.ndarray, ratio: Ratio) -> np.ndarray:
        reach, points = np.log(1e3), np.linspace(-1, 1, 33)
        half = (ratio.high - ratio.low) / 2 + reach
        best = np.full((len(self.alpha), len(log_c)), (ratio.high + ratio.low) / 2)
        log_c = np.repeat(log_c, len(points))
        while half > 1e-9:
            tried = best[:, :, None] + half * points
            flat = tried.reshape(len(best), -1)
            values = self(flat, ratio.log_tokens(log_c, flat)).reshape(tried.shape)
            best = np.take_along_axis(tried, values.argmin(axis=2)[:, :, None], axis=2)[:, :, 0]
            half /= 8
        return best


def trouble(theta: np.ndarray, runs: Runs) -> np.ndarray:
    """Why a fit [S, 5] does not tell alpha and beta: [S] of "", "A", "B" (no such term), "alpha", "beta" (a bound)."""
    shares = np.exp(_terms(theta, runs) - runs.log_y).max(axis=2)  # [S, 3]
    low, high = EXPONENTS[0] * 2, EXPONENTS[1] * 0.99  # near 0 a term is a constant, and the way to the bound is flat
    found = np.full(len(theta), "", dtype="U5")
    for column, name in ((3, "beta"), (1, "alpha")):
        found[(theta[:, column] < low) | (theta[:, column] > high)] = name
    for term, name in ((1, "B"), (0, "A")):
        found[shares[:, term] < NOTHING] = name
    return found


def residual(theta: np.ndarray, runs: Runs) -> np.ndarray:
    """log(fitted / seen) [S, n]."""
    terms = _terms(theta, runs)
    top = terms.max(axis=1)
    return np.log(np.exp(terms - top[:, None]).sum(axis=1)) + top - runs.log_y


# ---- what a misfit costs


@dataclass(frozen=True)
class Huber:
    """A square near 0, straight beyond delta."""

    delta: float = HUBER_DELTA

    def loss(self, misfit: np.ndarray) -> np.ndarray:
        """In units of delta^2."""
        scaled = np.abs(misfit) / self.delta
        return np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5)

    def share(self, misfit: np.ndarray) -> np.ndarray:
        """What reweighted least squares makes of a run: 1 near 0."""
        return 1 / np.maximum(1, np.abs(misfit) / self.delta)


@dataclass(frozen=True)
class Biweight:
    """Tukey's: a square near 0, flat from BIWEIGHT scales on."""

    scale: float

    def loss(self, misfit: np.ndarray) -> np.ndarray:
        """In units of scale^2."""
        rest = np.maximum(1 - (misfit / (BIWEIGHT * self.scale)) ** 2, 0)
        return BIWEIGHT**2 / 6 * (1 - rest**3)

    def share(self, misfit: np.ndarray) -> np.ndarray:
        return np.maximum(1 - (misfit / (BIWEIGHT * self.scale)) ** 2, 0) ** 2


def scale(theta: np.ndarray, runs: Runs) -> float:
    """The standard deviation of log L at weight 1, from the residuals of a fit [5] that bad runs did not move.

    The median of all but the five least, as five constants make five residuals vanish, with the correction of Rousseeuw
    and Leroy (1987) for few runs: where hardly more runs than constants are there, none can be told to be bad.
    """
    sizes = np.sort(np.abs(_linearised(theta[None], runs)[0][0]))[5:]
    if not len(sizes):
        return np.inf
    return max(float(1.4826 * (1 + 5 / len(sizes)) * np.median(sizes)), LEAST_SCALE)


# ---- the direct fit


def direct(runs: Runs) -> np.ndarray:
    """theta [5] of the least summed Huber loss on log L."""
    from scipy.optimize import minimize

    ones, huber = np.ones((1, len(runs.log_y))), Huber()
    theta, error = _descend(_starts(runs), runs, ones, huber, steps=60)
    best = theta[np.argsort(error, kind="stable")[:8]]
    best, error = _descend(best, runs, ones, huber, steps=400)
    # Where most residuals exceed delta the loss is nearly that of least absolute values, on which reweighting creeps.
    for row in range(3):
        at = np.argsort(error, kind="stable")[row]
        polished = minimize(
            _huber,
            best[at],
            args=(runs,),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(*_bounds(runs))),
            options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20},
        )
        if polished.fun < error[at]:
            best[at], error[at] = polished.x, polished.fun
    return best[error.argmin()]


def direct_resampled(theta: np.ndarray, runs: Runs, counts: np.ndarray) -> np.ndarray:
    """theta [S, 5] of resamples that hold each run `counts` [S, n] times, starting from the fit [5]."""
    return _descend(np.tile(theta, (len(counts), 1)), runs, counts, Huber(), steps=150)[0]


def _starts(runs: Runs) -> np.ndarray:
    """Five exponents a side, over the range of the published grid (0 to 2), times nine divisions of L at the centre."""
    exponents = (0.1, 0.3, 0.6, 1.1, 2.0)
    level = np.median(runs.log_y)
    rows = []
    for floor in (0.05, 0.5, 0.9):
        for size in (0.1, 0.5, 0.9):
            a, b, e = level + np.log([(1 - floor) * size, (1 - floor) * (1 - size), floor])
            rows += [(a, alpha, b, beta, e) for alpha in exponents for beta in exponents]
    return np.array(rows)


def _huber(theta: np.ndarray, runs: Runs) -> tuple[float, np.ndarray]:
    """The loss in units of delta^2, and its gradient [5]."""
    misfit, jacobian = _linearised(theta[None], runs)
    slope = np.clip(misfit[0] / HUBER_DELTA, -1, 1) / HUBER_DELTA
    return float(_loss(misfit, np.ones_like(misfit), Huber())[0]), slope @ jacobian[0]


# ---- variable projection


def varpro(runs: Runs, noise: float | None = None) -> np.ndarray:
    """theta [5] of the least summed biweight of log L at the scale `noise`, with E, A, B >= 0.

    None: the scale about the fit of least absolute values.
    """
    ones = np.ones((1, len(runs.log_y)))
    theta, error = _descend(_projected(runs, ones, keep=24)[0], runs, ones, Huber(), steps=100)
    theta = theta[np.argsort(error, kind="stable")[:8]]
    biweight = Biweight(noise or scale(theta[0], runs))
    shares = biweight.share(_linearised(theta[:1], runs)[0])
    theta = np.concatenate([theta, _projected(runs, shares, keep=8)[0]])
    theta, error = _descend(theta, runs, ones, biweight, steps=400)
    return theta[error.argmin()]


def varpro_resampled(theta: np.ndarray, runs: Runs, counts: np.ndarray) -> np.ndarray:
    """theta [S, 5] of resamples that hold each run `counts` [S, n] times; each searches the plane anew.

    The scale is that of the fit, and runs that count for nothing in the fit do so in the search.
    """
    biweight = Biweight(scale(theta, runs))
    shares = counts * biweight.share(_linearised(theta[None], runs)[0])
    searched = _descend(_projected(runs, shares, keep=1)[:, 0], runs, counts, biweight, steps=100)
    from_fit = _descend(np.tile(theta, (len(counts), 1)), runs, counts, biweight, steps=100)
    return np.where((searched[1] < from_fit[1])[:, None], searched[0], from_fit[0])


def _projected(runs: Runs, counts: np.ndarray, keep: int) -> np.ndarray:
    """The best `keep` cells of a grid over (alpha, beta), each with its best E, A, B: theta [S, keep, 5].

    All cells of all resamples share the columns, so their normal equations are a few matrix products. What these lose
    in precision the descent that follows makes good.
    """
    exponents = np.geomspace(0.02, EXPONENTS[1], GRID)
    y = np.exp(runs.log_y)
    one, size = 1 / y, np.exp(-np.outer(exponents, runs.log_n)) / y  # the columns E, A [P, n], B over L
    data = np.exp(-np.outer(exponents, runs.log_d)) / y
    found = []
    at_once = max(1, CELLS_AT_ONCE // (GRID * max(GRID, len(y))))
    for start in range(0, len(counts), at_once):
        w = counts[start : start + at_once] * runs.weight
        S = len(w)
        both = ((w[:, None] * size).reshape(S * GRID, -1) @ data.T).reshape(S, GRID, GRID)
        grams = {
            "EE": (w @ one**2)[:, None, None],
            "EA": (w @ (size * one).T)[:, :, None],
            "EB": (w @ (data * one).T)[:, None, :],
            "AA": (w @ (size**2).T)[:, :, None],
            "BB": (w @ (data**2).T)[:, None, :],
            "AB": both,
        }
        sides = {"E": (w @ one)[:, None, None], "A": (w @ size.T)[:, :, None], "B": (w @ data.T)[:, None, :]}
        gain, parts = _least_squares(grams, sides)
        cells = np.argsort(-gain.reshape(S, -1), axis=1, kind="stable")[:, :keep]
        e, a, b = (np.take_along_axis(part.reshape(S, -1), cells, axis=1) for part in parts)
        alpha, beta = exponents[cells // GRID], exponents[cells % GRID]
        with np.errstate(divide="ignore"):
            found.append(np.stack([np.log(a), alpha, np.log(b), beta, np.log(e)], axis=2))
    low, high = _bounds(runs)
    return np.clip(np.concatenate(found), low, high)


def _least_squares(grams: dict[str, np.ndarray], sides: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Non-negative least squares in three unknowns, in closed form: how much of the square is explained, and E, A, B.

    The solution is the best of the seven supports (which unknowns are not 0) whose free solution is not negative.
    Arrays of any shape that broadcast together.
    """
    norms = {name: np.sqrt(grams[name * 2]) for name in "EAB"}
    r = {name: sides[name] / norms[name] for name in "EAB"}
    c = {pair: grams[pair] / (norms[pair[0]] * norms[pair[1]]) for pair in ("EA", "EB", "AB")}
    zero = np.zeros(np.broadcast_shapes(*(part.shape for part in grams.values())))
    solutions = [{name: r[name] + zero} for name in "EAB"]
    for pair, between in c.items():
        first, second = pair[0], pair[1]
        rest = np.maximum(1 - between**2, 1e-14)
        solutions.append(
            {
                first: (r[first] - between * r[second]) / rest + zero,
                second: (r[second] - between * r[first]) / rest + zero,
            }
        )
    ea, eb, ab = c["EA"], c["EB"], c["AB"]
    whole = np.maximum(1 - ea**2 - eb**2 - ab**2 + 2 * ea * eb * ab, 1e-14)
    solutions.append(
        {
            "E": ((1 - ab**2) * r["E"] + (eb * ab - ea) * r["A"] + (ea * ab - eb) * r["B"]) / whole,
            "A": ((eb * ab - ea) * r["E"] + (1 - eb**2) * r["A"] + (ea * eb - ab) * r["B"]) / whole,
            "B": ((ea * ab - eb) * r["E"] + (ea * eb - ab) * r["A"] + (1 - ea**2) * r["B"]) / whole,
        }
    )
    best, parts = np.full(zero.shape, -np.inf), {name: zero.copy() for name in "EAB"}
    for solution in solutions:
        gain = sum(r[name] * part for name, part in solution.items())
        allowed = np.logical_and.reduce([part >= 0 for part in solution.values()])
        better = allowed & (gain > best)
        best = np.where(better, gain, best)
        for name in "EAB":
            parts[name] = np.where(better, solution.get(name, zero), parts[name])
    return best, [parts[name] / norms[name] for name in "EAB"]


# ---- what both descend with


def _bounds(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest theta [5]. A term at its least is nothing: e^-25 of L."""
    level, exponent = (runs.log_y.min() - 25, runs.log_y.max() + 5), EXPONENTS
    low, high = (np.array([level[end], exponent[end], level[end], exponent[end], level[end]]) for end in (0, 1))
    return low, high


def _terms(theta: np.ndarray, runs: Runs) -> np.ndarray:
    """Logs of the three terms, [S, 3, n]."""
    a, alpha, b, beta, e = theta.T[:, :, None]
    return np.stack([a - alpha * runs.log_n, b - beta * runs.log_d, e + 0 * runs.log_n], axis=1)


def _linearised(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """The misfit of log L by its standard error at weight 1 [S, n], and its derivatives [S, n, 5]."""
    terms = _terms(theta, runs)
    top = terms.max(axis=1, keepdims=True)
    parts = np.exp(terms - top)
    whole = parts.sum(axis=1, keepdims=True)
    misfit = (np.log(whole) + top)[:, 0] - runs.log_y
    size, data, floor = np.moveaxis(parts / whole, 1, 0)
    jacobian = np.stack([size, -size * runs.log_n, data, -data * runs.log_d, floor], axis=2)
    root = np.sqrt(runs.weight)
    return misfit * root, jacobian * root[:, None]


def _loss(misfit: np.ndarray, counts: np.ndarray, cost: Huber | Biweight) -> np.ndarray:
    """Summed over runs: [S]."""
    return (counts * cost.loss(misfit)).sum(axis=1)


def _descend(
    theta: np.ndarray, runs: Runs, counts: np.ndarray, cost: Huber | Biweight, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on all rows at once, by reweighting: theta [S, 5] and its loss [S].

    `counts` [S or 1, n] is how often a row holds each run. A row's loss never rises; it is done when it has stopped
    falling.
    """
    low, high = _bounds(runs)
    theta = np.clip(theta, low, high)
    counts = np.broadcast_to(counts, (len(theta), counts.shape[1]))
    misfit, jacobian = _linearised(theta, runs)
    error = _loss(misfit, counts, cost)
    damping, live = np.full(len(theta), 1e-2), np.arange(len(theta))
    for _ in range(steps):
        weights = counts[live] * cost.share(misfit)
        weighted = np.swapaxes(jacobian * weights[:, :, None], 1, 2)
        square = weighted @ jacobian
        slope = (weighted @ misfit[:, :, None])[:, :, 0]
        diagonal = np.einsum("sii->si", square)
        # Scaled by the diagonal, so that no unit matters; the small rest keeps a vanished term's row solvable.
        ridge = damping[live, None] * diagonal + 1e-14 * diagonal.sum(axis=1, keepdims=True) + 1e-300
        step = np.linalg.solve(square + ridge[:, :, None] * np.eye(5), slope[:, :, None])[:, :, 0]
        trial = np.clip(theta[live] - step, low, high)
        new_misfit, new_jacobian = _linearised(trial, runs)
        new_error = _loss(new_misfit, counts[live], cost)
        better = new_error < error[live]
        gained = np.where(better, error[live] - new_error, np.inf)
        theta[live[better]], error[live[better]] = trial[better], new_error[better]
        misfit[better], jacobian[better] = new_misfit[better], new_jacobian[better]
        damping[live] = np.where(better, np.maximum(damping[live] / 5, 1e-12), damping[live] * 4)
        going = (gained > 1e-12 * error[live]) & (damping[live] < 1e8)
        live, misfit, jacobian = live[going], misfit[going], jacobian[going]
        if not len(live):
            break
    return theta, error
