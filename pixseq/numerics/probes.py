"""Probes: how well a simple classifier reads the class of an image from its features (Image GPT §2.4, §3.4, §4.4-4.7).

- Linear probe: multinomial logistic regression, C chosen on a held-out part of train, refitted on all of train with
  that C, scored on test once. The authors used scikit-learn's solver; C and scaling they do not state. Ours
  (logistic.py) finds the same minimum sooner.
- Low data: the same on a few labels a class, mean and deviation over random subsets.
- k-NN: DINO's weighted vote of cosine neighbours (Caron et al. 2021, appendix F.1), a check that fits nothing.
- BERT models see masked inputs at evaluation too: M masks give M consecutive rows an image. A probe is fitted on all
  rows; an image's class is the modal prediction of its rows, ties broken at random (§4.6).

- Several views of an image (random crops) are items of their own, fitted and scored one by one; but all views of one
  image lie on the same side of every split, and what counts images counts an image once.

Shapes: n views (of as many images, or fewer), M rows (masks) a view, D features, K classes. Labels are one a view, from
0 to K - 1.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from pixseq.streams import Stream

if TYPE_CHECKING:
    from pixseq.numerics.logistic import Classifier, LogisticPath
    from pixseq.numerics.scikit import ScikitPath

# C multiplies the summed loss, so the best C falls as train grows. Measured on 10,000 to 50,000 standardised CIFAR-10
# features it lies in 1e-3 .. 10; larger ones gain nothing.
DEFAULT_CS = tuple(10.0**exponent for exponent in range(-4, 3))
MAX_ITER = 1000
TOLERANCE = 1e-4  # scikit-learn's default: largest gradient component of the mean loss
SOLVERS = ("pixseq", "sklearn")
PATIENCE = 2  # C's in a row without a better held-out accuracy, after which larger ones are not tried (see _search)
KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
FOLDS = 5  # at most, of the cross-validation inside a low-data subset
CELLS_AT_ONCE = 1 << 23  # of a table of rows against classes, or against other rows


@dataclass(frozen=True)
class Labelled:
    """Features X [n * M, D] float32 of n views, M consecutive rows each, and their labels y [n].

    `shows` [n] says which image each view shows; None: every one an image of its own.
    """

    X: np.ndarray
    y: np.ndarray
    masks: int = 1
    shows: np.ndarray | None = None

    @property
    def row_labels(self) -> np.ndarray:
        return np.repeat(self.y, self.masks)

    @property
    def n_images(self) -> int:
        return len(self.y) if self.shows is None else len(np.unique(self.shows))

    def take(self, views: np.ndarray) -> Labelled:
        """Some views, with all their rows."""
        rows = (views[:, None] * self.masks + np.arange(self.masks)).ravel()
        shows = None if self.shows is None else self.shows[views]
        return Labelled(self.X[rows], self.y[views], self.masks, shows)


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
    """What fits: a name of SOLVERS; ours computes on `device`, by so many `threads` on a CPU."""

    name: str = SOLVERS[0]
    device: str = "cpu"
    threads: int = 1

    def path(
        self,
        data: Labelled,
        max_iter: int = MAX_ITER,
        tol: float = TOLERANCE,
        after: tuple[LogisticPath | ScikitPath, Classifier] | None = None,
    ) -> LogisticPath | ScikitPath:
        """Its `fit` takes ascending C's; `after` a fit of another path of like rows, it begins there."""
        if self.name == "sklearn":
            from pixseq.numerics.scikit import ScikitPath

            return ScikitPath(
                data.X, data.row_labels, max_iter, tol, cast("tuple[ScikitPath, Classifier] | None", after)
            )
        from pixseq.numerics.logistic import LogisticPath

        begun = cast("tuple[LogisticPath, Classifier] | None", after)  # a solver's paths are all of one kind
        return LogisticPath(data.X, data.row_labels, self.device, self.threads, max_iter, tol, begun)


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


def standardize(train: np.ndarray, test: np.ndarray) -> None:
    """Centre and scale both in place by mean and deviation of `train`; a constant feature becomes 0.

    All of train counts, the held-out part too: no label enters, and the refit needs the same scale.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(train), 4096):  # in blocks: float64 copies of everything would not be bounded
        squares += ((train[start : start + 4096] - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / len(train))
    deviation[deviation <= 1e-6 * np.abs(mean)] = np.inf  # what float32 rounding leaves of a constant is not variation
    for features in (train, test):
        features -= mean.astype(features.dtype)
        features /= deviation.astype(features.dtype)


def images_of(y: np.ndarray, shows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The label of each image, and the number among these images of what each view [n] shows."""
    if shows is None:
        return y, np.arange(len(y))
    _, firsts, numbers = np.unique(shows, return_index=True, return_inverse=True)
    return y[firsts], numbers


