"""What is timed, and with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pixseq.artifacts.codec import Codec
from pixseq.choices import Precision
from pixseq.config import PretrainFile, as_dict, effective
from pixseq.models.family import SHAPES, Shape
from pixseq.numerics.orders import NAMED
from pixseq.runtime import Machine

MODEL = {"n_layer": 8, "d_model": 256, "n_head": 8}  # where no preset is named
US = "pixseq"


@dataclass(frozen=True)
class Settings:
    """The sizes of the work, and the machine's settings. All data is drawn by `seed`."""

    preset: str | None = None
    sets: tuple[str, ...] = ()  # as of `pretrain --set`
    size: int = 16  # pixels of a side
    colors: int = 512
    classes: int = 10
    count: int = 4096  # images of palette, encode, read and probe
    batch_size: int = 8  # images of pretrain, features and sample
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    threads: int | None = None  # None: as many as there are cores
    nanogpt: str | None = None  # a checkout

    def config(self) -> PretrainFile:
        """The model and its recipe. Raises UsageError for what cannot work."""
        flags = {"train.batch_size": self.batch_size, "train.seed": self.seed}
        return effective(PretrainFile, self.preset, None, self.sets, flags, {"model": MODEL})

    def codec(self) -> Codec:
        """Of the images that the model sees."""
        kind = SHAPES[self.config().model.family].reads
        scheme, colors = ("palette", self.colors) if kind == "tokens" else ("pixels", None)
        return Codec(scheme, self.size, self.size, colors)

    def shape(self) -> Shape:
        """Of the model. Raises UsageError where it does not go with the images."""
        config, codec = self.config(), self.codec()
        order = config.sequence.order if config.sequence.order in NAMED else "file"
        return SHAPES[config.model.family].of(as_dict(config.model), codec.grid, codec.n_vocab, order)


@dataclass(frozen=True)
class Bench:
    """Settings on this machine. `precisions` are those that models are timed in; `scratch` is a folder for files."""

    settings: Settings
    where: Machine
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    scratch: Path


@dataclass(frozen=True)
class Work:
    """One way to do a task, by a peer or by us. `prepare` loads and draws what is needed, and returns what is timed:
    a call that returns what is worth saying of its result, or nothing.
    """

    by: str
    precision: str | None  # None: it has no choice
    prepare: Callable[[], Callable[[], str | None]]


@dataclass(frozen=True)
class Product:
    """A ceiling: matrix products [rows, inner] x [inner, outer], of `copies` of the right matrix in turn, as layers."""

    rows: int
    inner: int
    outer: int
    copies: int = 1

    def __str__(self) -> str:
        return f"product {self.rows}x{self.inner} by {self.inner}x{self.outer}"


@dataclass(frozen=True)
class Copy:
    """A ceiling: copying memory, read and written."""

    def __str__(self) -> str:
        return "memory copy"


@dataclass(frozen=True)
class Task:
    """What a stage does in one call: `amount` of a `unit`, for which at least `demand` operations (of a Product) or
    bytes (of a Copy) are needed.
    """

    about: str
    amount: int
    unit: str
    ceiling: Product | Copy
    demand: float
    works: tuple[Work, ...]
