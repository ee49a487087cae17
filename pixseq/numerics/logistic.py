"""Multinomial logistic regression along a path of C's, exact and quick: the linear probe's solver.

The objective is scikit-learn's, per row: f(W, b) = mean cross-entropy + |W|^2 / (2 C n), the intercept free; of two
classes, as there, the penalty is on their difference. It is convex, so what differs is only the time to its minimum:

- Curvature is known beforehand. Around class shares p the Hessian of class k is p_k (1 - p_k) G + 1 / (C n), G the
  covariance of the features: one eigendecomposition of G gives its inverse for every C and every class.
- L-BFGS starts from that inverse and learns what is left. Its pairs (step, change of gradient) are kept without the
  penalty's part, which is added for each C: what one C learned, the next one knows.
- Where a fit grows sure of its rows, curvature changes under way and such memory misleads: after some steps it is
  Newton's method, each step solved by conjugate gradients from products of the Hessian with a direction.
- C's ascend, each fit starting from the one before.

An evaluation, like such a product, is one pass over the rows (blocks.py); what is known beforehand is in curvature.py.
Products are float32, sums over blocks and all vectors float64; small sets are float64 throughout.

Shapes: n rows, D features, K classes, r directions of the eigendecomposition; theta [D + 1, K] is W above b, of
features whose mean was taken off (by algebra: no copy is made).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixseq.numerics.blocks import Rows, block_slices
from pixseq.numerics.curvature import Spectrum, are_wide, narrowed, spectrum

PAIRS, PAIR_BYTES = 40, 1 << 29  # of L-BFGS: its memory, and what it may take
LEFT, FEWEST = 5e-7, 5  # a fit ends where what is left to fall is less, relative: the next step times those taken
NATS = 1.0  # below which an objective counts as so much: of sure classifiers the last digits tell nothing
LEARNED = 20  # steps of L-BFGS for one C, after which curvature that changes is looked at instead: Newton's
NEAR, PRODUCTS = 0.1, 500  # its equations are solved to this share of their right side, in so many products at most
ROUNDING = {torch.float32: 1e-9, torch.float64: 1e-15}  # relative decreases that are no longer real
ARMIJO, HALVINGS = 1e-4, 30
FARTHEST = 80.0  # nats below the largest logit: less is 0 but would be computed slowly, in denormal numbers


@dataclass(frozen=True)
class Classifier:
    """A fit: classes [K], weights [D, K] and intercept [K] float64, and how far its solver came.

    `objective` is f at the end, `gradient` the largest component of its gradient, `converged` whether that is within
    the tolerance; of scikit-learn's solver, whether it ended by itself, which rounding may make it do a little before.
    """

    classes: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    objective: float
    gradient: float
    converged: bool
    n_iter: int

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The class of each row, [n]."""
        return self.classes[np.concatenate([logits.argmax(axis=1) for _, logits in self._logits(X)])]

    def log_loss(self, X: np.ndarray, labels: np.ndarray) -> float:
        """The summed cross-entropy in nats of rows whose labels are among the classes."""
        right, total = np.searchsorted(self.classes, labels), 0.0
        for rows, logits in self._logits(X):
            own = logits[np.arange(len(logits)), right[rows]]
            top = logits.max(axis=1)
            total += float((np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - own).sum())
        return total

    def _logits(self, X: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        weights = self.weights.astype(X.dtype)
        for rows in block_slices(len(X), X.shape[1], len(self.classes)):
            yield rows, (X[rows] @ weights).astype(np.float64) + self.intercept


# ---- the objective


class Point(NamedTuple):
    """theta [D + 1, K], the mean cross-entropy there and its gradient, both without the penalty."""

    theta: Tensor
    loss: Tensor
    gradient: Tensor


def evaluate(rows: Rows, theta: Tensor) -> Point:
    """One pass over the rows."""

    def errors(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        norm, own = torch.logsumexp(logits, 1, keepdim=True), y[:, None]
        plain = norm - logits.gather(1, own)
        error = logits.sub_(norm).clamp_(min=-FARTHEST).exp_().scatter_(1, own, 0)  # probabilities of other classes
        wrong = error.sum(1, keepdim=True)  # so small of sure rows that 1 less the label's would be rounding alone
        loss = torch.where(wrong < 0.5, -torch.log1p(-wrong), plain).sum(dtype=torch.float64)
        return loss, error.scatter_(1, own, -wrong)

    return Point(theta, *_pass(rows, theta, errors))


def curve(rows: Rows, theta: Tensor, direction: Tensor) -> Tensor:
    """The mean cross-entropy's Hessian at theta applied to a direction [D + 1, K]: one pass over the rows too."""

    def errors(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        here, change = logits.chunk(2, 1)
        p = here.log_softmax(1).clamp_(min=-FARTHEST / 2).exp_()
        return p.new_zeros((), dtype=torch.float64), p * (change - (p * change).sum(1, keepdim=True))

    return _pass(rows, torch.cat([theta, direction], 1), errors)[1]


def spreads(rows: Rows, theta: Tensor) -> Tensor:
    """The mean of p (1 - p) of each class, [K]: 0 where a fit is sure of its rows."""

    def errors(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.softmax(1)
        return p.new_zeros((), dtype=torch.float64), p * (1 - p)

    return _pass(rows, theta, errors)[1][-1]


def _pass(
    rows: Rows, theta: Tensor, errors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`errors` makes of a block's logits and y a sum and a number for each row and class -> the mean of these sums, and
    of x above 1 times these numbers, [D + 1, K].
    """
    W, b = theta[:-1].to(rows.dtype), (theta[-1] - rows.mean @ theta[:-1]).to(rows.dtype)

    def of_block(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, error = errors(torch.addmm(b, X, W), y)
        return total, error.T @ X, error.sum(0, dtype=torch.float64)

    total, of_weights, of_intercept = (b.new_zeros((), dtype=torch.float64) for _ in range(3))
    for one, weights, intercept in rows.map(of_block):
        total, of_weights, of_intercept = total + one, of_weights + weights.double(), of_intercept + intercept
    of_weights = of_weights.T - rows.mean[:, None] * of_intercept
    return total / rows.n, torch.cat([of_weights, of_intercept[None]]) / rows.n


# ---- the path


class LogisticPath:
    """Fits of one set of rows for one C after another. `fit` begins where the last fit ended, or `after` another path.

    Raises ValueError where there are fewer than two classes.
    """

    def __init__(
        self,
        X: np.ndarray,
        labels: np.ndarray,
        device: str = "cpu",
        threads: int = 1,
        max_iter: int = 1000,
        tol: float = 1e-4,
        after: tuple[LogisticPath, Classifier] | None = None,
    ):
        self.classes, y, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(self.classes) < 2:
            raise ValueError("a regression needs two classes")
        self.max_iter, self.tol = max_iter, tol
        self.axes: Tensor | None = None
        self.spectrum: Spectrum | None = None
        if are_wide(X):
            inner, self.axes, self.spectrum = narrowed(X, device)
            self.rows = Rows(inner, y, len(self.classes), device, threads)
            self.mean = torch.from_numpy(X.mean(0, dtype=np.float64)).to(device)
        else:
            self.rows = Rows(X, y, len(self.classes), device, threads)
            self.mean = self.rows.mean
        shares = torch.from_numpy(counts / len(y)).to(self.rows.device)
        self.shares = shares * (1 - shares)
        theta = torch.cat([shares.new_zeros(self.rows.D, len(shares)), shares.log()[None]])
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._known: list[tuple[Tensor, Tensor, Tensor]] = []  # see _recall
        if after is not None and np.array_equal(after[1].classes, self.classes):  # of rows much like these
            path, begun = after
            weights = torch.from_numpy(begun.weights).to(device)
            theta[:-1] = weights if self.axes is None else self.axes.T @ weights
            theta[-1] = torch.from_numpy(begun.intercept).to(device) + self.mean @ weights
            if self.axes is None and path.axes is None:  # whose curvature serves
                self.spectrum, self.pairs = path.spectrum, path.pairs
        if self.spectrum is None:
            self.spectrum = spectrum(self.rows)
        self.at = evaluate(self.rows, theta)

    def fit(self, c: float) -> Classifier:
        """The minimum for one C."""
        ridge = (2 if len(self.classes) == 2 else 1) / (c * self.rows.n)
        n_iter, at = 0, self.at
        self._recall(ridge)
        while True:
            value, slope = float(_value(at, ridge)), _slope(at, ridge)
            step = -self._inverse(slope, ridge)
            expected = float(-(step * slope).sum() / 2)
            left = expected * max(n_iter, FEWEST)  # slow fits have as many more to go
            done = left <= LEFT * max(value, NATS) and self._largest(slope) <= self.tol
            if done or n_iter == self.max_iter or expected <= ROUNDING[self.rows.dtype] * value:
                break
            if n_iter >= LEARNED:
                step = self._newton(at, slope, ridge)
                expected = float(-(step * slope).sum() / 2)
            found = self._search(at, step, value, 2 * expected, ridge)
            if found is None and not self.pairs:
                break
            if found is None:  # what was learned far away misleads here
                self.pairs, self._known = [], []
                continue
            self._learn(at, found, ridge)
            at, n_iter = found, n_iter + 1
        self.at = at
        gradient, weights = self._largest(slope), self._outside(at.theta[:-1])
        intercept = at.theta[-1] - self.mean @ weights
        fitted = weights.cpu().numpy().copy(), intercept.cpu().numpy()
        return Classifier(self.classes, *fitted, value, gradient, gradient <= self.tol, n_iter)

    def _largest(self, slope: Tensor) -> float:
        """Component of the gradient in W and b themselves, before the mean was taken off."""
        in_weights = self._outside(slope[:-1]) + self.mean[:, None] * slope[-1]
        return float(max(in_weights.abs().max(), slope[-1].abs().max()))

    def _outside(self, inner: Tensor) -> Tensor:
        """In the features as they came."""
        return inner if self.axes is None else self.axes @ inner

    def _inverse(self, slope: Tensor, ridge: float) -> Tensor:
        """The Hessian's inverse, as far as it is known, applied to `slope`: L-BFGS's two loops."""
        right, known = slope.clone(), []
        for step, change, scale in reversed(self._known):
            along = scale * torch.dot(step.view(-1), right.view(-1))
            right.addcmul_(change, along, value=-1)
            known.append((step, change, scale, along))
        right = self._foreseen(right, ridge)
        if known:  # to the scale of the last step: where fits are sure of their rows, curvature has fallen
            _, change, scale, _ = known[0]
            right /= scale * (change * self._foreseen(change, ridge)).sum()
        for step, change, scale, along in reversed(known):
            right.addcmul_(step, along - scale * torch.dot(change.view(-1), right.view(-1)))
        return right

    def _newton(self, at: Point, slope: Tensor, ridge: float) -> Tensor:
        """The step to the minimum of the parabola that touches at `at`, by conjugate gradients."""
        self.shares = spreads(self.rows, at.theta).clamp_min(1e-12)
        step, left = torch.zeros_like(slope), -slope
        along = ahead = self._foreseen(left, ridge)
        first = size = (left * along).sum()
        for _ in range(PRODUCTS):
            change = _penalised(curve(self.rows, at.theta, along), along, ridge)
            length = size / (along * change).sum()
            step, left = step + length * along, left - length * change
            ahead = self._foreseen(left, ridge)
            size, before = (left * ahead).sum(), size
            if size <= NEAR**2 * first:
                break
            along = ahead + size / before * along
        return step

    def _recall(self, ridge: float) -> None:
        """The pairs as they are under one C, each with the inverse of its product."""
        whole = [(step, _penalised(change, step, ridge)) for step, change in self.pairs]
        self._known = [(step, change, 1 / (step * change).sum()) for step, change in whole]

    def _foreseen(self, slope: Tensor, ridge: float) -> Tensor:
        """The inverse as it is known before any step."""
        assert self.spectrum is not None  # from the beginning on
        weights = self.spectrum.solve(slope[:-1], self.shares, ridge)
        return torch.cat([weights, (slope[-1] / self.shares)[None]])

    def _search(self, at: Point, step: Tensor, value: float, fall: float, ridge: float) -> Point | None:
        """The first point along `step` that falls enough, None where rounding hides every fall."""
        length = 1.0
        for _ in range(HALVINGS):
            found = evaluate(self.rows, at.theta + length * step)
            gain = float(value - _value(found, ridge))
            if gain >= ARMIJO * length * fall:
                return found
            parabola = fall * length / (2 * (fall * length - gain))  # its lowest point, as a share of this length
            length *= min(0.5, max(0.1, parabola))
        return None

    def _learn(self, at: Point, found: Point, ridge: float) -> None:
        step, change = found.theta - at.theta, found.gradient - at.gradient
        if (step * change).sum() <= 0:  # rounding: the objective is convex
            return
        most = max(3, min(PAIRS, PAIR_BYTES // (24 * step.numel())))
        whole = _penalised(change, step, ridge)
        self.pairs = [*self.pairs[1 - most :], (step, change)]
        self._known = [*self._known[1 - most :], (step, whole, 1 / (step * whole).sum())]


def _value(at: Point, ridge: float) -> Tensor:
    return at.loss + ridge / 2 * (at.theta[:-1] ** 2).sum()


def _slope(at: Point, ridge: float) -> Tensor:
    return _penalised(at.gradient, at.theta, ridge)


def _penalised(gradient: Tensor, theta: Tensor, ridge: float) -> Tensor:
    """With the penalty's part, which the intercept does not have."""
    whole = gradient + ridge * theta
    whole[-1] = gradient[-1]
    return whole


def measure(X: np.ndarray, labels: np.ndarray, c: float, weights: np.ndarray, intercept: np.ndarray) -> tuple:
    """The objective of any weights [D, K] and intercept [K], and the largest component of its gradient."""
    classes, y = np.unique(labels, return_inverse=True)
    rows = Rows(X, y, len(classes))
    theta = torch.from_numpy(np.concatenate([weights, intercept[None] + rows.mean.numpy() @ weights]).astype(float))
    at = evaluate(rows, theta)
    slope = _slope(at, ridge := (2 if len(classes) == 2 else 1) / (c * rows.n))
    in_weights = slope[:-1] + rows.mean[:, None] * slope[-1]
    return float(_value(at, ridge)), float(max(in_weights.abs().max(), slope[-1].abs().max()))
