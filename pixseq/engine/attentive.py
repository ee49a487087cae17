"""The attentive probe as a method of `probe`: training on unpooled features (AIM §4.3 and appendix D).

What is probed is a window of layers: the mean of their features. A probe a learning rate trains on the images that are
not held out, all of them in one pass over the features; the best one on the held-out images gives the rate, with which
a fresh probe trains on all of train, as the logistic probe is fitted again with its C; test is scored once.

The mean over a window is held in memory where it fits, else read anew every epoch: in either case chunks in a random
order, shuffled within a buffer of many, so that both give the same numbers. Shapes: N rows, T positions, D width,
B rows of a batch, R learning rates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.cores import host_memory_bytes, threads
from pixseq.engine.feature_pair import Pair, Side, chunk_rows, chunk_slices, layer_rows
from pixseq.engine.probing import Row, Split
from pixseq.errors import PixseqError, UsageError
from pixseq.models.attentive import AttentiveProbe, SideBySideAdamW
from pixseq.numerics.labelled import rows_of
from pixseq.numerics.schedule import learning_rate
from pixseq.numerics.voting import accuracy
from pixseq.runtime import Machine, generator, machine
from pixseq.streams import Stream

LAST = 6  # layers whose mean is probed unless told otherwise
# Measured on patch features of CIFAR-10, width 192. The best rate is 3e-3 or more, of wider features a lower one.
# Decays of 0, 0.01 and 0.1 agree within half a point, 1 loses two. Twice the epochs gain a point; 2,000 images are
# best after some 200 steps and overfit after 800.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAY = 0.01
BATCH_SIZE = 256
EPOCHS, FEWEST_STEPS = 10, 300
BUFFER_BYTES = 1 << 30  # of rows that are shuffled together
MEMORY_SHARE = 4  # the mean over a window is held where it takes no more than one part in this many
PRECISION = "fp32"


@dataclass(frozen=True)
class AttentiveRecipe:
    """How windows of layers are probed; None where it depends on the features."""

    val_fraction: float
    seed: int
    lr: list[float]
    window: int | None = None
    heads: int | None = None
    epochs: int | None = None
    batch_size: int = BATCH_SIZE
    weight_decay: float = WEIGHT_DECAY
    device: str = "auto"
    method: ClassVar = "attentive"

    def __post_init__(self) -> None:
        """Raises UsageError where a value cannot be used."""
        for flag in ("window", "heads", "epochs", "batch_size"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}, it must be at least 1")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay is {self.weight_decay}, it must be 0 or more")

    @property
    def searched(self) -> tuple[str, list[float]]:
        """The name in a row of what is chosen by the held-out images, and its values, ascending."""
        return "lr", self.lr

    def config(self) -> Row:
        """What enters the result's config."""
        return {"method": self.method} | {key: value for key, value in asdict(self).items() if key != "device"}

    def used(self) -> Row:
        """What its results say of how they were computed."""
        with machine(self.device, PRECISION) as where:
            return where.used()

    def check(self, pair: Pair, split: Split) -> None:
        """Raises PixseqError for features that cannot be attended over, UsageError for heads that do not divide D."""
        store = pair.train.store
        if pair.positions is None:
            raise PixseqError(
                f"{store.path} holds pooled features, one vector an image, which leaves nothing to attend over",
                "make features of both splits with --pool none, or probe with --method logistic",
            )
        heads = self.n_heads(store)
        if pair.width % heads:
            raise UsageError(
                f"--heads {heads} does not divide the width of {store.path}, {pair.width}",
                f"the default is {replace(self, heads=None).n_heads(store)}",
            )
        if self.heads is None and trunk_heads(store) is None:
            progress.note(
                f"{store.path} does not tell how many attention heads its model has: the probe gets {heads}, "
                "one for every 64 features; --heads sets it"
            )

    def probe(self, pair: Pair, layers: Sequence[int], every: bool, split: Split, name: str) -> list[Row]:
        """One row a window of these layers; `every`: no list of layers was asked for. Its `layer` is the window's last.

        Raises PixseqError for values that are not finite.
        """
        with machine(self.device, PRECISION) as where:
            return [
                _probe_window(pair, window, split, self, where, name) for window in windows(layers, every, self.window)
            ]

    def n_heads(self, store: Store) -> int:
        """As asked for, else as many as the model that made the features has (§4.3).

        Where the features do not tell: the largest divisor of the width up to one head for every 64 features.
        """
        return self.heads or trunk_heads(store) or usual_heads(store.shape("features")[-1])

    def n_epochs(self, rows: int) -> int:
        """As asked for, else EPOCHS, or as many as make FEWEST_STEPS."""
        return self.epochs or max(EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(rows / self.batch_size)))


