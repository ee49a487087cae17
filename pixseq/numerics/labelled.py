"""Features with the labels of what they show, and how they are divided: by image, however many rows an image has.

- BERT models see masked inputs at evaluation too: M masks give M consecutive rows a view (Image GPT §4.6).
- Several views of an image (random crops) are items of their own, fitted and scored one by one; but all views of one
  image lie on the same side of every split, and what counts images counts an image once.

Shapes: n views (of as many images, or fewer), M rows (masks) a view, D features. Labels are one a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixseq.streams import Stream


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
        return len(images_of(self.y, self.shows)[0])

    def take(self, views: np.ndarray) -> Labelled:
        """Some views, with all their rows."""
        shows = None if self.shows is None else self.shows[views]
        return Labelled(self.X[rows_of(views, self.masks)], self.y[views], self.masks, shows)


def rows_of(views: np.ndarray, masks: int) -> np.ndarray:
    """The rows of some views, M consecutive ones each."""
    return (views[:, None] * masks + np.arange(masks)).ravel()


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


def _views_of(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The views of some images, image by image."""
    order = np.argsort(numbers, kind="stable")
    low, high = (np.searchsorted(numbers[order], images, side) for side in ("left", "right"))
    return np.concatenate([order[slice(*ends)] for ends in zip(low, high)])
