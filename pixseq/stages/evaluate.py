"""evaluate: the loss of a model on images, along the sequence too, and its accuracy where it has a classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.artifacts.picture import check_png, save_png
from pixseq.artifacts.targets import check_targets
from pixseq.choices import Attention, Precision, Weights
from pixseq.drawing.charts import line_chart
from pixseq.drawing.grids import grid
from pixseq.engine.image_store import image_batches, open_images, seen_images
from pixseq.engine.images import as_tensor
from pixseq.engine.masks import mask_count, masks_of
from pixseq.engine.opening import open_model
from pixseq.engine.parts import part_of_store
from pixseq.engine.scores import config_of, facts_of, images_at_once, no_numbers
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model
from pixseq.numerics.voting import elected
from pixseq.runtime import Machine, generator, machine
from pixseq.streams import Stream

PICTURES = 16


@owns("evaluate", "out", "by_position", "pictures")
def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path | None = None,
    weights: Weights = "model",
    masks: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
    overwrite: bool = False,
    attention: Attention | None = None,
    by_position: str | Path | None = None,
    pictures: str | Path | None = None,
) -> dict[str, Any]:
    """The metrics as a mapping, written as an artifact too when `out` is given.

    The loss is that of pretraining, in the units of its family, with the attention of pretraining; `masks` masks an
    image are drawn where there are any. A classifier is scored with the attention it is used with; for bert its
    prediction is the vote over the masks, ties broken at random (§4.6). `attention` sets both. `by_position`: a .json
    of the mean loss along the sequence, and a .png of it beside. `pictures`: a .png of some images beside what the
    model predicts at each place from the true ones before it. A model without a prediction head has no loss, only
    its accuracy. Computed in float32, as the published figures are, unless `precision` asks for bf16. Raises
    PixseqError where it has neither head.
    """
    chart = _check_outputs(out, by_position, pictures, overwrite)
    with machine(device, precision) as where:
        net, checkpoint = open_model(model, where, weights, attention)
        net.freeze(where.dtype)
        store = open_images(tokens, net.shape.reads)
        checkpoint.codec.must_pair(checkpoint.path, store.codec, store.path, classes=net.shape.n_classes > 0)
        labels = _labels(net, store)
        passes = _passes(net, attention, labels)
        _check_passes(passes, f"{model} {_why_not(net, attention, labels)}", (by_position, pictures) != (None, None))
        batch, count = batch_size or images_at_once(net, where), mask_count(net.shape, masks)
        sums = Sums(along=by_position is not None)
        with progress.track("evaluate", len(passes) * len(store), "images") as bar:
            for each, first, images in _batches(net, store, passes, batch, checkpoint.codec):
                true = labels[first : first + len(images)] if labels is not None and each.classify else None
                _measure(where, net, images, first, count, seed, each.loss, true, sums)
                bar.advance(len(images))
        if pictures is not None:
            net.attention = passes[0].attention
            drawn, shown = _predicted(where, net, store, checkpoint.codec, seed)
        sums.check(model, tokens)
        numbers = facts_of(net, store)
        if passes[0].loss:
            numbers |= net.shape.report(sums.mean_loss(store, count), checkpoint.codec.grid[2])
        numbers |= ({} if labels is None else {"accuracy": sums.hits / len(store)}) | where.used()
        config = config_of(weights, count, seed, attention, where)
    if "rows" in numbers:
        progress.warn(f"{tokens} holds several random crops an image: the numbers are means over crops")
    inputs = {"model": reference(model, checkpoint.manifest), "tokens": reference(tokens, store.manifest)}
    if out is not None:
        write_metrics(out, "evaluate", config, inputs, numbers, overwrite)
    if by_position is not None and chart is not None:
        along = {**numbers, "loss_by_position": sums.curve()}
        write_metrics(by_position, "evaluate", config, inputs, along, overwrite)
        drawn_curve = _curve_chart(sums.curve(), f"{checkpoint.path.name} on {store.path.name}")
        save_png(chart, drawn_curve, "evaluate", config, inputs, overwrite=overwrite)
    if pictures is not None:
        save_png(pictures, drawn, "evaluate", config, inputs, shown, overwrite)
    return numbers


def _check_outputs(
    out: str | Path | None, by_position: str | Path | None, pictures: str | Path | None, overwrite: bool
) -> Path | None:
    """Where the curve is drawn. Raises UsageError where its numbers go to no .json, and what check_targets raises."""
    chart = None if by_position is None else Path(by_position).with_suffix(".png")
    if by_position is not None and Path(by_position).suffix != ".json":
        raise UsageError(f"--by-position is {by_position}, not a .json", f"{chart} will be drawn beside it")
    check_png(pictures)
    check_targets((out, by_position, chart, pictures), overwrite)
    return chart


def _curve_chart(curve: list[float | None], title: str) -> np.ndarray:
    points = [(position, loss) for position, loss in enumerate(curve) if loss is not None]
    line = ("loss", [position for position, _ in points], [loss for _, loss in points])
    return line_chart([line], title, "position along the sequence", "loss")


@torch.inference_mode()
def _predicted(where: Machine, net: Model, store: Store, codec: Codec, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A grid, uint8, of images from all over the store: what was given, what is predicted at each place; and a summary
    that says which they are.
    """
    rows, part = part_of_store(store, PICTURES)
    x = net.prepare(as_tensor(seen_images(store, rows, codec)).to(where.device))
    masked = masks_of(net, 1, (generator(seed, i, 0, Stream.EVALUATION_MASK) for i in range(len(x))), where)
    with where.autocast():
        predicted = net.predictions(net(x, masked), x, masked)
    codec.must_have_colours(store.path)
    given, answers = (codec.to_images(images.cpu().numpy()) for images in (x, predicted))
    pairs = np.stack([given, answers], axis=1).reshape(-1, *given.shape[1:])
    columns = min(4, len(pairs))
    drawn = grid(pairs, columns, column_labels=["given", "predicted"] * (columns // 2))
    return drawn, {"pictures": len(given), **({"part": part} if part else {})}


@dataclass(frozen=True)
class Pass:
    """One forward pass over the images: the attention in use, and what is measured with it."""

    attention: str
    loss: bool
    classify: bool


@dataclass
class Sums:
    """Sums over what was measured; if asked for, `by_position` of losses and `counts` of images along the sequence."""

    along: bool
    by_position: Tensor | None = None
    counts: Tensor | None = None
    loss: float = 0.0
    scored: int = 0
    hits: int = 0
    wild: int = 0  # images whose class scores are no numbers

    def check(self, model: str | Path, tokens: str | Path) -> None:
        """Raises PixseqError where the model gave no numbers: none of them is then worth reporting."""
        if math.isfinite(self.loss) and not self.wild:
            return
        what = f"the loss of {model} on {tokens} is {self.loss}"
        if self.wild:
            what = f"the class scores of {model} for {self.wild} images of {tokens} are not finite"
        raise no_numbers(what, model)

    def mean_loss(self, store: Store, masks: int) -> float:
        """Over all that was scored, whatever the batches were. Raises PixseqError where nothing was."""
        if not self.scored:
            raise PixseqError(
                f"{masks} masks of {len(store)} images of {store.path} hide no pixel: there is nothing to predict",
                "give more images, or more --masks",
            )
        return self.loss / self.scored

    def curve(self) -> list[float | None]:
        """The mean loss at each position, None where nothing is scored."""
        if self.by_position is None or self.counts is None:
            return []
        return [float(x / n) if n else None for x, n in zip(self.by_position, self.counts)]

    def add_positions(self, losses: Tensor, scored: Tensor) -> None:
        """Of a batch, [B, T] each."""
        sums, counts = (losses * scored).double().sum(0).cpu(), scored.sum(0).cpu()
        self.by_position = sums if self.by_position is None else self.by_position + sums
        self.counts = counts if self.counts is None else self.counts + counts


def _passes(net: Model, attention: str | None, labels: np.ndarray | None) -> list[Pass]:
    """The loss as in pretraining first, then the classifier as it is used; in one pass where that is the same."""
    learnt, used = attention or net.shape.pretraining_attention, attention or net.shape.attention_patterns[0]
    loss, classify = net.shape.predicts(learnt), labels is not None
    if loss and classify and learnt == used:
        return [Pass(used, True, True)]
    return [Pass(learnt, True, False)] * loss + [Pass(used, False, True)] * classify


def _check_passes(passes: list[Pass], why: str, shows_loss: bool) -> None:
    """Raises PixseqError where nothing can be measured, UsageError where there is no loss to show."""
    if not passes:
        raise PixseqError(why, "it gives features: pixseq features")
    if shows_loss and not passes[0].loss:
        raise UsageError(why, "leave out --by-position and --pictures")


def _batches(
    net: Model, store: Store, passes: list[Pass], batch: int, codec: Codec
) -> Iterator[tuple[Pass, int, np.ndarray]]:
    """Each pass over all images, `batch` at once, with its attention in use: (pass, first number, images)."""
    for each in passes:
        net.attention = each.attention
        for first, images in image_batches(store, batch, codec=codec):
            yield each, first, images


def _why_not(net: Model, attention: str | None, labels: np.ndarray | None) -> str:
    """Why there is no loss."""
    if not net.shape.head:
        return "has no prediction head: no loss to measure" + (
            ", and the images have no labels" if net.shape.n_classes and labels is None else ""
        )
    return f"has nothing to predict with {attention} attention"


def _labels(net: Model, store: Store) -> np.ndarray | None:
    """Labels for the classifier, None where one of the two is missing."""
    labels = store.labels() if net.shape.n_classes else None
    if labels is not None and int(labels.min()) < 0:
        raise PixseqError(
            f"{store.path}: {(labels < 0).sum()} of {len(labels)} images have no label",
            "their accuracy is not known: encode labelled images only",
        )
    if labels is not None and int(labels.max()) >= net.shape.n_classes:
        raise PixseqError(
            f"{store.path} has label {int(labels.max())}, the model tells {net.shape.n_classes} classes apart",
            "evaluate on images of the classes it was fine-tuned on",
        )
    return labels


@torch.inference_mode()
def _measure(
    where: Machine,
    net: Model,
    images: np.ndarray,
    first: int,
    masks: int,
    seed: int,
    with_loss: bool,
    labels: np.ndarray | None,
    sums: Sums,
) -> None:
    """Add a batch whose first image has the number `first`; labels None: no classification."""
    x = net.prepare(as_tensor(images).to(where.device))
    predicted = np.empty((len(x), masks), np.int64)
    for mask in range(masks):
        streams = (generator(seed, first + i, mask, Stream.EVALUATION_MASK) for i in range(len(x)))
        masked = masks_of(net, 1, streams, where)
        with where.autocast():
            output = net(x, masked, logits=with_loss)
            if with_loss:
                sums.loss += float(net.losses(output, x, masked).double().sum())
                sums.scored += net.scored(len(x), masked)
                if sums.along:
                    sums.add_positions(*net.position_losses(output, x, masked))
        if labels is not None:
            assert output.class_logits is not None
            sums.wild += int((~torch.isfinite(output.class_logits)).any(1).sum())
            predicted[:, mask] = output.class_logits.argmax(1).cpu().numpy()
    if labels is not None:
        sums.hits += int((elected(predicted.ravel(), masks, seed, first) == labels).sum())
