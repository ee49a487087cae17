"""The masks that a BERT model sees an image under (§2.1): how many, and drawn from a stream of the image's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pixseq.errors import UsageError
from pixseq.models.family import Model, Shape
from pixseq.runtime import Machine


def mask_count(shape: Shape, masks: int | None) -> int:
    """As many as usual for the shape unless told otherwise. Raises UsageError where that cannot be."""
    if masks is not None and masks < 1:
        raise UsageError(f"--masks is {masks}, it must be at least 1")
    if masks not in (None, 1) and shape.masks == 1:
        raise UsageError(f"--masks is {masks}, and this model sees an image once", "only bert models see masked inputs")
    return shape.masks if masks is None else masks


def masks_of(net: Model, masks: int, streams: Iterable[torch.Generator], where: Machine) -> Tensor | None:
    """`masks` masks of each image, drawn from a stream of its own, so that no batch matters; None: no masks.

    A stream is made where it is drawn from: where there are no masks, making one an image would cost the most.
    """
    if not net.shape.needs_mask(net.attention):
        return None
    drawn = (net.draw_masks(masks, stream) for stream in streams)
    return torch.cat([masked for masked in drawn if masked is not None]).to(where.device)
