"""Every configuration dataclass with every default and its range; schema.py fills them.

Precedence: dataclass default < --preset < --config < --set < flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pixseq.choices import Augment, Objective, PretrainingAttention, Target
from pixseq.errors import UsageError
from pixseq.presets import preset_names as preset_names
from pixseq.presets import read_preset, read_yaml
from pixseq.schema import Range, Typed, check_ranges, filled, sections

Count = Annotated[int, Range(at_least=1)]
Whole = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, below=2**63)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, below=1)]
# What no model exceeds, so that nothing is laid out for a slip of the pen or a stranger's file.
Layers = Annotated[int, Range(at_least=1, at_most=1024)]
Width = Annotated[int, Range(at_least=1, at_most=1 << 17)]
Depth = Annotated[int, Range(at_least=0, at_most=1024)]
Side = Annotated[int, Range(at_least=1, at_most=1 << 16)]
PatchSide = Annotated[int, Range(at_least=1, at_most=1 << 12)]
Codes = Annotated[int, Range(at_least=1, at_most=1 << 20)]
Rank = Annotated[int, Range(at_least=0, at_most=1 << 14)]
Steps = Annotated[int, Range(at_least=1, below=10**10)]
BatchSize = Annotated[int, Range(at_least=1, at_most=1 << 17)]
# Adam divides by it alone where the squares of gradients underflow float32: by less, steps have any size.
Epsilon = Annotated[float, Range(at_least=1e-18, at_most=1)]
Weight = Annotated[float, Range(at_least=0, at_most=1e6)]
Alpha = Annotated[float, Range(above=0, at_most=1e6)]
AreaShare = Annotated[float, Range(above=0, at_most=1)]
# What no study exceeds.
Sizes = Annotated[int, Range(at_least=2, at_most=99)]
SizeRange = Annotated[float, Range(at_least=1.05, at_most=1e6)]
Ratio = Annotated[float, Range(at_least=1e-9, at_most=1e9)]
Seeds = Annotated[int, Range(at_least=1, at_most=1000)]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of an Image GPT. Vocabulary and context come from the tokens."""

    n_layer: Layers = 8
    n_head: Layers = 4
    d_model: Width = 128
    objective: Objective = "ar"
    family: ClassVar[str] = "igpt"  # the default: it stands in no file
    image_size: ClassVar[int | None] = None  # pictures have the size that they are stored in
    instead: ClassVar[Mapping[str, str]] = {  # of keys that another family has
        "attention": "an Image GPT has one attention pattern: causal where its objective is ar, bidirectional of bert"
    }


@dataclass(frozen=True)
class AimConfig:
    """Shape of an AIM, told by `family: aim`."""

    family: Literal["aim"] = "aim"
    image_size: Side | None = None  # side of its pictures, cut from those stored; null: as large as they are stored
    n_layer: Layers = 12
    n_head: Layers = 3
    d_model: Width = 192
    patch_size: PatchSide = 4
    head_depth: Depth = 4
    head_width: Width = 192
    target: Target = "norm-pixels"
    n_codes: Codes = 512  # of the k-means of patches that target codes predicts
    attention: PretrainingAttention = "prefix"
    instead: ClassVar[Mapping[str, str]] = {  # of keys that another family has
        "objective": "an AIM has one objective, to predict the next patch: model.target says what of it"
    }


