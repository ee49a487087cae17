"""pretrain: images in, a trained model out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts import atomic, manifest
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import best_weights, finish_checkpoint, read_weights
from pixseq.artifacts.manifest import Manifest
from pixseq.bounded.numpy_files import load_small
from pixseq.config import PretrainFile, as_dict, preset_names
from pixseq.engine.opening import (
    check_fraction,
    check_memory,
    held_out,
    open_images,
    read_images,
    seen_codec,
    some_of,
    split_rows,
)
from pixseq.engine.training import (
    Counts,
    Images,
    Limits,
    Run,
    averaged_weights,
    checkpointed,
    expected_seconds,
    micro_batch_images,
    recipe_of,
    run_summary,
    train,
)
from pixseq.engine.validation import validation_sums
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
    precision: str = "auto",
    limits: Limits | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep: str | None = None,
) -> Manifest | None:
    """Train on `tokens` (or pixels), validate on `val` or on a held-out part, write a checkpoint; returns its manifest.

    `keep`: "1000,2000" or "every:500", steps after which a checkpoint is kept beside `out`, as OUT-step1000. Ranks
    other than the first return None. Raises Diverged, Interrupted, PixseqError.
    """
    limits, train_config = limits or Limits(), config.train
    kept = kept_steps(keep, train_config.steps)
    with machine(device, precision, ranks=True) as where:
        kind = SHAPES[config.model.family].reads
        side = config.model.image_size
        store, images, held, inputs = read_images(
            tokens, kind, val, val_fraction, train_config.seed, side=side, scratch=Path(out).absolute().parent
        )
        shape, codec = model_shape(config, store), seen_codec(store, side)
        if side and not store.whole and min(codec.height, codec.width) < side:
            size = codec.size
            progress.warn(f"{tokens} holds pictures of {size}, not of model.image_size {side}: the model's are {size}")
        elif side and train_config.augment.startswith("resized-crop") and not images.are_larger:
            progress.warn(
                f"{tokens} stores pictures of the model's {side}x{side}, so that crops of them are enlarged; "
                "those of whole pictures, encode --resize whole, are resized down"
            )
        if config.model == type(config.model)():
            progress.note(f"the shape is the default, not a preset's; presets are {', '.join(preset_names())}")
        flags = {"val_fraction": val_fraction, "precision": where.precision, **held_out(images, held, val_fraction)}
        recipe = recipe_of(as_dict(config), inputs, flags)
        kept = {step for step in kept if not (resume and is_of(step_folder(out, step), recipe))}
        for step in kept if where.leads else ():
            atomic.check_target(step_folder(out, step), overwrite)

        def finish(folder: Path, weights: dict[str, Any], end: Mapping[str, Any]) -> Manifest:
            summary = {**run_summary(where, shape, images, end), "tokens_seen": tokens_seen(config, shape, end)}
            return finish_checkpoint(
                folder, weights, asdict(shape), codec, "pretrain", as_dict(config), flags, inputs, summary
            )

        def work(partial: Path, state: dict[str, Any] | None) -> Manifest | None:
            check_memory(shape, where, TRAINED_BYTES)
            model = placed(fresh_model(shape, config, codec.grid, images), where)
            some = some_of(held, train_config.val_images)
            micro = 2 * (limits.micro_batch or micro_batch_images(model, where))

            def keep_step(run: Run) -> None:
                if run.step not in kept or not where.leads:
                    return
                with atomic.writing(step_folder(out, run.step), overwrite, "pretrain --keep") as folder:
                    folder.mkdir()
                    shutil.copyfile(partial / "log.jsonl", folder / "log.jsonl")
                    now = {**run.snapshot(), "stopped_early": False}
                    finish(folder, weights_of(now), now)

            end = train(
                where,
                model,
                train_config,
                images,
                losses,
                None if some is None else lambda m: {"val_loss": generative_loss(where, m, some, micro)},
                partial,
                state,
                limits,
                score=lambda row: -row["val_loss"],
                after_step=keep_step,
            )
            if not where.leads:
                return None
            weights = weights_of(end)
            if end["best"] is not None:
                weights["best"] = read_weights(best_weights(partial, end["best"]))
            return finish(partial, weights, end)

        return checkpointed(where, out, "pretrain", recipe, resume, overwrite, work)


def losses(
    model: Model, output: Output, x: Tensor, labels: Tensor | None, masked: Tensor | None, counts: Counts
) -> dict[str, Tensor]:
    """The pretraining loss of the family alone."""
    return {"loss": model.losses(output, x, masked) / counts.scored}


def generative_loss(where: Machine, model: Model, held: Images, batch: int) -> float:
    """The mean loss over held-out images. Their masks are of seed 0 in every run, so that runs compare."""

    def measure(model: Model, output: Output, x: Tensor, labels: Any, masked: Tensor | None, counts: Counts) -> list:
        return [model.losses(output, x, masked).double().sum()]

    sums, counts = validation_sums(where, model, held, batch, 0, measure)
    return sums[0] / counts.scored


def weights_of(end: Mapping[str, Any]) -> dict[str, Any]:
    """The sets of weights in a run's state: the last, and their average where there is one."""
    weights = {"model": end["model"]}
    if end["ema"] is not None:
        weights["ema"] = averaged_weights(end["ema"])
    return weights


def kept_steps(keep: str | None, steps: int) -> set[int]:
    """The steps that --keep names, below the last. Raises UsageError for a text that names none."""
    if keep is None:
        return set()
    every, colon, number = keep.partition(":")
    try:
        if colon and every == "every" and 0 < int(number) <= steps:
            return set(range(int(number), steps, int(number)))
        named = {int(part) for part in keep.split(",")}
    except ValueError:
        named = set()
    if not named or min(named) < 1 or max(named) > steps:
        raise UsageError(f"--keep {keep!r} names no steps of 1 to {steps}", "for example 1000,2000 or every:500")
    return named - {steps}


def step_folder(out: str | Path, step: int) -> Path:
    out = Path(out)
    return out.with_name(f"{out.name}-step{step}")


def is_of(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a checkpoint stands at `path` that a run of `recipe` has kept, before it was interrupted."""
    if not (path / "manifest.json").is_file():
        return False
    record = manifest.read(path)
    flags = {key: value for key, value in recipe.items() if key not in ("config", "inputs")}
    parents = {role: parent["id"] for role, parent in record["inputs"].items()}
    return parents == recipe["inputs"] and record["config"] == {**recipe["config"], **flags}


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
    model.attention = shape.learns
    if shape.order != RASTER:
        order = _order(config.sequence.order, *shape.cells(grid), seed)
        model.set_order(torch.from_numpy(order))
    model.learn_codes(lambda rows: images.batch(rows)[0], len(images), seed)
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
    precision: str = "auto",
    limits: Limits | None = None,
) -> dict[str, Any]:
    """--dry-run: the effective configuration with its size and cost, nothing trained."""
    check_fraction(None, val_fraction)
    with machine(device, precision) as where:
        store = open_images(tokens, SHAPES[config.model.family].reads)
        shape = model_shape(config, store)
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
