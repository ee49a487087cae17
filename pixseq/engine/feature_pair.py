"""Features of train and of test that belong together: what probes and other comparisons read.

Pooled features are [layers, N, D]; unpooled ones, of every position, [layers, N, T, D] and often larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts.arrays import Store, open_store
from pixseq.artifacts.manifest import reference
from pixseq.engine.parts import check_disjoint
from pixseq.errors import PixseqError
from pixseq.numerics.labelled import Labelled, rows_of, standardize


@dataclass(frozen=True)
class Side:
    """The features of one split: their store, and of each view of an image its label, int32 [n].

    `shows` [n] says which image of the source each view shows; None: every one an image of its own.
    """

    store: Store
    labels: np.ndarray
    shows: np.ndarray | None

    @property
    def masks(self) -> int:
        return masks(self.store)

    def labelled(self, X: np.ndarray, views: np.ndarray | slice = slice(None)) -> Labelled:
        """The rows X of all views, or of some, with what is known of them."""
        return Labelled(X, self.labels[views], self.masks, None if self.shows is None else self.shows[views])

    def pooled(self, layer: int) -> np.ndarray:
        """One layer, float32 [N, D]: as stored, or the mean over positions, a chunk in memory at a time."""
        chunks = [slice(None)] if _positions(self.store) is None else chunk_slices(self.store)
        parts = [_pooled(layer_rows(self.store, layer, rows)) for rows in chunks]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pooled_views(self, layer: int, views: np.ndarray) -> np.ndarray:
        """The rows of some ascending views in one layer, float32 [views * M, D]: what a few need of a large store.

        A chunk in memory at a time, unpooled features as their mean over positions. Raises PixseqError where a value is
        not finite.
        """
        rows, parts = rows_of(views, self.masks), []
        for chunk in chunk_slices(self.store):
            here = rows[slice(*np.searchsorted(rows, [chunk.start, chunk.stop]))]
            if len(here):
                parts.append(_pooled(layer_rows(self.store, layer, chunk)[here - chunk.start]))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Pair:
    """Features of train and of test by one model. `layers` are the stored ones."""

    train: Side
    test: Side
    layers: list[int]
    class_names: list[str] | None

    def name(self, label: int) -> str:
        return self.class_names[label] if self.class_names and label < len(self.class_names) else f"class {label}"

    def references(self, train: str, test: str) -> dict[str, dict[str, str]]:
        sides = {train: self.train.store, test: self.test.store}
        return {role: reference(store.path, store.manifest) for role, store in sides.items()}

    @property
    def positions(self) -> int | None:
        """T of unpooled features, None of pooled ones."""
        return _positions(self.train.store)

    @property
    def width(self) -> int:
        return self.train.store.shape("features")[-1]

    def read(self, layers: Sequence[int], scaled: bool) -> tuple[Labelled, Labelled]:
        """These layers side by side, as float32 [N, D]; unpooled features are averaged over positions.

        Raises PixseqError where a value is not finite.
        """
        both = []
        for side in (self.train, self.test):
            parts = [side.pooled(layer) for layer in layers]
            both.append(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        if scaled:
            standardize(*both)
        return self.train.labelled(both[0]), self.test.labelled(both[1])

    def bytes_per_layer(self) -> int:
        """While one layer is probed: both sides, and a copy of the part that is fitted."""
        train, test = (len(side.labels) * side.masks for side in (self.train, self.test))
        chunk = chunk_rows(self.train.store) * (self.positions or 0)
        return 4 * self.width * (2 * train + test + chunk)


def layer_rows(store: Store, layer: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one layer as they are stored, [n, D] or [n, T, D]. Raises PixseqError where a value is not finite."""
    values = store.read("features", (store.meta["layers"].index(layer), rows))
    if not _finite(values):
        raise PixseqError(
            f"{store.path}: layer {layer} holds values that are not finite",
            "the model diverged, or --dtype float16 was too narrow: make the features again in float32",
        )
    return values


def _finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return bool((values.view(np.uint16) & 0x7C00 != 0x7C00).all())  # the exponent: four times as fast as isfinite


