"""Layers of features probed one by one, by logistic regression or nearest neighbours (Image GPT §4.1-4.6).

What chooses C and the layer is the accuracy on images held out of train; the classifier is then made of all of train,
and test is scored once. Several layers side by side are probed as one. The attentive probe, which reads every position
of windows of layers, stands in attentive.py and answers the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.cores import threads, usable_cores
from pixseq.engine.feature_pair import Pair
from pixseq.errors import PixseqError
from pixseq.numerics.knn import NEIGHBOURS, knn_predict
from pixseq.numerics.labelled import Labelled
from pixseq.numerics.linear_probe import SOLVERS, Solver, linear_probe, one_blas_thread
from pixseq.numerics.voting import accuracy

MEMORY_BYTES = 2 << 30  # of the features that are probed at once

Row = dict[str, Any]
Split = tuple[np.ndarray, np.ndarray]  # the numbers of the views to fit on, and to choose by


@dataclass(frozen=True)
class LayerRecipe:
    """How every layer is probed, by the method "logistic" or "knn". `solver` is None of knn, which fits nothing."""

    method: str
    c: list[float]
    val_fraction: float
    standardize: bool
    seed: int
    max_iter: int
    solver: str | None
    device: str = "auto"

    @property
    def searched(self) -> tuple[str, list[float]]:
        """The name in a row of what is chosen by the held-out images, and its values, ascending."""
        return "c", self.c

    def config(self) -> Row:
        """What enters the result's config."""
        return {key: value for key, value in asdict(self).items() if key != "device"}

    def used(self) -> Row:
        """What its results say of how they were computed."""
        return {"solver": self.solver, "device": self.solver_for(1).device}

    def solver_for(self, workers: int) -> Solver:
        """What fits, where so many fits run side by side. Raises UsageError for a device that is not here."""
        from pixseq.runtime import machine

        with machine("cpu" if self.solver == "sklearn" else self.device, "fp32") as where:
            cores = max(1, usable_cores() // workers)
            return Solver(self.solver or SOLVERS[0], str(where.device), cores, self.max_iter)

    def check(self, pair: Pair, split: Split) -> None:
        """Raises PixseqError for fewer rows than neighbours."""
        store, rows = pair.train.store, len(split[0]) * pair.train.masks
        if self.method == "knn" and rows < NEIGHBOURS:
            raise PixseqError(
                f"knn needs {NEIGHBOURS} neighbours, {store.path} has {rows} rows beside the held-out part",
                "give it more training images, or use --method logistic",
            )

    def probe(self, pair: Pair, layers: Sequence[int], every: bool, split: Split, name: str) -> list[Row]:
        """One row a layer, in order; layers side by side, as many as there are cores and as fit in MEMORY_BYTES."""
        workers = max(1, min(usable_cores(), len(layers), MEMORY_BYTES // pair.bytes_per_layer()))
        solver, rows = self.solver_for(workers), []
        # Threads, since fits hold no lock for long. This pool's are daemons: an interrupt need not wait for them.
        with one_blas_thread(), progress.track(name, len(layers), "layers") as bar, threads(workers) as pool:
            found = pool.imap(lambda layer: self._row(pair, [layer], split, solver, bar.advance), layers)
            for layer, row in zip(layers, found):
                rows.append({"layer": layer, **row})
                bar.note(f"layer {layer}: {row['val_accuracy']:.4f} held out, {row['test_accuracy']:.4f} test")
                bar.advance(0 if self.method == "knn" else 1)
        return rows

    def concat(self, pair: Pair, best: int, count: int, split: Split) -> Row:
        """`count` layers around the best one, their features side by side (§4.4)."""
        layers = [pair.layers[i] for i in concat_window(pair.layers.index(best), count, len(pair.layers))]
        progress.say(f"probe: layers {layers[0]} to {layers[-1]} side by side")
        with one_blas_thread(), progress.track("probe", 1, "fits") as bar:
            return {"layers": layers, **self._row(pair, layers, split, self.solver_for(1), bar.advance)}

    def _row(
        self, pair: Pair, layers: Sequence[int], split: Split, solver: Solver, advance: Callable[[float], None]
    ) -> Row:
        """c, val_accuracy, test_accuracy, converged and what was tried. `advance` hears of the parts of knn."""
        train, test = pair.read(layers, self.standardize)
        if self.method == "logistic":
            return asdict(linear_probe(train, test, split, self.c, self.seed, solver))
        fit, held = (train.take(views) for views in split)
        queries = len(held.X) + len(test.X)

        def score(known: Labelled, asked: Labelled) -> float:
            found = knn_predict(known, asked.X, advance=lambda rows: advance(rows / queries), device=solver.device)
            return accuracy(found, asked.y, asked.masks, self.seed)

        return {"c": None, "val_accuracy": score(fit, held), "test_accuracy": score(train, test), "converged": None}


def concat_window(best: int, count: int, layers: int) -> range:
    """`count` neighbouring layers centred on the best one, shifted inwards at the ends (§4.4)."""
    count = min(count, layers)
    start = min(max(best - count // 2, 0), layers - count)
    return range(start, start + count)