@dataclass(frozen=True)
class SequenceConfig:
    """The order of the pixels or patches: raster, column, reversed, spiral-out, checkerboard, random, or a .npy file
    of a permutation of the picture's cells.
    """

    order: str = "raster"


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of a pretraining run (paper §3.3-3.4 and appendix A.1 where it speaks)."""

    steps: Steps = 10_000
    batch_size: BatchSize = 128  # images a step over all micro-batches and ranks
    lr: Positive = 3.0e-3
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero
    warmup_epochs: NotNegative | None = 1.0  # the paper's one epoch (null: no such bound) ...
    warmup_fraction: Share = 0.1  # ... but at most this part of the run, so that short runs are not all warm-up
    optimizer: Literal["adam", "muon"] = "adam"  # muon: on the blocks' matrices, adam on the rest; not the paper's
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Epsilon = 1.0e-8
    weight_decay: Weight = 0.0  # decoupled
    decay: Literal["all", "matrices"] = "all"  # matrices: neither biases nor norms
    clip_norm: NotNegative = 0.0  # 0: off
    augment: Augment = "none"
    crop_scale: AreaShare = 0.4  # resized-crop: the least part of the picture's area, as AIM has it
    ema: Share = 0.0  # decay of the averaged weights; 0: off
    seed: Seed = 0
    val_every: Whole = 0  # steps; 0: twenty times over the run
    val_images: Count = 2_000  # at most this many are scored each time
    log_every: Count = 10


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The joint loss of §2.3: L_clf + gen_weight * L_gen, constant rate after warm-up, early stop on validation."""

    steps: Steps = 2_000
    lr: Positive = 3.0e-4  # "often ten times smaller than in pretraining"
    schedule: Literal["cosine", "constant"] = "constant"
    gen_weight: Weight = 1.0  # of models that can predict with the attention in use; others have no such loss
    lora_rank: Rank = 0  # 0: all weights are trained; else low-rank updates of the blocks' matrices, and the class head
    lora_alpha: Alpha = 8.0  # updates count alpha / rank: 1 at AIM's rank of 8, and other ranks suit the same rates
    lora_targets: str = "q,k,v,o"  # what has an update in a block: of q, k, v, o (attention), fc and proj (MLP)
    patience: Whole = 5  # validations without a better accuracy before the stop; 0: run all steps
    refit: bool = False  # begin again on train and validation together, for as many steps as validation chose (§3.1)