def held_out_split(
    y: np.ndarray, fraction: float, seed: int, shows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Views to fit on and views to choose by, sorted. Stratified: `fraction` of the images of every class is held out.

    At least one image of a class, and never all: a class of one image is only fitted. Raises ValueError where every
    class has one image. `shows` is that of Labelled.
    """
    rng = np.random.default_rng([seed, Stream.PROBE_SPLIT])
    labels, numbers = images_of(y, shows)
    held = []
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        held.append(images[: min(max(1, round(fraction * len(images))), len(images) - 1)])
    held_out = np.concatenate(held)
    if not len(held_out):
        raise ValueError("every class has one image, which leaves none to hold out")
    apart = np.isin(numbers, held_out)
    return np.flatnonzero(~apart), np.flatnonzero(apart)


# ---- logistic regression


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
    max_iter: int = MAX_ITER,
    tol: float = TOLERANCE,
    seed: int = 0,
    solver: Solver = OURS,
) -> LinearProbe:
    """Choose C on the held-out images of `split` (see `held_out_split`), refit on all of train, score test once."""
    fit, held = (train.take(images) for images in split)
    path = solver.path(fit, max_iter, tol)
    del fit  # the path has what it needs of it
    tried, best, begun = _search(path, held, cs, seed)
    found = solver.path(train, max_iter, tol, after=(path, begun)).fit(best.c)
    score = _accuracy(found, test, seed)
    reached = found.converged, found.n_iter, found.gradient, found.objective
    return LinearProbe(best.c, best.val_accuracy, score, *reached, tried)


def low_data_probe(
    train: Labelled,
    test: Labelled,
    labels_per_class: int,
    trials: int,
    cs: Sequence[float] = DEFAULT_CS,
    max_iter: int = MAX_ITER,
    tol: float = TOLERANCE,
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
        c = cs[0] if len(cs) == 1 else cross_validated_c(subset, labels_per_class, cs, max_iter, tol, solver)[0]
        accuracies.append(fitted_accuracy(subset, test, c, max_iter, tol, seed, solver))
        chosen.append(c)
    return LowData(accuracies, chosen)


def low_data_subsets(
    y: np.ndarray, shows: np.ndarray | None, labels_per_class: int, trials: int, seed: int
) -> list[np.ndarray]:
    """For each trial the views of `labels_per_class` random images of every class, class by class.

    Raises ValueError where a class has too few images. `y` and `shows` are those of Labelled.
    """
    labels, numbers = images_of(y, shows)
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < labels_per_class:
        raise ValueError(f"{labels_per_class} labels a class were asked for, one class has {counts.min()} images")
    subsets = []
    for trial in range(trials):
        rng = np.random.default_rng([seed, Stream.PROBE_SUBSET, trial])
        picked = [rng.choice(np.flatnonzero(labels == label), labels_per_class, replace=False) for label in classes]
        subsets.append(_views_of(np.concatenate(picked), numbers))
    return subsets


def fitted_accuracy(
    subset: Labelled,
    test: Labelled,
    c: float,
    max_iter: int = MAX_ITER,
    tol: float = TOLERANCE,
    seed: int = 0,
    solver: Solver = OURS,
) -> float:
    """Of a fit on the subset with one C."""
    return _accuracy(solver.path(subset, max_iter, tol).fit(c), test, seed)


def _views_of(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The views of some images, image by image."""
    order = np.argsort(numbers, kind="stable")
    low, high = (np.searchsorted(numbers[order], images, side) for side in ("left", "right"))
    return np.concatenate([order[slice(*ends)] for ends in zip(low, high)])


def concat_window(best: int, count: int, layers: int) -> range:
    """`count` neighbouring layers centred on the best one, shifted inwards at the ends (§4.4)."""
    count = min(count, layers)
    start = min(max(best - count // 2, 0), layers - count)
    return range(start, start + count)


def _search(
    path: LogisticPath | ScikitPath, held: Labelled, cs: Sequence[float], seed: int
) -> tuple[list[Tried], Tried, Classifier]:
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


def cross_validated_c(
    subset: Labelled,
    labels_per_class: int,
    cs: Sequence[float],
    max_iter: int = MAX_ITER,
    tol: float = TOLERANCE,
    solver: Solver = OURS,
) -> tuple[float, float]:
    """The C of the least log loss over stratified folds of a subset, whose images lie class by class, each whole.

    With it that loss, in nats a row, by which layers are compared.

    Loss, not accuracy: counting hits among 40 images is so coarse that it often picks an extreme C. Loss was better in
    all of six measurements, by up to two points of test accuracy (digits, and pixels and patch features of CIFAR-10).
    """
    folds = min(labels_per_class, FOLDS)
    fold = np.arange(len(subset.y)) if subset.shows is None else _order_met(subset.shows)
    fold = fold % labels_per_class % folds
    parts = [(subset.take(np.flatnonzero(fold != f)), subset.take(np.flatnonzero(fold == f))) for f in range(folds)]
    paths = [solver.path(fit, max_iter, tol) for fit, _ in parts]
    losses: list[float] = []
    for c in sorted(cs):
        losses.append(0.0)
        for path, (_, held) in zip(paths, parts):
            losses[-1] += path.fit(c).log_loss(held.X, held.row_labels)
        if len(losses) - np.argmin(losses) > PATIENCE:
            break
    return sorted(cs)[int(np.argmin(losses))], min(losses) / len(subset.X)


def _order_met(shows: np.ndarray) -> np.ndarray:
    """The images that views [n] show, numbered in the order in which they are met."""
    _, firsts, numbers = np.unique(shows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[numbers]


def _accuracy(model: Classifier, data: Labelled, seed: int) -> float:
    return accuracy(model.predict(data.X), data, seed)


def accuracy(predictions: np.ndarray, data: Labelled, seed: int) -> float:
    """Share of views whose voted class is their label; `predictions` [n * M] are by row."""
    return float((vote(predictions, data.masks, np.random.default_rng([seed, Stream.PROBE_TIE])) == data.y).mean())


def vote(predictions: np.ndarray, masks: int, rng: np.random.Generator) -> np.ndarray:
    """Classes [n * M] -> the most frequent class of each M consecutive ones, [n]; ties are broken at random."""
    if masks == 1:
        return predictions
    classes, votes = np.unique(predictions, return_inverse=True)
    votes, found = votes.reshape(-1, masks), np.empty(len(predictions) // masks, classes.dtype)
    block = max(1, CELLS_AT_ONCE // len(classes))
    for start in range(0, len(votes), block):
        counts = _tally(votes[start : start + block], None, len(classes))
        counts = counts + rng.random(counts.shape)  # less than one vote: it decides only between equals
        found[start : start + block] = classes[counts.argmax(axis=1)]
    return found


def elected(predictions: np.ndarray, masks: int, seed: int, first: int) -> np.ndarray:
    """As `vote`, of images from number `first` on: each breaks ties by its own stream, so that no batch matters."""
    if masks == 1:
        return predictions
    counts = _tally(predictions.reshape(-1, masks), None, int(predictions.max()) + 1)
    streams = (np.random.default_rng([seed, first + i, Stream.EVALUATION_TIE]) for i in range(len(counts)))
    return (counts + np.stack([stream.random(counts.shape[1]) for stream in streams])).argmax(axis=1)


def _tally(classes: np.ndarray, weights: np.ndarray | None, K: int) -> np.ndarray:
    """Classes from 0 to K - 1 and their weights [n, M], None for ones -> summed weight of each class [n, K]."""
    n = len(classes)
    cells = np.arange(n)[:, None] * K + classes
    return np.bincount(cells.ravel(), None if weights is None else weights.ravel(), minlength=n * K).reshape(n, K)


# ---- nearest neighbours


def knn_predict(
    train: Labelled,
    queries: np.ndarray,
    k: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
    advance: Callable[[int], None] = lambda rows: None,
    device: str = "cpu",
) -> np.ndarray:
    """The class of each query row: its k nearest rows by cosine vote with weight exp(cosine / temperature).

    `advance` hears of rows that are done. Raises ValueError if train has fewer than k rows. Blocks of queries meet
    blocks of rows on `device`: CELLS_AT_ONCE cosines and eight times as many features, whatever the labels are.
    """
    import torch

    rows, width = train.X.shape
    if k > rows:
        raise ValueError(f"k is {k}, but there are only {rows} training rows")
    classes, labels = np.unique(train.row_labels, return_inverse=True)
    here = min(rows, max(k, 8 * CELLS_AT_ONCE // width))  # rows of a block
    block = max(1, CELLS_AT_ONCE // max(here, width, len(classes)))

    def unit(X: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(X).to(device), eps=float(np.finfo(np.float32).tiny))

    known = unit(train.X) if rows == here else None
    predictions = np.empty(len(queries), classes.dtype)
    for start in range(0, len(queries), block):
        asked = unit(queries[start : start + block])
        cosines = torch.empty(len(asked), 0, device=device)
        nearest = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for first in range(0, rows, here):
            part = unit(train.X[first : first + here]) if known is None else known
            best, which = (asked @ part.T).topk(min(k, len(part)))
            cosines, nearest = torch.cat([cosines, best], 1), torch.cat([nearest, which + first], 1)
            cosines, which = cosines.topk(min(k, cosines.shape[1]))
            nearest = nearest.gather(1, which)
        weights = torch.exp(cosines.double() / temperature).cpu().numpy()
        votes = _tally(labels[nearest.cpu().numpy()], weights, len(classes))
        predictions[start : start + block] = classes[votes.argmax(axis=1)]
        advance(len(asked))
    return predictions
