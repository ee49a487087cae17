"""What is measured of a model while it trains: sums over held-out images, whatever the batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pixseq.engine.images import Images
from pixseq.engine.training import Counts
from pixseq.models.family import Model
from pixseq.models.output import Output
from pixseq.runtime import Machine, generator
from pixseq.streams import Stream

# (model, output, images, labels, masked, counts) -> at most two numbers that add up over images
Measure = Callable[[Model, Output, Tensor, Tensor | None, Tensor | None, Counts], list[Tensor | float]]


@torch.no_grad()
def validation_sums(
    machine: Machine, model: Model, images: Images, batch_size: int, seed: int, measure: Measure, masks: int = 1
) -> tuple[list[float], Counts]:
    """`measure` summed over `images`, each rank doing its share; with masks or prefixes, `masks` random ones an image.

    An image's are consecutive rows of what is measured, [B * masks], and of what the counts count.
    """
    model.eval()
    drawn = model.draw_masks(len(images) * masks, generator(seed, Stream.VALIDATION_MASK))
    share, counts = machine.share(len(images)), Counts.of(model, len(images) * masks, drawn)
    totals = torch.zeros(2, dtype=torch.float64, device=machine.device)
    batch = max(batch_size // masks, 1)
    for start in range(share.start, share.stop, batch):
        rows = np.arange(start, min(start + batch, share.stop)).repeat(masks)
        m = None if drawn is None else drawn[start * masks : start * masks + len(rows)]
        x, y, m = (None if a is None else a.to(machine.device) for a in (*images.batch(rows), m))
        x = model.prepare(x)
        with machine.autocast():
            sums = measure(model, model(x, m), x, y, m, counts)
        for i, value in enumerate(sums):
            totals[i] += value
    machine.sum([totals])
    model.train()
    return totals.tolist(), counts
