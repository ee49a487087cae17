"""pretrain: images in, a trained model out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import best_weights, finish_checkpoint, read_weights
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.targets import check_apart
from pixseq.bounded.numpy_files import load_small
from pixseq.choices import Precision
from pixseq.config import PretrainFile, TrainConfig, as_dict, effective, preset_names
from pixseq.engine.cost import WITHOUT_GRADIENTS, expected_seconds, micro_batch_images
from pixseq.engine.image_store import open_images, seen_codec
from pixseq.engine.images import Images
from pixseq.engine.initial import InitialCheckpoint
from pixseq.engine.intermediate import IntermediateCheckpoints, kept_steps, step_folder
from pixseq.engine.opening import check_fraction, check_memory, held_out, read_images, some_of, split_rows
from pixseq.engine.run_folder import recipe_of, run_folder, run_summary
from pixseq.engine.state import TrainState, averaged_weights
from pixseq.engine.step import Batch
from pixseq.engine.training import Limits, Training, train
from pixseq.engine.validation import score_sums
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import SHAPES, Model, Shape, build
from pixseq.models.flops import COUNTING
from pixseq.models.output import Output
from pixseq.numerics.orders import NAMED, RASTER, is_permutation, order_of, with_channels
from pixseq.runtime import Machine, generator, machine, placed
from pixseq.streams import Stream

ABSURD_DAYS = 7
CPU_PRESETS = ("igpt-cifar16", "igpt-digits", "aim-cifar32", "aim-64")
TRAINED_BYTES = 12  # a weight at least: itself, its gradient and its momentum
MOST_ORDER_BYTES = 1 << 26  # of a file of a permutation


def run(
    tokens: str | Path,
    out: str | Path,
    config: PretrainFile,
    val: str | Path | None = None,
    val_fraction: float | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    limits: Limits | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep: str | None = None,
    init_from: str | Path | None = None,
) -> Manifest | None:
    """Train on `tokens` (or pixels), validate on `val` or on a held-out part, write a checkpoint; returns its manifest.

    `keep`: "1000,2000" or "every:500", steps after which a checkpoint is kept beside `out`, as OUT-step1000.
    `init_from`: a checkpoint whose weights training starts from, of the shape that `config` has, see config_from. Ranks
    other than the first return None. Raises Diverged, Interrupted, PixseqError.
    """
    limits, kept = limits or Limits(), kept_steps(keep, config.train.steps)
    made = [out, *(step_folder(out, step) for step in kept if os.path.lexists(step_folder(out, step)))]
    order = None if config.sequence.order in NAMED else config.sequence.order
    check_apart(made, [tokens, val, init_from, order])
    with machine(device, precision, ranks=True) as where:
        data = read_data(tokens, config, val, val_fraction, init_from, scratch=Path(out).absolute().parent)
        remark(data, config)
        flags = {"val_fraction": val_fraction, "precision": where.precision, **data.split(val_fraction)}
        recipe = recipe_of(as_dict(config), data.inputs, flags)
        writer = Writer(where, config, data, flags)
        with run_folder(where, out, "pretrain", recipe, resume, overwrite) as folder:
            if folder.made is None:
                check_memory(data.shape, where, TRAINED_BYTES)
                model = placed(first_model(data, config), where)
                begun = TrainState(model, config.train, folder.state)
                keeper = IntermediateCheckpoints(
                    writer.write, where.leads, Path(out), recipe, overwrite, resume, kept, begun
                )
                end = train(
                    Training(
                        where,
                        begun,
                        data.images,
                        losses,
                        folder.path,
                        limits,
                        validation=HeldOut.of(where, data.held, model, config.train, limits),
                        after_step=keeper.after_step,
                    )
                )
                if where.leads:
                    folder.made = writer.write(folder.path, end, with_best=True)
        return folder.made if where.leads else None


@dataclass(frozen=True)
class Data:
    """What is trained and validated on (`held`, None: nothing), as a model of `shape` and `codec` sees it; `initial` is
    the one to start from, None: a fresh one.
    """

    initial: InitialCheckpoint | None
    store: Store
    images: Images
    held: Images | None
    shape: Shape
    codec: Codec
    inputs: dict[str, Any]

    def split(self, val_fraction: float | None) -> dict[str, Any]:
        """How it was split, for the recipe."""
        return held_out(self.images, self.held, val_fraction)


def read_data(
    tokens: str | Path,
    config: PretrainFile,
    val: str | Path | None,
    val_fraction: float | None,
    init_from: str | Path | None,
    scratch: Path,
) -> Data:
    """`scratch`: a folder for what is too large for memory, see image_store.read_all."""
    initial = None if init_from is None else open_initial(init_from, config)
    kind = SHAPES[config.model.family].reads
    side = config.model.image_size if initial is None else initial.codec.side
    store, images, held, inputs = read_images(
        tokens, kind, val, val_fraction, config.train.seed, side=side, scratch=scratch
    )
    if initial is None:
        return Data(None, store, images, held, model_shape(config, store), seen_codec(store, side), inputs)
    codec = initial.paired(store)
    inputs["model"] = initial.reference
    return Data(initial, store, images, held, initial.shape, codec, inputs)


def config_from(
    init_from: str | Path,
    preset: str | None = None,
    file: str | Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> PretrainFile:
    """The effective configuration, see config.effective, of a run that starts from a checkpoint: shape and order are
    its own where nothing is said. Raises UsageError where something else is said.
    """
    initial = InitialCheckpoint.open(init_from)
    sets = list(sets)
    initial.check_family(preset, file, sets)
    config = effective(PretrainFile, preset, file, sets, flags, base=initial.config())
    initial.check(config)
    return config


def open_initial(init_from: str | Path, config: PretrainFile) -> InitialCheckpoint:
    """Raises UsageError where `config` is of another shape or order."""
    initial = InitialCheckpoint.open(init_from)
    initial.check(config)
    if initial.shape.order == "file" and config.sequence.order != initial.order:
        cells = initial.shape.sequence_grid(initial.codec.grid)
        initial.check_order(_order(config.sequence.order, *cells, config.train.seed), config.sequence.order)
    return initial


def first_model(data: Data, config: PretrainFile) -> Model:
    """Fresh, or of the checkpoint it starts from."""
    if data.initial is None:
        return fresh_model(data.shape, config, data.codec.grid, data.images)
    return data.initial.model(config.train.seed)


def remark(data: Data, config: PretrainFile) -> None:
    """Say what may not be as it was meant."""
    side, codec, path = config.model.image_size, data.codec, data.store.path
    if side and not data.store.whole and min(codec.grid[:2]) < side:
        size = codec.size
        progress.warn(f"{path} holds pictures of {size}, not of model.image_size {side}: the model's are {size}")
    elif side and config.train.augment.startswith("resized-crop") and not data.images.are_larger:
        progress.warn(
            f"{path} stores pictures of the model's {side}x{side}, so that crops of them are enlarged; "
            "those of whole pictures, encode --resize whole, are resized down"
        )
    if data.initial is not None:
        for said in data.initial.remarks():
            progress.note(said)
    else:
        _remark_on_shape(config)


def _remark_on_shape(config: PretrainFile) -> None:
    if config.model == type(config.model)():
        progress.note(f"the shape is the default, not a preset's; presets are {', '.join(preset_names())}")


def losses(model: Model, output: Output, batch: Batch) -> dict[str, Tensor]:
    """The pretraining loss of the family alone."""
    return {"loss": model.losses(output, batch.images, batch.masked) / batch.counts.scored}


def undivided_losses(model: Model, output: Output, batch: Batch) -> dict[str, Tensor]:
    """The same, for a mean that is divided once all are added up."""
    return {"loss": model.losses(output, batch.images, batch.masked)}


def generative_loss(where: Machine, model: Model, held: Images, batch: int) -> float:
    """The mean loss over held-out images. Their masks are of seed 0 in every run, so that runs compare."""
    (loss,), counts = score_sums(where, model, held, batch, 0, undivided_losses, ("loss",))
    return loss / counts.scored


@dataclass(frozen=True)
class HeldOut:
    """Validation by the mean loss over `images`, `batch` at once."""

    where: Machine
    images: Images
    batch: int

    @classmethod
    def of(
        cls, where: Machine, held: Images | None, model: Model, config: TrainConfig, limits: Limits
    ) -> HeldOut | None:
        """On some of the images that are held out, if any."""
        if held is None:
            return None
        micro = limits.micro_batch or micro_batch_images(model, where)
        return cls(where, some_of(held, config.val_images), WITHOUT_GRADIENTS * micro)

    def measure(self, model: Model) -> dict[str, float]:
        return {"val_loss": generative_loss(self.where, model, self.images, self.batch)}

    def quality(self, row: dict[str, float]) -> float:
        return -row["val_loss"]


@dataclass(frozen=True)
class Writer:
    """Writes a state of the run as a checkpoint."""

    where: Machine
    config: PretrainFile
    data: Data
    flags: Mapping[str, Any]

    def write(self, folder: Path, end: Mapping[str, Any], with_best: bool = False) -> Manifest:
        """The last weights as `model`, their average as `ema`, and those of the best validation, which stand in the
        run's folder, as `best`.
        """
        shape, data = self.data.shape, self.data
        weights = {"model": end["model"]}
        if end["ema"] is not None:
            weights["ema"] = averaged_weights(end["ema"])
        if with_best and end["best"] is not None:
            weights["best"] = read_weights(best_weights(folder, end["best"]))
        seen = tokens_seen(self.config, shape, end)
        summary = {**run_summary(self.where, shape, data.images, end), "tokens_seen": seen}
        if end["planned"] != self.config.train.steps:
            summary["planned_steps"] = end["planned"]  # before it was extended
        config = as_dict(self.config)
        return finish_checkpoint(
            folder, weights, asdict(shape), data.codec, "pretrain", config, self.flags, data.inputs, summary
        )


def tokens_seen(config: PretrainFile, shape: Shape, end: Mapping[str, Any] | None = None) -> int:
    """Positions that a whole run sees, or one has seen at its `end`."""
    return (config.train.steps if end is None else end["step"]) * config.train.batch_size * shape.n_ctx


def model_shape(config: PretrainFile, store: Store) -> Shape:
    """The shape of the configured model on the images of `store`."""
    name = config.sequence.order if config.sequence.order in NAMED else "file"
    codec = seen_codec(store, config.model.image_size)
    return SHAPES[config.model.family].of(as_dict(config.model), codec.grid, codec.n_vocab, name)


def fresh_model(shape: Shape, config: PretrainFile, grid: tuple[int, int, int], images: Images) -> Model:
    """Initial weights, the order of the sequence, and what the model takes from its training images before it learns.

    Raises UsageError for an order that is none.
    """
    seed = config.train.seed
    model = build(shape).init_weights(generator(seed, Stream.MODEL_INIT))
    model.attention = shape.pretraining_attention
    if shape.order != RASTER:
        order = _order(config.sequence.order, *shape.sequence_grid(grid), seed)
        model.set_order(torch.from_numpy(order))
    model.fit_codes(lambda rows: images.batch(rows)[0], len(images), seed)
    return model


def _order(order: str, rows: int, columns: int, channels: int, seed: int) -> np.ndarray:
    """int64 [rows * columns * channels]: a named order of a picture's cells, or that of a .npy file."""
    if order in NAMED:
        return order_of(order, rows, columns, channels, seed)
    try:
        cells = load_small(order, MOST_ORDER_BYTES)
    except PixseqError as error:
        raise UsageError(error.message, f"names: {', '.join(NAMED)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"sequence.order {order!r} is neither a readable .npy nor a name ({error})", f"names: {', '.join(NAMED)}"
        ) from None
    if cells.dtype.kind not in "iu" or not is_permutation(cells, rows * columns):
        raise UsageError(
            f"{order} holds {cells.dtype} {list(cells.shape)}, which is no permutation of {rows}x{columns} cells",
            f"it must hold each of 0 .. {rows * columns - 1} once",
        )
    return with_channels(cells.astype(np.int64), channels)


