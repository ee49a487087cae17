"""What is measured of a model while it trains: sums over held-out images, whatever the batches and ranks."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from pixseq.engine.images import Images
from pixseq.engine.step import Batch, Counts, Score
from pixseq.models.family import Model
from pixseq.runtime import Machine, generator
from pixseq.streams import Stream


class Validation(Protocol):
    """What a run measures of its weights on the way, and by which of it they are the best so far."""

    def measure(self, model: Model) -> dict[str, float]:
        """A row for the log."""

    def quality(self, row: dict[str, float]) -> float:
        """Of the weights that gave the row: the higher the better."""


@torch.no_grad()
def score_sums(
    machine: Machine,
    model: Model,
    images: Images,
    batch_size: int,
    seed: int,
    score: Score,
    names: tuple[str, ...],
    masks: int = 1,
) -> tuple[list[float], Counts]:
    """What `score` gives by these names, added up in float64 over `images`, each rank doing its share.

    With masks or prefixes, `masks` random ones an image: its rows follow each other in a batch, [B * masks], and in
    what the counts count, while `first` counts images.
    """
    model.eval()
    drawn = model.draw_masks(len(images) * masks, generator(seed, Stream.VALIDATION_MASK))
    share, counts = machine.share(len(images)), Counts.of(model, len(images) * masks, drawn)
    totals = torch.zeros(len(names), dtype=torch.float64, device=machine.device)
    size = max(batch_size // masks, 1)
    for start in range(share.start, share.stop, size):
        rows = np.arange(start, min(start + size, share.stop)).repeat(masks)
        masked = None if drawn is None else drawn[start * masks : start * masks + len(rows)]
        batch = Batch(*images.batch(rows), masked, counts, start).prepared(model, machine.device)
        with machine.autocast():
            values = score(model, model(batch.images, batch.masked), batch)
            for i, name in enumerate(names):
                totals[i] += values[name].double().sum()
    machine.sum([totals])
    model.train()
    return totals.tolist(), counts
