"""probe: read the classes of images from features, layer by layer, and compare with baselines (Image GPT §4.1-4.7).

The attentive probe (AIM §4.3) stands in engine/attentive.py, which is imported where it is used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.picture import check_png
from pixseq.choices import LogisticSolver, LowDataChoice, ProbeMethod
from pixseq.cores import threads, usable_cores
from pixseq.engine.feature_pair import Pair, masks, open_pair
from pixseq.engine.low_data import FewLabels, FitSettings, probe_few
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import probes

if TYPE_CHECKING:
    from pixseq.engine import attentive

MEMORY_BYTES = 2 << 30  # of the features that are probed at once

Row = dict[str, Any]
Split = tuple[np.ndarray, np.ndarray]  # the numbers of the images to fit on, and to validate on


@atomic.owns("probe", "out", "plot")
def run(
    features: str | Path,
    test: str | Path,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    method: ProbeMethod = "logistic",
    layers: str | Sequence[int] = "all",
    concat: int = 0,
    labels_per_class: int | None = None,
    trials: int = 5,
    c: str | Sequence[float] = probes.DEFAULT_CS,
    val_fraction: float = 0.1,
    standardize: bool | None = None,
    seed: int = 0,
    max_iter: int = probes.MAX_ITER,
    baselines: Sequence[tuple[str, str | Path, str | Path]] = (),
    overwrite: bool = False,
    window: int | None = None,
    heads: int | None = None,
    lr: str | Sequence[float] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    device: str | None = None,
    low_data_choice: LowDataChoice | None = None,
    solver: LogisticSolver | None = None,
) -> dict[str, Any]:
    """The metrics as a mapping, written to `out` as metrics and to `plot` as a PNG curve where these are given.

    `layers` is "all", "0,4,8" or a list; `c` a list of C's or "0.01,0.1". `baselines` are (name, train features, test
    features) of the same images. `standardize` None: yes for logistic, no for knn (DINO takes features as they are).
    Accuracies are shares of 1. `best_layer` is chosen by `val_accuracy` alone, equal ones go to the lower layer; the
    main `c`, `val_accuracy` and `test_accuracy` are its. Of unpooled features, logistic and knn read the mean over
    positions.

    `low_data_choice` is "subset" (default) or "all": whether the few labels of each subset choose its layer, and its
    images the scaling, or all of train. `solver` of the logistic probe is "pixseq" (default) or "sklearn". `device`
    is of knn, of our solver and of the attentive probe.

    Other options between `overwrite` and `low_data_choice` are of the attentive probe (see engine/attentive.py for
    their defaults). Its rows are of windows, the means over `window` neighbouring layers; without `window`, one row:
    the mean over a list of `layers`, or of "all" over the last six. A row's `layer` is the last one of its window.
    """
    options: dict[str, Any] = {"window": window, "heads": heads, "epochs": epochs, "batch_size": batch_size}
    options |= {"weight_decay": weight_decay, "device": device}
    recipe = Recipe.checked(method, c, val_fraction, standardize, seed, max_iter, lr, options, solver)
    few = _few(method, labels_per_class, trials, low_data_choice)
    _check_concat(method, concat)
    check_png(plot)
    pair = open_pair(features, test)
    chosen, others = _chosen_layers(layers, pair), _baselines(baselines, pair)
    _check_sizes(pair, others, chosen, recipe, few)
    split = _split(pair, recipe, labels_per_class)
    numbers = _measure(pair, others, chosen, layers == "all", split, recipe, concat, few)
    _remark(numbers, recipe)
    config = {**recipe.config(), "layers": chosen, "concat": concat, "labels_per_class": labels_per_class}
    config |= {"trials": trials, "baselines": list(others), "low_data_choice": few and few.choice}
    _write(out, plot, pair, others, config, numbers, overwrite)
    return numbers


def _check_sizes(
    pair: Pair, others: dict[str, Pair], chosen: Sequence[int], recipe: Recipe, few: FewLabels | None
) -> None:
    """Raises where these features cannot be probed so."""
    if recipe.attentive:
        from pixseq.engine import attentive

        for each in (pair, *others.values()):
            attentive.check(each, recipe.attentive)
    if few is not None:
        few.check(chosen, recipe.c)


def _write(
    out: str | Path | None,
    plot: str | Path | None,
    pair: Pair,
    others: dict[str, Pair],
    config: Row,
    numbers: Row,
    overwrite: bool,
) -> None:
    """The metrics to `out` and their curve to `plot`, where these are given."""
    inputs = pair.references("features", "test")
    for name, other in others.items():
        inputs |= other.references(f"{name}: features", f"{name}: test")
    if out is not None:
        from pixseq.artifacts.metrics import write_metrics

        write_metrics(out, "probe", config, inputs, numbers, overwrite)
    if plot is not None:
        from pixseq.artifacts.picture import save_png

        drawn, summary = curve(numbers, _model_name(pair)), {"best_layer": numbers["best_layer"]}
        save_png(plot, drawn, "probe", config, inputs, summary, overwrite)


def _baselines(baselines: Sequence[tuple[str, str | Path, str | Path]], pair: Pair) -> dict[str, Pair]:
    """Other features of the images of `pair`, by name. Raises UsageError for a name twice, PixseqError for others."""
    found = {name: open_pair(*paths) for name, *paths in baselines}
    if len(found) < len(baselines):
        raise UsageError("two baselines have one name", "give each its own")
    for name, other in found.items():
        _check_baseline(name, other, pair)
    return found


def _measure(
    pair: Pair,
    others: dict[str, Pair],
    chosen: Sequence[int],
    every: bool,
    split: tuple[np.ndarray, np.ndarray],
    recipe: Recipe,
    concat: int,
    few: FewLabels | None,
) -> dict[str, Any]:
    """The metrics: of each layer, of the best one and its neighbours, with few labels, and of the baselines."""
    with contextlib.nullcontext() if recipe.attentive else probes.one_blas_thread():
        rows = _probe(pair, chosen, every, split, recipe, "probe")
        best = _best(rows)
        numbers: dict[str, Any] = {"method": recipe.method, **_data_facts(pair), "layers": rows, **_headline(best)}
        numbers["concat"] = _concat(pair, best["layer"], concat, split, recipe) if concat else None
        numbers["low_data"] = None if few is None else _low_data(pair, chosen, best["layer"], few, recipe)
        numbers["baselines"] = []
        for name, other in others.items():
            same = [layer for layer in chosen if layer in other.layers]
            found = _probe(other, same or other.layers, every or not same, split, recipe, f"probe {name}")
            numbers["baselines"].append({"name": name, "layers": found, **_headline(_best(found))})
    return numbers | recipe.used()


@dataclass(frozen=True)
class Recipe:
    """How every set of features is probed."""

    method: str
    c: list[float]
    val_fraction: float
    standardize: bool
    seed: int
    max_iter: int
    attentive: attentive.AttentiveRecipe | None
    solver: str | None = None  # of the logistic probe
    device: str = "auto"  # of any but the attentive one

    @classmethod
    def checked(
        cls,
        method: str,
        c: Sequence[float] | str,
        val_fraction: float,
        standardize: bool | None,
        seed: int,
        max_iter: int,
        lr: Sequence[float] | str | None,
        options: dict[str, Any],
        solver: str | None = None,
    ) -> Recipe:
        """Raises UsageError where a value cannot be used. `lr` and `options` (None: default) are of attentive."""
        cs = _positive("--c", c, "0.01,0.1,1", "C is the inverse strength of regularisation")
        if not 0 < val_fraction < 1:
            raise UsageError(f"--val-fraction is {val_fraction}", "it lies between 0 and 1; the paper takes 0.1")
        if max_iter < 1:
            raise UsageError(f"--max-iter is {max_iter}, it must be at least 1")
        given = {name: value for name, value in options.items() if value is not None}
        solver = _solver(method, solver, given.get("device"))
        if method != "attentive":
            device = given.pop("device", "auto")
            if given or lr is not None:
                flag = next(iter(given), "lr").replace("_", "-")
                raise UsageError(f"--{flag} goes with --method attentive, not with {method}")
            scaled = method == "logistic" if standardize is None else standardize
            return cls(method, cs, val_fraction, scaled, seed, max_iter, None, solver, device)
        if standardize is not None:
            raise UsageError("--standardize does not go with --method attentive", "its batch norm scales the features")
        from pixseq.engine import attentive

        rates = _positive("--lr", attentive.LEARNING_RATES if lr is None else lr, "0.0003,0.001", "0 trains nothing")
        return cls(method, cs, val_fraction, False, seed, max_iter, attentive.AttentiveRecipe(rates, **given))

    def config(self) -> Row:
        """What enters the result's config: the options that this method has."""
        if self.attentive is None:
            return {key: value for key, value in asdict(self).items() if key not in ("attentive", "device")}
        own = {key: value for key, value in asdict(self.attentive).items() if key != "device"}
        return {"method": self.method, "val_fraction": self.val_fraction, "seed": self.seed, **own}

    def used(self) -> Row:
        """What its results say of how they were computed."""
        if self.attentive is not None:
            from pixseq.engine import attentive

            return attentive.used(self.attentive)
        return {"solver": self.solver, "device": self.fitter().device}

    def fitter(self, workers: int = 1) -> probes.Solver:
        """What computes, where so many layers run side by side. Raises UsageError for a device that is not here."""
        from pixseq.runtime import machine

        with machine("cpu" if self.solver == "sklearn" else self.device, "fp32") as where:
            return probes.Solver(self.solver or "pixseq", str(where.device), max(1, usable_cores() // workers))


def _solver(method: str, solver: str | None, device: str | None) -> str | None:
    """None where the method fits nothing, or in its own way. Raises UsageError where these do not go together."""
    if method != "logistic":
        if solver is not None:
            raise UsageError(f"--solver goes with --method logistic, not with {method}")
        return None
    if solver == "sklearn" and device not in (None, "auto", "cpu"):
        raise UsageError(f"--solver sklearn does not go with --device {device}", "it computes on the CPU")
    return solver or probes.SOLVERS[0]


def _positive(flag: str, values: str | Sequence[float], example: str, why: str) -> list[float]:
    """Numbers above 0, ascending, each once. Raises UsageError for anything else."""
    try:
        numbers = sorted({float(part) for part in (values.split(",") if isinstance(values, str) else values)})
    except ValueError:
        raise UsageError(f"{flag} {values!r} is no list of numbers", f"for example {example}") from None
    if not numbers or not all(0 < value < math.inf for value in numbers):
        raise UsageError(f"{flag} {values!r} must hold positive numbers", why)
    return numbers


def _check_concat(method: str, concat: int) -> None:
    if concat < 0:
        raise UsageError(f"--concat is {concat}", "a number of layers, as 5, or 0 for none")
    if concat and method == "attentive":
        raise UsageError("--concat does not go with --method attentive", "--window averages neighbouring layers")


def _few(method: str, labels_per_class: int | None, trials: int, choice: str | None) -> FewLabels | None:
    """None where no low-data probe was asked for."""
    if trials < 1:
        raise UsageError(f"--trials is {trials}, it must be at least 1")
    if labels_per_class is None:
        if choice is not None:
            raise UsageError("--low-data-choice was given without --labels-per-class", "for example 4 labels a class")
        return None
    if method != "logistic":
        raise UsageError(f"--labels-per-class goes with --method logistic, not with {method}")
    return FewLabels(labels_per_class, trials) if choice is None else FewLabels(labels_per_class, trials, choice)


# ---- checks before any work


def _check_baseline(name: str, other: Pair, pair: Pair) -> None:
    for ours, theirs, same, store in (
        (pair.train_labels, other.train_labels, _same(pair.train_shows, other.train_shows), other.train),
        (pair.test_labels, other.test_labels, _same(pair.test_shows, other.test_shows), other.test),
    ):
        if not (same and np.array_equal(ours, theirs)):
            raise PixseqError(
                f"baseline {name!r}: {store.path} holds {len(theirs)} images whose labels are not those of the "
                f"{len(ours)} images it is compared with",
                "make the baseline's features from the same tokens",
            )


def _same(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    return ours is theirs if ours is None or theirs is None else np.array_equal(ours, theirs)


def _split(pair: Pair, recipe: Recipe, labels_per_class: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Views to fit on and to choose by, split by image; also checks, before any work, that there are enough of them."""
    classes, counts = np.unique(probes.images_of(pair.train_labels, pair.train_shows)[0], return_counts=True)
    if counts.max() < 2:
        raise PixseqError(
            f"every class of {pair.train.path} has a single image, which leaves none to choose by", "add images"
        )
    split = probes.held_out_split(pair.train_labels, recipe.val_fraction, recipe.seed, pair.train_shows)
    rows = len(split[0]) * masks(pair.train)
    if recipe.method == "knn" and rows < probes.KNN_NEIGHBOURS:
        raise PixseqError(
            f"knn needs {probes.KNN_NEIGHBOURS} neighbours, {pair.train.path} has {rows} rows beside the held-out part",
            "give it more training images, or use --method logistic",
        )
    if labels_per_class and counts.min() < labels_per_class:
        scarce = pair.name(int(classes[counts.argmin()]))
        raise PixseqError(
            f"--labels-per-class is {labels_per_class}, but {pair.train.path} has {counts.min()} images of {scarce}",
            f"ask for at most {counts.min()}",
        )
    return split


def _chosen_layers(layers: str | Sequence[int], pair: Pair) -> list[int]:
    if layers == "all":
        return list(pair.layers)
    try:
        wanted = sorted({int(part) for part in (layers.split(",") if isinstance(layers, str) else layers)})
    except ValueError:
        raise UsageError(f"--layers {layers!r} is no list of numbers", "all, or for example 0,4,8") from None
    missing = [layer for layer in wanted if layer not in pair.layers]
    if missing or not wanted:
        raise UsageError(
            f"--layers {','.join(map(str, missing))}: {pair.train.path} holds the layers {pair.layers}",
            "choose among those, or make features of more layers",
        )
    return wanted


# ---- measuring


def _probe(pair: Pair, layers: Sequence[int], every: bool, split: Split, recipe: Recipe, name: str) -> list[Row]:
    """One row a layer, or for the attentive probe one a window of layers; `every`: no list of layers was asked for."""
    if recipe.attentive is None:
        return _probe_layers(pair, layers, split, recipe, name)
    from pixseq.engine import attentive

    windows = attentive.windows(layers, every, recipe.attentive.window)
    return attentive.probe_windows(pair, windows, split, recipe.attentive, recipe.seed, name)


def _probe_layers(pair: Pair, layers: Sequence[int], split: Split, recipe: Recipe, name: str) -> list[Row]:
    """One row a layer, in order; layers side by side, as many as there are cores and as fit in MEMORY_BYTES."""
    workers = max(1, min(usable_cores(), len(layers), MEMORY_BYTES // pair.bytes_per_layer()))
    rows = []
    # Threads, since the fits hold no lock for long. This pool's are daemons: an interrupt need not wait for them.
    with progress.track(name, len(layers), "layers") as bar, threads(workers) as pool:
        probe = _prober(pair, split, recipe, recipe.fitter(workers), bar.advance)
        for layer, found in zip(layers, pool.imap(lambda layer: probe([layer]), layers)):
            rows.append({"layer": layer, **found})
            bar.note(f"layer {layer}: {found['val_accuracy']:.4f} held out, {found['test_accuracy']:.4f} test")
            bar.advance(0 if recipe.method == "knn" else 1)
    return rows


def _prober(
    pair: Pair, split: Split, recipe: Recipe, solver: probes.Solver, advance: Callable[[float], None]
) -> Callable[[Sequence[int]], Row]:
    """Layers, taken side by side -> c, val_accuracy, test_accuracy, converged and what was tried.

    knn lets `advance` hear of the parts of such a row that are done.
    """

    def logistic(layers: Sequence[int]) -> Row:
        train, test = pair.read(layers, recipe.standardize)
        return asdict(
            probes.linear_probe(train, test, split, recipe.c, recipe.max_iter, seed=recipe.seed, solver=solver)
        )

    def knn(layers: Sequence[int]) -> Row:
        train, test = pair.read(layers, recipe.standardize)
        fit, held = (train.take(images) for images in split)
        queries = len(held.X) + len(test.X)

        def accuracy(known: probes.Labelled, asked: probes.Labelled) -> float:
            found = probes.knn_predict(
                known, asked.X, advance=lambda rows: advance(rows / queries), device=solver.device
            )
            return probes.accuracy(found, asked, recipe.seed)

        return {
            "c": None,
            "val_accuracy": accuracy(fit, held),
            "test_accuracy": accuracy(train, test),
            "converged": None,
        }

    return {"logistic": logistic, "knn": knn}[recipe.method]


def _best(rows: Sequence[Row]) -> Row:
    """By held-out accuracy alone; the first, so the lowest layer, of equal ones."""
    return max(rows, key=lambda row: row["val_accuracy"])


def _headline(best: Row) -> Row:
    """What stands beside the rows of one set of features: its best row."""
    shown = ("window", "c", "lr", "heads", "val_accuracy", "test_accuracy")
    return {"best_layer": best["layer"], **{key: best[key] for key in shown if key in best}}


def _concat(pair: Pair, best: int, count: int, split: Split, recipe: Recipe) -> Row:
    window = probes.concat_window(pair.layers.index(best), count, len(pair.layers))
    layers = [pair.layers[i] for i in window]
    progress.say(f"probe: layers {layers[0]} to {layers[-1]} side by side")
    with progress.track("probe", 1, "fits") as bar:
        return {"layers": layers, **_prober(pair, split, recipe, recipe.fitter(), bar.advance)(layers)}


def _low_data(pair: Pair, layers: Sequence[int], best: int, few: FewLabels, recipe: Recipe) -> Row:
    workers = min(usable_cores(), len(layers))
    how = FitSettings(recipe.c, recipe.standardize, recipe.max_iter, recipe.seed, workers, recipe.fitter(workers))
    return probe_few(pair, layers, best, few, how)


def _data_facts(pair: Pair) -> Row:
    """Counts, and the accuracy of always answering the most frequent class of train."""
    classes, counts = np.unique(pair.train_labels, return_counts=True)
    majority = classes[counts.argmax()]
    unseen = np.setdiff1d(pair.test_labels, classes)
    sides = {"train": (pair.train_labels, pair.train_shows), "test": (pair.test_labels, pair.test_shows)}
    views = {f"{name}_views": len(labels) for name, (labels, shows) in sides.items() if shows is not None}
    return {
        **{f"n_{name}": len(probes.images_of(*each)[0]) for name, each in sides.items()},
        **views,
        "n_classes": len(classes),
        "majority": float((pair.test_labels == majority).mean()),
        "classes_only_in_test": [pair.name(int(label)) for label in unseen],
    }


def _remark(numbers: Row, recipe: Recipe) -> None:
    """What a reader of the table should know."""
    if "test_views" in numbers:
        progress.warn(
            f"test holds {numbers['test_views']} random crops of {numbers['n_test']} images: accuracies are "
            "means over crops, where usually one centre crop an image is scored"
        )
    if numbers["classes_only_in_test"]:
        names = ", ".join(numbers["classes_only_in_test"][:5])
        progress.warn(f"test has classes that train lacks, never predicted: {names}")
    for told in _unconverged(numbers["layers"], recipe.max_iter):
        progress.warn(told)
    at_end = [row["layer"] for row in numbers["layers"] if row["c"] in (recipe.c[0], recipe.c[-1])]
    if at_end and len(recipe.c) > 1:
        progress.note(f"the best C is an end of the list at layers {at_end}: widen --c")
    rates = recipe.attentive.lr if recipe.attentive else []
    at_end = [row["layer"] for row in numbers["layers"] if len(rates) > 1 and row["lr"] in (rates[0], rates[-1])]
    if at_end:
        progress.note(f"the best rate is an end of the list at layers {at_end}: widen --lr")


def _unconverged(rows: Sequence[Row], max_iter: int) -> list[str]:
    """What to say of fits that ran out of iterations, and of those that rounding ended, which more would not help."""
    told: list[str] = []
    stuck = [row for row in rows if row["converged"] is False]
    cut = [row for row in stuck if row["n_iter"] >= max_iter]
    rounded = [row for row in stuck if row["n_iter"] < max_iter]
    ends = (cut, f"after {max_iter} iterations", "raise --max-iter"), (rounded, "when rounding ended it", "")
    for found, when, way_out in ends:
        if found:
            layers, largest = [row["layer"] for row in found], max(row["gradient"] for row in found)
            text = f"not converged {when}: layers {layers} (gradient up to {largest:.1e})"
            told.append(f"{text}; {way_out}" if way_out else text)
    return told


def _model_name(pair: Pair) -> str:
    model = pair.train.manifest["inputs"].get("model")
    return Path(model["path"] if model else pair.train.path).name


def curve(numbers: Row, name: str) -> np.ndarray:
    """Test accuracy by layer as a chart, uint8 [H, W, 3]; baselines of one layer are dashed levels."""
    from pixseq.drawing.charts import line_chart

    def line(name: str, rows: Sequence[Row]) -> tuple:
        return name, [row["layer"] for row in rows], [100 * row["test_accuracy"] for row in rows]

    series = [line(name, numbers["layers"])]
    levels = []
    for baseline in numbers["baselines"]:
        if len(baseline["layers"]) > 1:
            series.append(line(baseline["name"], baseline["layers"]))
        else:
            levels.append((baseline["name"], 100 * baseline["test_accuracy"]))
    if numbers["concat"]:
        layers = numbers["concat"]["layers"]
        levels.append((f"layers {layers[0]} to {layers[-1]} together", 100 * numbers["concat"]["test_accuracy"]))
    levels.append(("most frequent class", 100 * numbers["majority"]))
    names = {"logistic": "Linear probe", "knn": "k-nearest-neighbour probe", "attentive": "Attentive probe"}
    title, axis = f"{names[numbers['method']]} by layer", "layer"
    if len(numbers.get("window", [])) > 1:
        title, axis = f"{names[numbers['method']]} of {len(numbers['window'])} layers together", "last layer"
    title += f": {100 * numbers['test_accuracy']:.1f} % at layer {numbers['best_layer']}"
    return line_chart(series, title, axis, "test accuracy, %", levels)
