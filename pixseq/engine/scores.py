"""The pretraining loss over a store, as metrics tell it: of a pass of its own, or of one that makes features too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.artifacts.arrays import Store
from pixseq.engine.cost import WITHOUT_GRADIENTS, micro_batch_images
from pixseq.engine.parts import count_images
from pixseq.errors import PixseqError
from pixseq.models.family import Model, Shape
from pixseq.models.output import Output
from pixseq.runtime import Machine
from pixseq.text import word


def images_at_once(net: Model, where: Machine) -> int:
    """Images of an evaluation whose losses are added up together."""
    return WITHOUT_GRADIENTS * micro_batch_images(net, where)


def config_of(weights: str, masks: int, seed: int, attention: str | None, where: Machine) -> dict[str, Any]:
    return {"weights": weights, "masks": masks, "seed": seed, "attention": attention, **where.used()}


def facts_of(net: Model, store: Store) -> dict[str, Any]:
    """What was measured: of what, and on how many images."""
    return {**count_images(store), "objective": net.shape.objective}


def no_numbers(what: str, model: str | Path) -> PixseqError:
    return PixseqError(
        f"{what}, no number",
        f"the model diverged or is damaged: pixseq check {word(model)} tells; or measure with --precision fp32",
    )


def loss_in_feature_pass(shape: Shape) -> bool:
    """Whether the forward pass that its features are usually made of gives its loss too: of the same attention, with
    nothing hidden.
    """
    learnt = shape.pretraining_attention
    used = shape.attention_patterns[0] == learnt and not shape.needs_mask(learnt) and not shape.n_classes
    return used and shape.predicts(learnt)


class LossMeter:
    """The loss that a pass for features measures beside them; its numbers are `evaluate`'s to the last bit."""

    def __init__(self, net: Model, where: Machine):
        self.net, self.where, self.scored = net, where, 0
        self.losses: list[Tensor] = []

    def add(self, output: Output, x: Tensor) -> None:
        self.losses.append(self.net.losses(output, x, None))
        self.scored += self.net.scored(len(x), None)

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self.losses))

    def numbers(self, model: str | Path, store: Store, channels: int) -> dict[str, Any]:
        """The loss in its units, of images of so many channels. Raises PixseqError where the model gave no numbers."""
        parts = torch.cat(self.losses).split(images_at_once(self.net, self.where))
        total = sum(float(part.double().sum()) for part in parts)
        if not math.isfinite(total):
            raise no_numbers(f"the loss of {model} on {store.path} is {total}", model)
        loss = self.net.shape.report(total / self.scored, channels)
        return {**facts_of(self.net, store), **loss, **self.where.used()}
