"""The model families, and what each offers so that no stage asks which one it has before it.

A stage talks to a model through `Model` and its shape, whose members that both families have are the rest of the
contract. A new family is a module with such a shape and such a model, a configuration in config.py, and a line in each
table here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pixseq.errors import PixseqError
from pixseq.models import aim_checks, igpt_checks
from pixseq.models.aim import AIM, AimShape
from pixseq.models.certificates import Check
from pixseq.models.igpt import ImageGPT
from pixseq.models.igpt import Shape as IgptShape
from pixseq.models.output import Output

Shape = IgptShape | AimShape
SHAPES = {"igpt": IgptShape, "aim": AimShape}
MODELS = {"igpt": ImageGPT, "aim": AIM}
CERTIFICATES = {"igpt": igpt_checks.certify, "aim": aim_checks.certify}


class Model(Protocol):
    """A torch module over sequences, see order.Ordered.

    A batch's loss is the sum of `losses` over its images divided by `scored`, so that shares of a batch add up.
    """

    shape: Shape
    attention: str  # the pattern in use

    def init_weights(self, generator: torch.Generator) -> Model: ...

    def learn_codes(self, read: Callable, count: int, seed: int) -> None: ...

    def random_images(self, count: int, generator: torch.Generator) -> Tensor: ...

    def prepare(self, images: Tensor) -> Tensor: ...

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor | None: ...

    def forward(self, x: Tensor, masked: Tensor | None, logits: bool, pooled: bool, unpooled: bool) -> Output: ...

    def losses(self, output: Output, x: Tensor, masked: Tensor | None) -> Tensor: ...

    def scored(self, count: int, masked: Tensor | None) -> int: ...

    def predictions(self, output: Output, x: Tensor, masked: Tensor | None) -> Tensor: ...

    def position_losses(self, output: Output, x: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]: ...


def shape_from(record: Mapping[str, Any]) -> Shape:
    """The shape that a checkpoint's manifest states. Raises PixseqError for one that this version does not know."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    try:
        return SHAPES[record.get("family", "igpt")](**fields)
    except (KeyError, TypeError) as error:
        raise PixseqError(
            f"the checkpoint's shape is of no model known here: {error}", "it may be of a newer pixseq: upgrade"
        ) from None


def build(shape: Shape) -> Model:
    """A model of `shape`, its weights not set."""
    return MODELS[shape.family](shape)


def certify(model: Model, x: Tensor, generator: torch.Generator) -> Iterator[Check]:
    """The certificates of the model's family on images x as the model takes them."""
    return CERTIFICATES[model.shape.family](model, x, generator)