def trunk_heads(store: Store) -> int | None:
    """The attention heads of the model that made these features; None where they do not tell."""
    return store.manifest["summary"].get("n_head")


def usual_heads(width: int) -> int:
    return next(n for n in range(max(width // 64, 1), 0, -1) if width % n == 0)


def windows(layers: Sequence[int], every: bool, window: int | None) -> list[list[int]]:
    """The layers that are averaged: each `window` neighbours, else all of a list, else the last ones of `every`.

    The last ones leave out layer 0, which no block has seen, unless it is the only one.
    """
    if window is not None:
        window = min(window, len(layers))
        return [list(layers[start : start + window]) for start in range(len(layers) - window + 1)]
    if every:
        return [([layer for layer in layers if layer > 0] or list(layers))[-LAST:]]
    return [list(layers)]


def _probe_window(
    pair: Pair,
    window: Sequence[int],
    split: Split,
    recipe: AttentiveRecipe,
    where: Machine,
    name: str,
) -> Row:
    classes, labels = np.unique(pair.train.labels, return_inverse=True)
    fit, held = (rows_of(views, pair.train.masks) for views in split)
    train = Averaged(pair.train.store, window, hold=True)
    targets = torch.from_numpy(np.repeat(labels, pair.train.masks)).to(where.device)
    name = f"{name} {span(window)}"

    def score(predicted: np.ndarray, side: Side, views: np.ndarray | slice = slice(None)) -> float:
        return accuracy(classes[predicted], side.labels[views], side.masks, recipe.seed)

    tried = _train(train, fit, targets, len(classes), recipe.lr, recipe, where, name)
    accuracies = [score(each, pair.train, split[1]) for each in _predict(tried, train, held, recipe, where)]
    best = int(np.argmax(accuracies))  # the first, so the lowest rate, of equals
    everything = np.arange(len(targets))
    probe = _train(train, everything, targets, len(classes), [recipe.lr[best]], recipe, where, f"{name} again")
    del train
    test = Averaged(pair.test.store, window, hold=False)
    (predicted,) = _predict(probe, test, np.arange(len(test)), recipe, where)
    return {
        "layer": window[-1],
        "window": list(window),
        "c": None,
        "lr": recipe.lr[best],
        "heads": probe.n_heads,
        "epochs": recipe.n_epochs(len(everything)),
        "val_accuracy": accuracies[best],
        "test_accuracy": score(predicted, pair.test),
        "converged": None,
        "tried": [{"lr": lr, "val_accuracy": value} for lr, value in zip(recipe.lr, accuracies)],
    }


def span(window: Sequence[int]) -> str:
    """The layers of a window for people: "layer 3", "layers 2-7", "layers 1,4"."""
    if len(window) == 1:
        return f"layer {window[0]}"
    run = list(window) == list(range(window[0], window[-1] + 1))
    return f"layers {window[0]}-{window[-1]}" if run else f"layers {','.join(map(str, window))}"


class Averaged:
    """The mean over some layers of a store, [N, T, D], of the stored type; `hold` it in memory where it fits."""

    def __init__(self, store: Store, layers: Sequence[int], hold: bool):
        self.store, self.layers, self.held = store, layers, None
        _, *self.shape = store.shape("features")
        self.dtype = store.dtype("features")
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.chunks = chunk_slices(store)
        if hold and len(self) * self.row_bytes <= host_memory_bytes() // MEMORY_SHARE:
            self.held = self._read(self.chunks, [np.arange(chunk.start, chunk.stop) for chunk in self.chunks])

    def __len__(self) -> int:
        return self.shape[0]

    def batches(
        self, rows: np.ndarray, size: int, rng: np.random.Generator | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of B <= `size` of the ascending `rows`, and their features [B, T, D]; shuffled by `rng`.

        Shuffling, as many chunks as fill a buffer are mixed and cut into batches of nearly equal size.
        """
        chunk = chunk_rows(self.store)
        numbers, at_once = np.unique(rows // chunk), math.ceil(size / chunk)
        if rng is not None:
            numbers, at_once = rng.permutation(numbers), max(BUFFER_BYTES // (self.row_bytes * chunk), 1)
        for start in range(0, len(numbers), at_once):
            chunks = [self.chunks[i] for i in numbers[start : start + at_once]]
            wanted = [rows[slice(*np.searchsorted(rows, [chunk.start, chunk.stop]))] for chunk in chunks]
            values = self._read(chunks, wanted) if self.held is None else np.empty(0)
            these = np.concatenate(wanted)
            order = np.arange(len(these)) if rng is None else rng.permutation(len(these))
            for part in np.array_split(order, math.ceil(len(order) / size)):
                yield these[part], values[part] if self.held is None else self.held[these[part]]
            del values  # before the next buffer is read

    def _read(self, chunks: Sequence[slice], wanted: Sequence[np.ndarray]) -> np.ndarray:
        """The wanted rows of each chunk, one after the other."""
        out, done = np.empty((sum(map(len, wanted)), *self.shape[1:]), self.dtype), 0
        with threads(len(self.layers)) as pool:  # decoding takes longer than all else
            for chunk, rows in zip(chunks, wanted):
                parts = pool.map(functools.partial(layer_rows, self.store, rows=chunk), self.layers)
                out[done : done + len(rows)] = _mean(parts)[rows - chunk.start]
                done += len(rows)
        return out


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Taken in float32, rounded to the stored type."""
    if len(parts) == 1:
        return parts[0]
    total = torch.from_numpy(parts[0]).float()
    for part in parts[1:]:
        total += torch.from_numpy(part)
    return total.div_(len(parts)).to(torch.from_numpy(parts[0]).dtype).numpy()


def _train(
    data: Averaged,
    rows: np.ndarray,
    targets: torch.Tensor,
    n_classes: int,
    rates: Sequence[float],
    recipe: AttentiveRecipe,
    where: Machine,
    name: str,
) -> AttentiveProbe:
    """A probe a rate on these rows; every rate falls along a cosine to zero. `targets` [N] are from 0 to C - 1."""
    probe = AttentiveProbe(data.shape[-1], recipe.n_heads(data.store), n_classes, len(rates))
    probe.init_weights(generator(recipe.seed, Stream.ATTENTIVE_INIT))
    probe = probe.to(where.device).train()
    optimizer = SideBySideAdamW(probe, rates, recipe.weight_decay)
    total, seen = len(rows) * recipe.n_epochs(len(rows)), 0
    with progress.track(name, total, "images") as bar:
        for epoch in range(recipe.n_epochs(len(rows))):
            rng = np.random.default_rng([recipe.seed, Stream.ATTENTIVE_ORDER, epoch])
            for numbers, values in data.batches(rows, recipe.batch_size, rng):
                logits = probe(torch.from_numpy(values).to(where.device).float())
                truth = targets[torch.from_numpy(numbers).to(where.device)].repeat(len(rates))
                # Summed over rates: the gradient of one does not depend on how many others there are.
                loss = F.cross_entropy(logits.flatten(0, 1), truth, reduction="sum") / len(numbers)
                loss.backward()
                optimizer.step(learning_rate(seen, total, 1.0, 0, "cosine"))
                seen += len(numbers)
                bar.advance(len(numbers))
    return probe.eval()


@torch.inference_mode()
def _predict(
    probe: AttentiveProbe, data: Averaged, rows: np.ndarray, recipe: AttentiveRecipe, where: Machine
) -> np.ndarray:
    """The class of each of the ascending rows by each probe, [R, rows]."""
    found = []
    for _, values in data.batches(rows, recipe.batch_size):
        found.append(probe(torch.from_numpy(values).to(where.device).float()).argmax(-1).cpu())
    return torch.cat(found, dim=1).numpy()