def plan(
    tokens: str | Path,
    config: PretrainFile,
    val_fraction: float | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    limits: Limits | None = None,
    init_from: str | Path | None = None,
) -> dict[str, Any]:
    """--dry-run: the effective configuration with its size and cost, nothing trained."""
    check_fraction(None, val_fraction)
    with machine(device, precision) as where:
        store = open_images(tokens, SHAPES[config.model.family].reads)
        if init_from is None:
            shape = model_shape(config, store)
            _remark_on_shape(config)
        else:
            initial = open_initial(init_from, config)
            initial.paired(store)
            shape = initial.shape
        with torch.device("meta"):
            model = build(shape)
        train_images = len(store)
        if val_fraction:
            train_images = len(split_rows(store, val_fraction, config.train.seed)[0])
        seen = tokens_seen(config, shape)
        micro = (limits or Limits()).micro_batch or micro_batch_images(model, where)
        seconds = expected_seconds(where, shape, config.train, config.train.steps, micro)
        if seconds > ABSURD_DAYS * 86400 and where.device.type == "cpu":
            small = ", ".join(name for name in CPU_PRESETS if name.startswith(config.model.family))
            progress.warn(
                f"this takes about {progress.clock(seconds)} here: for two CPU cores there are the presets {small}"
            )
        return {
            **as_dict(config),
            "parameters": shape.parameter_count(),
            "tokens_seen": seen,
            "epochs": round(config.train.steps * config.train.batch_size / train_images, 3),
            "training_flops": seen * shape.flops_per_token(),
            "flops_counted": COUNTING,
            "estimated_seconds": round(seconds, 1),
            "estimated_time": progress.clock(seconds),
            "state_gigabytes": round(16 * shape.parameter_count() / 1e9, 3),
            "micro_batch_images": micro,
            "device": str(where.device),
            "precision": where.precision,
        }