@dataclass(frozen=True)
class PretrainFile:
    """What --preset, --config and config.yaml hold for `pretrain`."""

    model: ModelConfig | AimConfig = field(default_factory=ModelConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class FinetuneFile:
    """What --config and config.yaml hold for `finetune`; the model is the checkpoint's."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class StudyData:
    """Stores of one resolution: what cells train on, what is held out, and, if given, what is probed instead."""

    train: str
    val: str
    probe_train: str | None = None  # null: train
    probe_test: str | None = None  # null: val


@dataclass(frozen=True)
class StudyShapes:
    """The family of shapes: widths on a ladder, depth by an aspect ratio, heads of 32 numbers or a little more.

    The head of an AIM is as wide as its trunk, `head_depth` blocks deep.
    """

    family: Literal["igpt", "aim"] = "igpt"
    aspect_ratio: Ratio = 24.0  # d_model / n_layer; Image GPT's S, M and L have 21, 28 and 32
    min_layers: Layers = 2
    patch_size: PatchSide = 4
    head_depth: Depth = 4


@dataclass(frozen=True)
class StudyRates:
    """lr of a width: train.lr * (d_model / width) ** -exponent.

    With `sweep`, the smallest budget is trained with these multiples of it first, and train.lr and the exponent are
    fitted to what was best (see studies/rates.py). `rates: sweep` takes the usual multiples.
    """

    width: Annotated[int, Range(at_least=1, at_most=10**6)] = 64
    exponent: Annotated[float, Range(at_least=-10, at_most=10)] = 0.5
    sweep: tuple[Positive, ...] | None = None
    words: ClassVar[Mapping[str, Any]] = {"sweep": {"sweep": [0.25, 0.5, 1.0, 2.0, 4.0]}}  # that a section may be


@dataclass(frozen=True)
class StudyBatch:
    """Images a step: the power of two that gives about `steps` steps, between `smallest` and `largest`."""

    steps: Annotated[int, Range(at_least=1, at_most=10**9)] = 400
    smallest: Count = 8
    largest: BatchSize = 256


@dataclass(frozen=True)
class StudyCompletions:
    """Top halves of `count` held-out images, completed; 0: none. Image GPT alone draws.

    Their Fréchet distance from the real pictures is in features of `extractor`: "reference", a model that the study
    trains once for each resolution; a checkpoint or a .pt2 of torch.export, the same for every cell; or "pixels", the
    colours themselves, which cannot tell a picture from Gaussian noise of their covariance (studies/judge.py).
    """

    count: Annotated[int, Range(at_least=0, at_most=10**9)] | None = None  # null: 500, or as many as there are
    keep: Share = 0.5
    temperature: Annotated[float, Range(at_least=0, at_most=1e9)] = 1.0
    seed: Seed = 0
    extractor: str = "reference"
    layer: int | None = None  # of the extractor; null: the last of the reference, the middle of a checkpoint
    reference_budget: Positive | None = None  # FLOPs that the reference model is trained with; null: the largest budget
    images: Literal["spread", "first"] = "spread"  # which: a random choice, each class with its share, or the first


@dataclass(frozen=True)
class StudyProbe:
    """The linear probe of each cell: C is chosen on a part of its training images."""

    layers: str = "all"
    c: str = "0.001,0.01,0.1,1"


@dataclass(frozen=True)
class GridFile:
    """The grid of a scaling study: budgets and sizes, and how cells are trained and measured."""

    data: tuple[StudyData, ...]
    budgets: tuple[Positive, ...]  # training FLOPs; two of them are the ends, with a spacing of 10^0.5 between
    sizes_per_budget: Sizes = 5
    size_range: SizeRange = 4.0  # sizes lie between the estimated optimum over and times this
    tokens_per_param: Ratio = 40.0  # the first estimate of the optimum; finished budgets make better ones
    recentre: bool = True  # from the budgets below, once they are done
    flops: Literal["exact", "exact-causal", "6nd"] = "exact"
    params: Literal["total", "non-embedding"] = "total"  # what N counts; never a prediction head of AIM
    seeds: Seeds = 1  # runs of each cell, of train.seed, train.seed + 1 ...
    most_epochs: Ratio = 4.0  # beyond it a cell is marked: its data repeats
    shapes: StudyShapes = field(default_factory=StudyShapes)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=6.0e-3, warmup_epochs=None))
    rates: StudyRates = field(default_factory=StudyRates)
    batch: StudyBatch = field(default_factory=StudyBatch)
    completions: StudyCompletions = field(default_factory=StudyCompletions)
    probe: StudyProbe = field(default_factory=StudyProbe)


SECTIONS = {"about", "model", "sequence", "train", "finetune"}


def effective(
    kind: type,
    preset: str | None = None,
    file: str | Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Any:
    """The effective configuration of dataclass `kind`, and where every value came from decides by precedence.

    `sets` are texts "train.lr=0.001"; `flags` maps dotted keys to values, None meaning not given; `base` has sections
    that count less than all of them.
    Raises UsageError for unknown keys (with a guess), wrong types and values that cannot work.
    """
    values: dict[str, Any] = {}
    _merge(values, base or {})
    if preset is not None:
        _merge(values, read_preset(preset))
    if file is not None:
        _merge(values, read_yaml(file))
    for section in SECTIONS - {f.name for f in dataclasses.fields(kind)} if kind is not GridFile else ():
        values.pop(section, None)  # one file may serve several stages; a grid serves one
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text} is not of the form key=value", "for example --set model.n_layer=12")
        _put(values, key.strip(), Typed(value.strip()))
    for key, value in (flags or {}).items():
        if value is not None:
            _put(values, key, value)
    config = filled(kind, values)
    check(config)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def check(config: Any) -> None:
    """Raises UsageError for a value outside the range that stands beside its field, and for values that do not go
    together.
    """
    for place, section in sections(config):
        check_ranges(section, place)
        if isinstance(section, ModelConfig | AimConfig):
            _check_shape(section)
        if isinstance(section, TrainConfig) and section.lr * section.weight_decay > 1:
            decay = f"{place}weight_decay {section.weight_decay:g} at lr {section.lr:g}"
            raise UsageError(
                f"{decay} takes more away than the weights are",
                f"it must be at most {1 / section.lr:g} there; 0.05 and 0.1 are usual",
            )


def _check_shape(model: ModelConfig | AimConfig) -> None:
    if model.d_model % model.n_head:
        raise UsageError(
            f"model.d_model {model.d_model} cannot be split over model.n_head {model.n_head} heads",
            "choose a width that is a multiple of the number of heads",
        )
    for key in ("d_model", "head_width") if isinstance(model, AimConfig) else ():
        if getattr(model, key) % 4:
            raise UsageError(
                f"model.{key} is {getattr(model, key)}, it must be a multiple of 4",
                "its positions are sines and cosines of rows and of columns",
            )


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"{dotted}: {section} is not a section", "keys look like train.lr")
    values[last] = value


def restored(kind: type, values: Mapping[str, Any]) -> Any:
    """The dataclass that `as_dict` has turned into a mapping."""
    return filled(kind, values)
