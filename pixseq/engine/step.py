"""The gradients of one step: this rank's share of the batch, passed through the model in micro-batches and scored.

What scores a batch is one type, `Score`, in training and in validation.
Shapes: B images, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixseq.config import TrainConfig
from pixseq.engine.batches import batch_indices
from pixseq.engine.images import Images
from pixseq.models.family import Model
from pixseq.models.output import Output
from pixseq.runtime import Machine, generator
from pixseq.runtime.cuda import pinned, to_device
from pixseq.streams import Stream


class Counts(NamedTuple):
    """What means over all images of a step, or of a validation, are divided by: the images, and what of them is scored
    (see Model.scored).
    """

    images: int
    scored: int

    @classmethod
    def of(cls, model: Model, images: int, masked: Tensor | None) -> Counts:
        """Where nothing is scored the sum of the losses is 0, and so shall its mean be."""
        return cls(images, max(model.scored(images, masked), 1))


class Batch(NamedTuple):
    """Images as they are stored, or, once `prepared`, as the model takes them; labels int [B] or None, masked bool
    [B, T] or None. `counts` are of all that it is a part of, where its first image has the number `first`.
    """

    images: Tensor
    labels: Tensor | None
    masked: Tensor | None
    counts: Counts
    first: int = 0

    def part(self, start: int, size: int) -> Batch:
        rows = slice(start, start + size)
        labels, masked = (None if x is None else x[rows] for x in (self.labels, self.masked))
        return Batch(self.images[rows], labels, masked, self.counts, self.first + start)

    def prepared(self, model: Model, device: torch.device) -> Batch:
        labels, masked = (None if x is None else to_device(x, device) for x in (self.labels, self.masked))
        return self._replace(images=model.prepare(to_device(self.images, device)), labels=labels, masked=masked)

    def pinned(self, device: torch.device) -> Batch:
        """Where the device fetches them from without waiting."""
        labels, masked = (None if x is None else pinned(x, device) for x in (self.labels, self.masked))
        return self._replace(images=pinned(self.images, device), labels=labels, masked=masked)


# (model, its output for a batch, that batch, prepared) -> {name: [B]}: numbers of each image, of which sums are taken.
# In training "loss" is minimised, and each number is the image's share of a mean: it is divided by one of `counts`.
Score = Callable[[Model, Output, Batch], dict[str, Tensor]]


def share_of_batch(machine: Machine, images: Images, config: TrainConfig, step: int, model: Model) -> Batch:
    """What this rank takes of the global batch of a step, where the images are held, for the device to fetch.

    Order, augmentation and masks are drawn for all of the batch, as seed and step have it whatever the ranks; images
    are read and changed of the share alone.
    """
    share = machine.share(config.batch_size)
    rows = batch_indices(config.seed, step, config.batch_size, len(images))
    masked = model.draw_masks(config.batch_size, generator(config.seed, step, Stream.TRAINING_MASK))
    counts = Counts.of(model, config.batch_size, masked)
    seen, labels = images.training_batch(rows, config, step, share)
    batch = Batch(seen, labels, None if masked is None else masked[share], counts, share.start)
    return batch.pinned(machine.device)


def accumulate(
    machine: Machine,
    forward: Callable,
    model: Model,
    score: Score,
    batch: Batch,
    micro: int,
    advance: Callable[[float], None] = lambda part: None,
) -> dict[str, Tensor]:
    """Gradients of the mean loss over the global batch, in micro-batches and over all ranks; returns the mean scores,
    which nothing waits for.

    `batch` is what this rank takes of it; `forward` the model, perhaps compiled; `advance` is told which part of the
    batch each micro-batch was.
    """
    totals: dict[str, Tensor] = {}
    for start in range(0, len(batch.images), micro):
        part = batch.part(start, micro).prepared(model, machine.device)
        with machine.autocast():
            output = forward(part.images, part.masked)
            values = {name: each.sum() for name, each in score(model, output, part).items()}
        values["loss"].backward()
        for name, value in values.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        advance(len(part.images) / len(batch.images))
    machine.sum([*totals.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return totals


def gradient_norm(model: Model, clip: float) -> Tensor:
    """Of all weights together, before clipping to `clip` (0: never)."""
    weights = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(weights, clip, norm)
    return norm
