"""The model families, and what each offers so that no stage asks which one it has before it.

A stage talks to a model through `Model` and `Shape`. A new family is a module with such a shape and such a model, a
configuration in config.py, and a line in each table here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, Self, get_args

import torch
from torch import Tensor, nn

from pixseq.choices import Objective, PretrainingAttention, Target
from pixseq.errors import PixseqError
from pixseq.models import aim_checks, igpt_checks
from pixseq.models.aim import AIM, ATTENTIONS, AimShape
from pixseq.models.certificates import Check
from pixseq.models.flops import COUNTING
from pixseq.models.igpt import IgptShape, ImageGPT
from pixseq.models.output import Output


class Shape(Protocol):
    """A frozen dataclass of what fixes every tensor of a model; its fields stand in the manifests of checkpoints.

    Positions are along the sequence: tokens, or patches.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def family(self) -> str:
        """Its name in the tables below."""

    @property
    def reads(self) -> str:
        """The kind of artifact it is trained on: tokens or pixels."""

    @property
    def hidden_states(self) -> str:
        """Which of a layer its features are, in words."""

    @property
    def objective(self) -> str:
        """What it is trained to predict, in a word."""

    @property
    def order(self) -> str:
        """Of the sequence: a name, or "file"."""

    @property
    def n_layer(self) -> int:
        """Blocks."""

    @property
    def n_head(self) -> int:
        """Attention heads of a block."""

    @property
    def d_model(self) -> int:
        """The width D."""

    @property
    def n_ctx(self) -> int:
        """Positions."""

    @property
    def n_classes(self) -> int:
        """Of a class head; 0: none."""

    @property
    def head(self) -> bool:
        """Whether it has a prediction head."""

    @property
    def can_sample(self) -> bool:
        """Whether it can be sampled, pixel by pixel."""

    @property
    def masks(self) -> int:
        """Random masks an image is seen under where features and votes are made of it; 1 where none is needed."""

    @property
    def pretraining_attention(self) -> str:
        """The attention pattern of pretraining: causal, prefix or bidirectional."""

    @property
    def attention_patterns(self) -> tuple[str, ...]:
        """The attention patterns it can be used with, its default first."""

    @classmethod
    def of(cls, config: Mapping[str, Any], grid: tuple[int, int, int], n_vocab: int | None, order: str) -> Shape:
        """The shape of a configuration on images of `grid` (rows, columns, channels); `n_vocab` is None of pixels."""

    def config(self) -> dict[str, Any]:
        """The configuration that `of` makes this shape from."""

    def predicts(self, attention: str) -> bool:
        """Whether there is a pretraining loss with this attention."""

    def needs_mask(self, attention: str) -> bool:
        """Whether forward needs a mask, of random positions or of a random prefix, with this attention."""

    def adapted_to(self, attention: str) -> Shape:
        """The same model with another default attention."""

    def for_pretraining(self) -> Shape:
        """The same model without a class head, and with a prediction head. Raises UsageError where that cannot be."""

    def sequence_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Rows, columns and positions a cell of what an order permutes, on images of `grid`."""

    def positions(self) -> Tensor | None:
        """Fixed positions [n_ctx, d_model]; None where they are learned."""

    def report(self, loss: float, channels: int) -> dict[str, float]:
        """A mean loss by the names of its units. `channels`: numbers a pixel."""

    def parameter_count(self) -> int:
        """All parameters."""

    def trunk_count(self) -> int:
        """Those that scaling laws count."""

    def block_count(self) -> int:
        """The weights of the blocks' matrices."""

    def flops_per_token(self, counting: str = COUNTING) -> int:
        """Training floating point operations a position, see flops.py."""

    def activation_bytes(self, width: int) -> int:
        """What training on one image holds, in numbers of `width` bytes: a rough count."""


