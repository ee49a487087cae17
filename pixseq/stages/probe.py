"""probe: read the classes of images from features, layer by layer, and compare with baselines (Image GPT §4.1-4.7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq import progress
from pixseq.artifacts.owning import owns
from pixseq.artifacts.picture import check_png
from pixseq.choices import LogisticSolver, LowDataChoice, ProbeMethod
from pixseq.engine.feature_pair import Pair, open_pair
from pixseq.engine.listed import inverse_strengths, listed_layers, positive_numbers
from pixseq.engine.low_data import FewLabels, probe_few
from pixseq.engine.probing import LayerRecipe, Row, Split
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.labelled import held_out_split, images_of
from pixseq.numerics.linear_probe import DEFAULT_CS, MAX_ITER, SOLVERS

if TYPE_CHECKING:
    from pixseq.engine.attentive import AttentiveRecipe

    Recipe = LayerRecipe | AttentiveRecipe

FEW_TESTED = 100  # images; below it an accuracy is known to five points at best


@owns("probe", "out", "plot")
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
    c: str | Sequence[float] = DEFAULT_CS,
    val_fraction: float = 0.1,
    standardize: bool | None = None,
    seed: int = 0,
    max_iter: int = MAX_ITER,
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
    cs = inverse_strengths("--c", c)
    options: dict[str, Any] = {"window": window, "heads": heads, "epochs": epochs}
    options |= {"batch_size": batch_size, "weight_decay": weight_decay}
    recipe = _recipe(method, cs, val_fraction, standardize, seed, max_iter, solver, device, lr, options)
    few = _few_labels(method, labels_per_class, trials, low_data_choice)
    _check_concat(method, concat)
    check_png(plot)
    pair = open_pair(features, test)
    chosen, others = _chosen_layers(layers, pair), _baselines(baselines, pair)
    split = _split(pair, val_fraction, seed)
    _check_sizes(pair, others, chosen, split, recipe, few)
    numbers = _measure(pair, others, chosen, layers == "all", split, recipe, concat, few)
    _remark(numbers, recipe, max_iter)
    config = {**recipe.config(), "layers": chosen, "concat": concat, "labels_per_class": labels_per_class}
    config |= {"trials": trials, "baselines": list(others), "low_data_choice": few and few.choice}
    _write(out, plot, pair, others, config, numbers, overwrite)
    return numbers


# ---- what was asked for


def _recipe(
    method: str,
    cs: list[float],
    val_fraction: float,
    standardize: bool | None,
    seed: int,
    max_iter: int,
    solver: str | None,
    device: str | None,
    lr: Sequence[float] | str | None,
    options: dict[str, Any],
) -> Recipe:
    """Raises UsageError where a value cannot be used. `lr` and `options` (None: default) are of attentive."""
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}", "it lies between 0 and 1; the paper takes 0.1")
    if max_iter < 1:
        raise UsageError(f"--max-iter is {max_iter}, it must be at least 1")
    if solver is not None and method != "logistic":
        raise UsageError(f"--solver goes with --method logistic, not with {method}")
    if solver == "sklearn" and device not in (None, "auto", "cpu"):
        raise UsageError(f"--solver sklearn does not go with --device {device}", "it computes on the CPU")
    given = {name: value for name, value in options.items() if value is not None}
    if method != "attentive":
        if given or lr is not None:
            flag = next(iter(given), "lr").replace("_", "-")
            raise UsageError(f"--{flag} goes with --method attentive, not with {method}")
        fits = method == "logistic"
        scaled = fits if standardize is None else standardize
        solver = solver or SOLVERS[0] if fits else None
        return LayerRecipe(method, cs, val_fraction, scaled, seed, max_iter, solver, device or "auto")
    if standardize is not None:
        raise UsageError("--standardize does not go with --method attentive", "its batch norm scales the features")
    from pixseq.engine import attentive

    rates = positive_numbers("--lr", attentive.LEARNING_RATES if lr is None else lr, "0.0003,0.001", "0 trains nothing")
    return attentive.AttentiveRecipe(val_fraction, seed, rates, device=device or "auto", **given)


def _few_labels(method: str, labels_per_class: int | None, trials: int, choice: str | None) -> FewLabels | None:
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


def _check_concat(method: str, concat: int) -> None:
    if concat < 0:
        raise UsageError(f"--concat is {concat}", "a number of layers, as 5, or 0 for none")
    if concat and method == "attentive":
        raise UsageError("--concat does not go with --method attentive", "--window averages neighbouring layers")


# ---- what is read


def _chosen_layers(layers: str | Sequence[int], pair: Pair) -> list[int]:
    wanted = listed_layers("--layers", layers)
    if wanted is None:
        return list(pair.layers)
    missing = [layer for layer in wanted if layer not in pair.layers]
    if missing or not wanted:
        raise UsageError(
            f"--layers {','.join(map(str, missing))}: {pair.train.store.path} holds the layers {pair.layers}",
            "choose among those, or make features of more layers",
        )
    return wanted


def _baselines(baselines: Sequence[tuple[str, str | Path, str | Path]], pair: Pair) -> dict[str, Pair]:
    """Other features of the images of `pair`, by name. Raises UsageError for a name twice, PixseqError for others."""
    found = {name: open_pair(*paths) for name, *paths in baselines}
    if len(found) < len(baselines):
        raise UsageError("two baselines have one name", "give each its own")
    for name, other in found.items():
        _check_baseline(name, other, pair)
    return found


def _check_baseline(name: str, other: Pair, pair: Pair) -> None:
    for ours, theirs in ((pair.train, other.train), (pair.test, other.test)):
        if not (np.array_equal(ours.labels, theirs.labels) and _same(ours.shows, theirs.shows)):
            raise PixseqError(
                f"baseline {name!r}: {theirs.store.path} holds {len(theirs.labels)} images whose labels are not those "
                f"of the {len(ours.labels)} images it is compared with",
                "make the baseline's features from the same tokens",
            )


def _same(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    return ours is theirs if ours is None or theirs is None else np.array_equal(ours, theirs)


def _split(pair: Pair, val_fraction: float, seed: int) -> Split:
    """Views to fit on and to choose by, split by image. Raises PixseqError where no class has two images."""
    try:
        return held_out_split(pair.train.labels, val_fraction, seed, pair.train.shows)
    except ValueError:
        told = f"every class of {pair.train.store.path} has a single image, which leaves none to choose by"
        raise PixseqError(told, "add images") from None


def _check_sizes(
    pair: Pair, others: dict[str, Pair], chosen: Sequence[int], split: Split, recipe: Recipe, few: FewLabels | None
) -> None:
    """Raises PixseqError or UsageError where these features cannot be probed so."""
    for each in (pair, *others.values()):
        recipe.check(each, split)
    if isinstance(recipe, LayerRecipe) and few is not None:
        few.check(pair, chosen, recipe.c)


# ---- measuring


def _measure(
    pair: Pair,
    others: dict[str, Pair],
    chosen: Sequence[int],
    every: bool,
    split: Split,
    recipe: Recipe,
    concat: int,
    few: FewLabels | None,
) -> Row:
    """The metrics: of each layer, of the best one and its neighbours, with few labels, and of the baselines."""
    rows = recipe.probe(pair, chosen, every, split, "probe")
    best = _best(rows)
    numbers: Row = {"method": recipe.method, **_data_facts(pair), "layers": rows, **_headline(best)}
    numbers |= {"concat": None, "low_data": None, "baselines": []}
    if isinstance(recipe, LayerRecipe) and concat:
        numbers["concat"] = recipe.concat(pair, best["layer"], concat, split)
    if isinstance(recipe, LayerRecipe) and few is not None:
        numbers["low_data"] = probe_few(pair, chosen, best["layer"], few, recipe)
    for name, other in others.items():
        same = [layer for layer in chosen if layer in other.layers]
        found = recipe.probe(other, same or other.layers, every or not same, split, f"probe {name}")
        numbers["baselines"].append({"name": name, "layers": found, **_headline(_best(found))})
    return numbers | recipe.used()


def _best(rows: Sequence[Row]) -> Row:
    """By held-out accuracy alone; the first, so the lowest layer, of equal ones."""
    return max(rows, key=lambda row: row["val_accuracy"])


def _headline(best: Row) -> Row:
    """What stands beside the rows of one set of features: its best row."""
    shown = ("window", "c", "lr", "heads", "val_accuracy", "test_accuracy")
    return {"best_layer": best["layer"], **{key: best[key] for key in shown if key in best}}


def _data_facts(pair: Pair) -> Row:
    """Counts, and the accuracy of always answering the most frequent class of train."""
    classes, counts = np.unique(pair.train.labels, return_counts=True)
    majority = classes[counts.argmax()]
    unseen = np.setdiff1d(pair.test.labels, classes)
    sides = {"train": pair.train, "test": pair.test}
    return {
        **{f"n_{name}": len(images_of(side.labels, side.shows)[0]) for name, side in sides.items()},
        **{f"{name}_views": len(side.labels) for name, side in sides.items() if side.shows is not None},
        "n_classes": len(classes),
        "majority": float((pair.test.labels == majority).mean()),
        "classes_only_in_test": [pair.name(int(label)) for label in unseen],
    }


# ---- what is told


def _remark(numbers: Row, recipe: Recipe, max_iter: int) -> None:
    """What a reader of the table should know."""
    if "test_views" in numbers:
        progress.warn(
            f"test holds {numbers['test_views']} random crops of {numbers['n_test']} images: accuracies are "
            "means over crops, where usually one centre crop an image is scored"
        )
    if numbers["n_test"] < FEW_TESTED:
        error = 50 / math.sqrt(numbers["n_test"])
        images = f"{numbers['n_test']} image{'s' * (numbers['n_test'] > 1)}"
        progress.warn(f"test has {images}: chance alone moves an accuracy on so few by {error:.0f} points")
    if numbers["classes_only_in_test"]:
        names = ", ".join(numbers["classes_only_in_test"][:5])
        progress.warn(f"test has classes that train lacks, never predicted: {names}")
    for told in _unconverged(numbers["layers"], max_iter):
        progress.warn(told)
    (option, tried), name = recipe.searched, {"c": "C", "lr": "rate"}
    at_end = [row["layer"] for row in numbers["layers"] if row[option] in (tried[0], tried[-1])]
    if at_end and len(tried) > 1:
        ends = f"{tried[0]:g} to {tried[-1]:g}"
        progress.note(f"{_at(at_end)} the best {name[option]} is an end of the list, {ends}: widen --{option}")


def _at(layers: Sequence[int]) -> str:
    return f"at layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


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
            text = f"not converged {when} {_at(layers)} (gradient up to {largest:.1e})"
            told.append(f"{text}; {way_out}" if way_out else text)
    return told


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
        from pixseq.drawing.probe import curve

        store = pair.train.store
        made_by = store.manifest["inputs"].get("model", {}).get("path", store.path)
        summary = {"best_layer": numbers["best_layer"]}
        save_png(plot, curve(numbers, Path(made_by).name), "probe", config, inputs, summary, overwrite)
