"""The linear probe: how well logistic regression reads the class of an image from its features (Image GPT §2.4, §4.7).

- C is chosen on a held-out part of train, the regression fitted again on all of train with it, and scored on test once.
  The authors used scikit-learn's solver; C and scaling they do not state. Ours (logistic.py) finds the same minimum
  sooner.
- Low data: the same on a few labels a class, mean and deviation over random subsets.

Shapes: those of labelled.py, and K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from pixseq.choices import LogisticSolver
from pixseq.numerics.labelled import Labelled, images_of, low_data_subsets
from pixseq.numerics.voting import accuracy

if TYPE_CHECKING:
    from pixseq.numerics.logistic import Classifier, LogisticPath
    from pixseq.numerics.scikit import ScikitPath

    Path = LogisticPath | ScikitPath

# C multiplies the summed loss, so the best C falls as train grows. Measured on 10,000 to 50,000 standardised CIFAR-10
# features it lies in 1e-3 .. 10; larger ones gain nothing.
DEFAULT_CS = tuple(10.0**exponent for exponent in range(-4, 3))
MAX_ITER = 1000
TOLERANCE = 1e-4  # scikit-learn's default: largest gradient component of the mean loss
SOLVERS: tuple[str, ...] = get_args(LogisticSolver)
PATIENCE = 2  # C's in a row without a better held-out accuracy, after which larger ones are not tried (see _search)
FOLDS = 5  # at most, of the cross-validation inside a low-data subset


@dataclass(frozen=True)
class Tried:
    """One C and what it gave on the held-out images."""

    c: float
    val_accuracy: float
    converged: bool
    n_iter: int
    gradient: float
    objective: float


@dataclass(frozen=True)
class LinearProbe:
    """The probe of one set of features. `converged` and what follows are of the last fit, on all of train: the largest
    component of the gradient of its objective a row, and that objective.
    """

    c: float
    val_accuracy: float
    test_accuracy: float
    converged: bool
    n_iter: int
    gradient: float
    objective: float
    tried: list[Tried]


@dataclass(frozen=True)
class Solver:
    """What fits, and how far: a name of SOLVERS; ours computes on `device`, by so many `threads` on a CPU."""

    name: str = SOLVERS[0]
    device: str = "cpu"
    threads: int = 1
    max_iter: int = MAX_ITER
    tol: float = TOLERANCE

    def path(self, data: Labelled, after: tuple[Path, Classifier] | None = None) -> Path:
        """Its `fit` takes ascending C's; `after` a fit of another path of like rows, it begins there."""
        if self.name == "sklearn":
            from pixseq.numerics.scikit import ScikitPath

            return ScikitPath(data.X, data.row_labels, self.max_iter, self.tol, after and after[1])
        from pixseq.numerics.logistic import LogisticPath

        begun = cast("tuple[LogisticPath, Classifier] | None", after)  # a solver's paths are all of one kind
        return LogisticPath(data.X, data.row_labels, self.device, self.threads, self.max_iter, self.tol, begun)


OURS = Solver()


