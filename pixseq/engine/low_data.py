"""The linear probe on a few labels a class, as a part of `probe` (Image GPT §4.7).

The claim counts labels, so by default nothing but the images of a subset chooses: its layer and C are those of the
least log loss over its own folds, and features are scaled by its own mean and deviation. Test is scored once a subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixseq import progress
from pixseq.cores import threads, usable_cores
from pixseq.engine.feature_pair import Pair
from pixseq.engine.probing import LayerRecipe, Row
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.labelled import Labelled, images_of, low_data_subsets, standardize
from pixseq.numerics.linear_probe import (
    LowData,
    Solver,
    cross_validated_c,
    fitted_accuracy,
    low_data_probe,
    one_blas_thread,
)

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

    def check(self, pair: Pair, layers: Sequence[int], cs: Sequence[float]) -> None:
        """Raises UsageError where one label a class would have to choose, PixseqError where a class has too few."""
        labels, _ = images_of(pair.train.labels, pair.train.shows)
        classes, counts = np.unique(labels, return_counts=True)
        if counts.min() < self.labels_per_class:
            scarce = pair.name(int(classes[counts.argmin()]))
            raise PixseqError(
                f"--labels-per-class is {self.labels_per_class}, but {pair.train.store.path} has {counts.min()} images "
                f"of {scarce}",
                f"ask for at most {counts.min()}",
            )
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
class Chosen:
    """What one subset chose, and its log loss in nats a row over the folds."""

    layer: int
    c: float
    loss: float


def probe_few(pair: Pair, layers: Sequence[int], best: int, few: FewLabels, recipe: LayerRecipe) -> Row:
    """The result's `low_data`. `layers` are those to choose from, `best` the one that all labels chose.

    `layer` is None where every subset chose its own, in `layers`.
    """
    workers = min(usable_cores(), len(layers))
    solver = recipe.solver_for(workers)
    with one_blas_thread():
        if few.choice == "all":
            progress.say(f"probe: layer {best} on {few.labels_per_class} labels a class, {few.trials} trials")
            train, test = pair.read([best], recipe.standardize)
            found = low_data_probe(train, test, few.labels_per_class, few.trials, recipe.c, recipe.seed, solver)
            chosen = [best] * few.trials
        else:
            found, chosen = _inside(pair, layers, few, recipe, solver, workers)
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


def _inside(
    pair: Pair, layers: Sequence[int], few: FewLabels, recipe: LayerRecipe, solver: Solver, workers: int
) -> tuple[LowData, list[int]]:
    """Accuracies and C of each trial, and its layer. Of train, the views of the subsets alone are held."""
    train, test = pair.train, pair.test
    subsets = low_data_subsets(train.labels, train.shows, few.labels_per_class, few.trials, recipe.seed)
    held = np.unique(np.concatenate(subsets))

    def subsets_of(layer: int) -> list[Labelled]:
        rows = train.labelled(train.pooled_views(layer, held), held)
        return [rows.take(np.searchsorted(held, views)) for views in subsets]

    def choose(layer: int) -> list[Chosen]:
        found = []
        for subset in subsets_of(layer):
            if recipe.standardize:
                standardize(subset.X, subset.X[:0])
            c, loss = recipe.c[0], 0.0
            if few.labels_per_class > 1:  # one label chooses nothing, see FewLabels.check
                c, loss = cross_validated_c(subset, few.labels_per_class, recipe.c, solver)
            found.append(Chosen(layer, c, loss))
        return found

    by_layer = []
    with progress.track("probe few labels", len(layers), "layers") as bar, threads(workers) as pool:
        for each in pool.imap(choose, layers):
            by_layer.append(each)
            bar.advance(1)
    # the first, so the lowest layer, of equal ones
    chosen = [min(of_subset, key=lambda one: one.loss) for of_subset in zip(*by_layer)]
    accuracies = [0.0] * few.trials
    for layer in sorted({one.layer for one in chosen}):
        everything = test.pooled(layer)
        for trial, subset in enumerate(subsets_of(layer)):
            if chosen[trial].layer == layer:
                here = test.labelled(everything.copy())
                if recipe.standardize:
                    standardize(subset.X, here.X)
                accuracies[trial] = fitted_accuracy(subset, here, chosen[trial].c, recipe.seed, solver)
    return LowData(accuracies, [one.c for one in chosen]), [one.layer for one in chosen]