class Model(Protocol):
    """A torch module over sequences, see order.Ordered.

    Images are int [B, T] tokens or uint8 [B, H, W, 3] pixels, masked bool [B, n_ctx]. A batch's loss is the sum of
    `losses` over its images divided by `scored`, so that shares of a batch add up.
    """

    attention: str  # the pattern in use

    @property
    def shape(self) -> Shape:
        """What fixes its tensors."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """See order.Ordered."""

    @property
    def order(self) -> Tensor | None:
        """int [n_ctx]: which cell stands at each position; None: raster order."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks, whose matrices go by the names in lora.py."""

    def init_weights(self, generator: torch.Generator) -> Model:
        """Set every parameter as training begins; returns itself."""

    def set_order(self, order: Tensor) -> None:
        """Run along another sequence."""

    def freeze(self, dtype: torch.dtype) -> None:
        """Be ready for many forward passes computed in `dtype`, and for nothing else."""

    def fit_codes(self, read: Callable, count: int, seed: int) -> None:
        """What it takes from its `count` training images, which `read` gives by number, before it learns."""

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise as it would be stored."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images as they are stored -> what forward takes."""

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor | None:
        """A random mask of each of `count` images, for the attention in use; None where it needs none."""

    def __call__(
        self,
        x: Tensor,
        masked: Tensor | None = None,
        /,
        *,
        logits: bool = True,
        pooled: bool = False,
        unpooled: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> Output:
        """What was asked for: predictions, and features of every layer, as means over positions or whole.

        Means are of the positions from `first` on, in raster order. Layers end with `last`: below the last block
        nothing is predicted.
        """

    def losses(self, output: Output, x: Tensor, masked: Tensor | None, /) -> Tensor:
        """Each image's part of the loss, [B]."""

    def scored(self, count: int, masked: Tensor | None) -> int:
        """What the sum of `losses` over `count` images is divided by; 0 where their masks leave nothing to predict."""

    def predictions(self, output: Output, x: Tensor, masked: Tensor | None, /) -> Tensor:
        """Images as the model predicts them, each place from the true ones that it sees."""

    def position_losses(self, output: Output, x: Tensor, masked: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """The loss at each position and whether it is scored, both [B, n_ctx] along the sequence."""

    # what every torch module has

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def to(self, device: torch.device, /) -> Self: ...


SHAPES: dict[str, type[IgptShape] | type[AimShape]] = {"igpt": IgptShape, "aim": AimShape}
MODELS: dict[str, Callable[[Any], Model]] = {"igpt": ImageGPT, "aim": AIM}
CERTIFICATES: dict[str, Callable[[Any, Tensor, torch.Generator, float], Iterator[Check]]] = {
    "igpt": igpt_checks.certify,
    "aim": aim_checks.certify,
}


def shape_from(record: Mapping[str, Any]) -> Shape:
    """The shape that a checkpoint's manifest states. Raises PixseqError for one that this version does not know."""
    family = record.get("family", IgptShape.family)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    try:
        shape: Shape = SHAPES[family](**fields)
        _check_fields(shape)
        return shape
    except (KeyError, TypeError, ValueError) as error:
        raise PixseqError(
            f"the checkpoint's shape is of no model known here: {error}", "it may be of a newer pixseq: upgrade"
        ) from None


# The values that fields of names may have.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "igpt": {"objective": get_args(Objective)},
    "aim": {"target": get_args(Target), "attention": get_args(PretrainingAttention), "adapted": ATTENTIONS},
}
# The most of each size of a shape: beyond what any model has, and little enough to lay out.
MOST = {
    "n_layer": 1024, "n_head": 1024, "d_model": 1 << 17, "n_vocab": 1 << 24, "n_ctx": 1 << 20, "n_classes": 1 << 24,
    "patch_size": 1 << 12, "height": 1 << 16, "width": 1 << 16, "head_depth": 1024, "head_width": 1 << 17,
    "n_codes": 1 << 24, "probe_heads": 1024,
}  # fmt: skip
MAY_BE_ZERO = ("n_classes", "head_depth", "n_codes", "probe_heads")
MOST_POSITIONS = 1 << 28  # numbers: positions that are fixed stand in no file of weights


def _check_fields(shape: Shape) -> None:
    """Raises ValueError for a field of another type, and for sizes that no model has."""
    defaults = {field.name: field.type for field in dataclasses.fields(shape)}
    for name, kind in defaults.items():
        value = getattr(shape, name)
        if name in MOST:
            least = 0 if name in MAY_BE_ZERO else 1
            fine = type(value) is int and least <= value <= MOST[name]
        elif kind == "bool":
            fine = isinstance(value, bool)
        elif kind == "str":
            fine = isinstance(value, str)
        else:  # layers of a probe
            fine = isinstance(value, tuple) and len(value) <= 1024 and all(type(n) is int and n >= 0 for n in value)
        if not fine:
            raise ValueError(f"its {name} is {value!r}")
    if shape.d_model % shape.n_head:
        raise ValueError(f"its d_model {shape.d_model} cannot be split over {shape.n_head} heads")
    if not 1 <= shape.n_ctx <= MOST["n_ctx"] or shape.n_ctx * shape.d_model > MOST_POSITIONS:
        raise ValueError(f"it has {shape.n_ctx:,} positions of {shape.d_model:,} numbers")
    for name, choices in CHOICES[shape.family].items():
        if getattr(shape, name) not in choices:
            raise ValueError(f"its {name} is {getattr(shape, name)!r}, not one of {', '.join(choices)}")


def build(shape: Shape) -> Model:
    """A model of `shape`, its weights not set."""
    return MODELS[shape.family](shape)


def certify(model: Model, x: Tensor, generator: torch.Generator, close: float) -> Iterator[Check]:
    """The certificates of the model's family on images x as the model takes them; `close` as in certificates.py."""
    return CERTIFICATES[model.shape.family](model, x, generator, close)