@dataclass(frozen=True)
class LowData:
    """Test accuracy and chosen C of each random subset."""

    test_accuracies: list[float]
    cs: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.test_accuracies))

    @property
    def std(self) -> float | None:
        """Of the sample (ddof 1); None for a single trial."""
        return float(np.std(self.test_accuracies, ddof=1)) if len(self.test_accuracies) > 1 else None


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Around all fits, entered once, by the main thread: its settings are of the whole process.

    The products of a fit are so narrow (K columns) that a second thread inside each costs more than it brings; layers
    side by side, or blocks of rows, use the cores. scikit-learn's warning is silenced because `converged` reports it.
    """
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lbfgs failed to converge")
            yield
    finally:
        torch.set_num_threads(threads)


def linear_probe(
    train: Labelled,
    test: Labelled,
    split: tuple[np.ndarray, np.ndarray],
    cs: Sequence[float] = DEFAULT_CS,
    seed: int = 0,
    solver: Solver = OURS,
) -> LinearProbe:
    """Choose C on the held-out images of `split` (see `held_out_split`), refit on all of train, score test once."""
    fit, held = (train.take(images) for images in split)
    path = solver.path(fit)
    del fit  # the path has what it needs of it
    tried, best, begun = _search(path, held, cs, seed)
    found = solver.path(train, after=(path, begun)).fit(best.c)
    score = _accuracy(found, test, seed)
    reached = found.converged, found.n_iter, found.gradient, found.objective
    return LinearProbe(best.c, best.val_accuracy, score, *reached, tried)


def _search(path: Path, held: Labelled, cs: Sequence[float], seed: int) -> tuple[list[Tried], Tried, Classifier]:
    """Along increasing C, each fit starting from the one before: accuracy on the held-out images.

    Equal accuracy goes to the smaller C. Larger C's are left out once PATIENCE in a row were no better than the best,
    or one was worse by more than a standard error: accuracy rises and falls once along C. It may be level before it
    rises, where C's are too small for few rows and every answer is one class: those equal to the first do not count.
    Returns what was tried, the best of it, and the fit with the best.
    """
    tried: list[Tried] = []
    best: Tried | None = None
    for c in sorted(cs):
        found = path.fit(c)
        now = Tried(c, _accuracy(found, held, seed), found.converged, found.n_iter, found.gradient, found.objective)
        tried.append(now)
        if best is None or now.val_accuracy > best.val_accuracy:
            best, fitted, waited = now, found, 0
            continue
        waited += now.val_accuracy < best.val_accuracy or best is not tried[0]
        standard_error = (best.val_accuracy * (1 - best.val_accuracy) / held.n_images) ** 0.5
        if waited == PATIENCE or now.val_accuracy < best.val_accuracy - standard_error:
            break
    assert best is not None  # one C at least is tried
    return tried, best, fitted


def low_data_probe(
    train: Labelled,
    test: Labelled,
    labels_per_class: int,
    trials: int,
    cs: Sequence[float] = DEFAULT_CS,
    seed: int = 0,
    solver: Solver = OURS,
) -> LowData:
    """Fit on `labels_per_class` random images of every class, `trials` times over (§4.7).

    C is chosen inside the subset, so that no other label helps; a single C is taken as it is. Raises ValueError where a
    class has too few images, or one label a class leaves nothing to choose C by.
    """
    if labels_per_class < 2 and len(cs) > 1:
        raise ValueError("one label a class leaves none to choose C by")
    accuracies, chosen = [], []
    for views in low_data_subsets(train.y, train.shows, labels_per_class, trials, seed):
        subset = train.take(views)
        c = cs[0] if len(cs) == 1 else cross_validated_c(subset, labels_per_class, cs, solver)[0]
        accuracies.append(fitted_accuracy(subset, test, c, seed, solver))
        chosen.append(c)
    return LowData(accuracies, chosen)


def fitted_accuracy(subset: Labelled, test: Labelled, c: float, seed: int = 0, solver: Solver = OURS) -> float:
    """Of a fit on the subset with one C."""
    return _accuracy(solver.path(subset).fit(c), test, seed)


def cross_validated_c(
    subset: Labelled,
    labels_per_class: int,
    cs: Sequence[float],
    solver: Solver = OURS,
) -> tuple[float, float]:
    """The C of the least log loss over stratified folds of a subset, whose images lie class by class, each whole.

    With it that loss, in nats a row, by which layers are compared.

    Loss, not accuracy: counting hits among 40 images is so coarse that it often picks an extreme C. Loss was better in
    all of six measurements, by up to two points of test accuracy (digits, and pixels and patch features of CIFAR-10).
    """
    folds = min(labels_per_class, FOLDS)
    fold = _order_met(images_of(subset.y, subset.shows)[1]) % labels_per_class % folds
    parts = [(subset.take(np.flatnonzero(fold != f)), subset.take(np.flatnonzero(fold == f))) for f in range(folds)]
    paths = [solver.path(fit) for fit, _ in parts]
    losses: list[float] = []
    for c in sorted(cs):
        losses.append(0.0)
        for path, (_, held) in zip(paths, parts):
            losses[-1] += path.fit(c).log_loss(held.X, held.row_labels)
        if len(losses) - np.argmin(losses) > PATIENCE:
            break
    return sorted(cs)[int(np.argmin(losses))], min(losses) / len(subset.X)


def _order_met(images: np.ndarray) -> np.ndarray:
    """The images [n] that views show, numbered from 0 in the order in which they are met."""
    _, firsts, numbers = np.unique(images, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[numbers]


def _accuracy(model: Classifier, data: Labelled, seed: int) -> float:
    return accuracy(model.predict(data.X), data.y, data.masks, seed)