def chunk_rows(store: Store) -> int:
    """Rows of a chunk, which are read and decoded together."""
    return store.arrays["features"].chunks[1]


def chunk_slices(store: Store) -> list[slice]:
    """The rows of a store chunk by chunk."""
    total, size = store.shape("features")[1], chunk_rows(store)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _pooled(values: np.ndarray) -> np.ndarray:
    """float32 [n, D]: of [n, T, D] the mean over positions."""
    values = values.astype(np.float32, copy=False)
    return values.mean(axis=1) if values.ndim == 3 else values


def _positions(store: Store) -> int | None:
    _, _, *positions, _ = store.shape("features")
    return positions[0] if positions else None


def masks(store: Store) -> int:
    """Consecutive rows an image (BERT's masks)."""
    return store.meta.get("masks") or 1


def open_pair(train_path: str | Path, test_path: str | Path) -> Pair:
    """Raises PixseqError where the two do not belong together, or cannot be probed."""
    train, test = open_store(train_path, "features"), open_store(test_path, "features")
    tokens = [store.manifest["inputs"].get("tokens", {}).get("id") for store in (train, test)]
    if train.manifest["id"] == test.manifest["id"] or (tokens[0] and tokens[0] == tokens[1]):
        raise PixseqError(
            f"{test.path} holds features of the same images as {train.path}",
            "a probe is tested on images it was not fitted on: make features of the test split",
        )
    check_disjoint(train, test, "a probe is tested on images it was not fitted on")
    for what, ours, theirs, hint in _differences(train, test):
        if ours != theirs:
            ours, theirs = str(ours)[:200], str(theirs)[:200]
            raise PixseqError(f"{what} differ: {train.path} has {ours}, {test.path} has {theirs}", hint)
    fitted, tested = (Side(store, _labels(store), _shows(store)) for store in (train, test))
    classes = np.unique(fitted.labels)
    if len(classes) < 2:
        raise PixseqError(
            f"{train.path} holds one class only (label {classes[0]})", "a probe needs images of two classes or more"
        )
    return Pair(fitted, tested, train.meta["layers"], train.meta.get("class_names"))


def _differences(train: Store, test: Store) -> Iterator[tuple[str, Any, Any, str]]:
    """What must agree: its name, both sides, the way out."""
    same_model = "make both features with the same model and options"

    def of(store: Store, key: str) -> Any:
        return store.manifest["config"].get(key)

    def model(store: Store) -> Any:
        return store.manifest["inputs"].get("model", {}).get("id", "no model")

    yield "the models", model(train), model(test), same_model
    yield "the weights", of(train, "weights"), of(test, "weights"), same_model
    yield "the random models", of(train, "random_init"), of(test, "random_init"), same_model
    attention = [of(store, "attention") for store in (train, test)]
    if all(attention):  # features of earlier versions do not tell it
        yield "the attention", *attention, same_model
    for key in ("tap", "pool"):
        yield f"the features ({key})", train.meta.get(key), test.meta.get(key), same_model
    yield "the layers", train.meta["layers"], test.meta["layers"], "make both features with the same --layers"
    yield "the widths", train.shape("features")[-1], test.shape("features")[-1], "encode both splits at one size"
    yield "the positions", _positions(train), _positions(test), "encode both splits at one size"
    ours, theirs = (store.meta.get("class_names") for store in (train, test))
    if ours and theirs:
        yield "the class names", ours, theirs, "train and test must come from one data set, with the same class folders"


def _labels(store: Store) -> np.ndarray:
    """int32 [n], one a view of an image. Raises PixseqError where there are none."""
    labels = store.labels()
    if labels is None or not len(labels):
        raise PixseqError(
            f"{store.path} holds no {'images' if labels is not None else 'labels'}",
            "encode a source with labels (class folders, CIFAR-10 ...) and make its features again",
        )
    if labels.min() < 0:
        raise PixseqError(f"{store.path}: {(labels < 0).sum()} rows have no label", "encode labelled images only")
    return labels[:: masks(store)]


def _shows(store: Store) -> np.ndarray | None:
    """Which image of the source each view shows, int32 [n]; None where every view is an image of its own."""
    images = store.images()
    return None if images is None else images[:: masks(store)]
