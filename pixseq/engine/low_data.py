"""The linear probe on a few labels a class, as a part of `probe` (Image GPT §4.7).

The claim counts labels, so by default nothing but the images of a subset chooses: its layer and C are those of the
least log loss over its own folds, and features are scaled by its own mean and deviation. Test is scored once a subset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.cores import threads
from pixseq.engine.feature_pair import Pair, masks, pooled_views
from pixseq.errors import UsageError
from pixseq.numerics import probes
from pixseq.numerics.probes import Labelled, Solver

# What chooses the layer and the scaling; C is chosen inside the subset in either case.
CHOICES = ("subset", "all")


@dataclass(frozen=True)
class FewLabels:
    """How many labels a class, on how many random subsets, and what chooses the layer and the scaling."""

    labels_per_class: int
    trials: int
    choice: str = CHOICES[0]

    def __post_init__(self) -> None:
        """Raises UsageError where a value cannot be used."""
        if self.labels_per_class < 1:
            raise UsageError(f"--labels-per-class is {self.labels_per_class}, it must be at least 1")

    def check(self, layers: Sequence[int], cs: Sequence[float]) -> None:
        """Raises UsageError where one label a class would have to choose."""
        if self.labels_per_class > 1:
            return
        if len(cs) > 1:
            raise UsageError("--labels-per-class 1 leaves no label to choose C by", "give one value, as --c 0.1")
        if self.choice == "subset" and len(layers) > 1:
            raise UsageError(
                "--labels-per-class 1 leaves no label to choose the layer by",
                f"name one, as --layers {layers[len(layers) // 2]}, or choose it with all labels: "
                "--low-data-choice all",
            )


@dataclass(frozen=True)
class FitSettings:
    """How every fit is made: C's to choose from, whether features are scaled, and how many layers run side by side,
    by which solver.
    """

    cs: Sequence[float]
    scaled: bool
    max_iter: int
    seed: int
    workers: int
    solver: Solver


@dataclass(frozen=True)
class Chosen:
    """What one subset chose, and its log loss in nats a row over the folds."""

    layer: int
    c: float
    loss: float


def probe_few(pair: Pair, layers: Sequence[int], best: int, few: FewLabels, how: FitSettings) -> dict[str, Any]:
    """The result's `low_data`. `layers` are those to choose from, `best` the one that all labels chose.

    `layer` is None where every subset chose its own, in `layers`.
    """
    if few.choice == "all":
        progress.say(f"probe: layer {best} on {few.labels_per_class} labels a class, {few.trials} trials")
        train, test = pair.read([best], how.scaled)
        found = probes.low_data_probe(
            train, test, few.labels_per_class, few.trials, how.cs, how.max_iter, seed=how.seed, solver=how.solver
        )
        chosen = [best] * few.trials
    else:
        found, chosen = _inside(pair, layers, few, how)
    return {
        "choice": few.choice,
        "layer": best if few.choice == "all" else None,
        "layers": chosen,
        "labels_per_class": few.labels_per_class,
        "trials": few.trials,
        "test_accuracy_mean": found.mean,
        "test_accuracy_std": found.std,
        "test_accuracies": found.test_accuracies,
        "cs": found.cs,
    }


def _inside(pair: Pair, layers: Sequence[int], few: FewLabels, how: FitSettings) -> tuple[probes.LowData, list[int]]:
    """Accuracies and C of each trial, and its layer. Of train, the views of the subsets alone are held."""
    labels, shows = pair.train_labels, pair.train_shows
    subsets = probes.low_data_subsets(labels, shows, few.labels_per_class, few.trials, how.seed)
    held = np.unique(np.concatenate(subsets))

    def subsets_of(layer: int) -> list[Labelled]:
        X = pooled_views(pair.train, layer, held)
        rows = Labelled(X, labels[held], masks(pair.train), None if shows is None else shows[held])
        return [rows.take(np.searchsorted(held, views)) for views in subsets]

    def tried(layer: int) -> list[Chosen]:
        found = []
        for subset in subsets_of(layer):
            if how.scaled:
                probes.standardize(subset.X, subset.X[:0])
            c, loss = how.cs[0], 0.0
            if few.labels_per_class > 1:  # one label chooses nothing, see FewLabels.check
                c, loss = probes.cross_validated_c(
                    subset, few.labels_per_class, how.cs, how.max_iter, solver=how.solver
                )
            found.append(Chosen(layer, c, loss))
        return found

    # the first, so the lowest layer, of equal ones
    chosen = [min(each, key=lambda one: one.loss) for each in zip(*_side_by_side(tried, layers, how.workers))]
    accuracies = [0.0] * few.trials
    for layer in sorted({one.layer for one in chosen}):
        test = pooled_views(pair.test, layer, np.arange(len(pair.test_labels)))
        for trial, subset in enumerate(subsets_of(layer)):
            if chosen[trial].layer == layer:
                here = Labelled(test.copy(), pair.test_labels, masks(pair.test), pair.test_shows)
                if how.scaled:
                    probes.standardize(subset.X, here.X)
                accuracies[trial] = probes.fitted_accuracy(
                    subset, here, chosen[trial].c, how.max_iter, seed=how.seed, solver=how.solver
                )
    return probes.LowData(accuracies, [one.c for one in chosen]), [one.layer for one in chosen]


def _side_by_side(tried: Callable[[int], list[Chosen]], layers: Sequence[int], workers: int) -> list[list[Chosen]]:
    """Of every layer, in order."""
    found = []
    with progress.track("probe few labels", len(layers), "layers") as bar, threads(workers) as pool:
        for each in pool.imap(tried, layers):
            found.append(each)
            bar.advance(1)
    return found
