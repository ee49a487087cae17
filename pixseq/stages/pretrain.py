"""pretrain: tokens in, a trained Image GPT out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import begin_run, finish_checkpoint, load_state
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.config import ModelConfig, PretrainFile, as_dict
from pixseq.data.batches import split_validation
from pixseq.errors import PixseqError, UsageError
from pixseq.models.igpt import ImageGPT, Output, Shape
from pixseq.models.objectives import generative_nats
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.opening import grid, open_tokens, read_tokens
from pixseq.stages.training import Images, Limits, generative_loss, micro_batch_images, train

INIT_STREAM = 10


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
) -> Manifest | None:
    """Train on `tokens`, validate on `val` or on a held-out part, write a checkpoint; returns its manifest.

    Ranks other than the first return None. Raises Diverged, Interrupted, PixseqError.
    """
    limits = limits or Limits()
    with machine(device, precision, ranks=True) as where:
        store, images, held, inputs = read_images(tokens, val, val_fraction, config.train.seed)
        shape = model_shape(config.model, store)
        recipe = {
            "config": as_dict(config),
            "inputs": {role: parent["id"] for role, parent in inputs.items()},
            "val_fraction": val_fraction,
            "precision": where.precision,
        }
        partial, state = begin(where, out, recipe, resume, overwrite)
        model = ImageGPT(shape).init_weights(generator(config.train.seed, INIT_STREAM)).to(where.device)
        held = first_images(held, config.train.val_images)
        micro = 2 * (limits.micro_batch or micro_batch_images(model, where))
        end = train(
            where,
            model,
            config.train,
            images,
            losses,
            (lambda m: {"val_loss": generative_loss(where, m, held, micro)}) if held is not None else None,
            partial,
            state,
            limits,
            score=lambda row: -row["val_loss"],
        )
        if not where.leads:
            return None
        weights = {"model": end["model"]}
        if end["ema"] is not None:
            weights["ema"] = averaged_weights(end["ema"])
        summary = {
            "parameters": shape.parameter_count(),
            "images": len(images),
            "steps": end["step"],
            "tokens_seen": end["step"] * config.train.batch_size * shape.n_ctx,
            "training_seconds": round(end["seconds"], 1),
            "best": end["best"],
            "device": str(where.device),
            "precision": where.precision,
        }
        effective = {**as_dict(config), "val_fraction": val_fraction}
        record = finish_checkpoint(
            partial, weights, dataclasses.asdict(shape), codec(store), "pretrain", effective, inputs, summary
        )
        atomic.publish(partial, Path(out))
        return record


def losses(output: Output, x: Tensor, labels: Tensor | None, masked: Tensor | None) -> dict[str, Tensor]:
    """§2.1: the mean nats a token of each image."""
    return {"loss": generative_nats(output.logits, x, masked)}


def read_images(
    tokens: str | Path, val: str | Path | None, val_fraction: float | None, seed: int
) -> tuple[Store, Images, Images | None, dict[str, Any]]:
    """The tokens store, its training images, the validation images (or None) and the parents' references.

    Raises UsageError for a val_fraction that is no fraction, PixseqError if val does not pair with tokens.
    """
    if val is not None and val_fraction is not None:
        raise UsageError("--val and --val-fraction were both given", "keep one of them")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, it must lie between 0 and 1", "for example 0.1")
    store = open_tokens(tokens)
    images = Images(read_tokens(store), store.labels(), grid(store.meta))
    inputs = {"tokens": reference(tokens, store.manifest)}
    if val is not None:
        other = open_tokens(val)
        for key in ("scheme", "palette_id", "height", "width"):
            if store.meta.get(key) != other.meta.get(key):
                raise PixseqError(
                    f"{tokens} has {key} {store.meta.get(key)}, {val} has {other.meta.get(key)}",
                    "encode both with the same palette and size",
                )
        inputs["val"] = reference(val, other.manifest)
        return store, images, Images(read_tokens(other), other.labels(), images.grid), inputs
    if val_fraction is None:
        return store, images, None, inputs
    if len(images) < 2:
        raise PixseqError(f"{tokens} holds one image: no part can be held out", "encode more, or give --val")
    train_rows, val_rows = split_validation(len(images), val_fraction, seed)
    return store, images.rows(train_rows), images.rows(val_rows), inputs


def first_images(images: Images | None, most: int) -> Images | None:
    """An evenly spaced part of at most `most` images."""
    if images is None or len(images) <= most:
        return images
    return images.rows(np.linspace(0, len(images) - 1, most).astype(np.int64))


def model_shape(model: ModelConfig, store: Store) -> Shape:
    """Vocabulary and context come from the tokens."""
    return Shape(
        n_layer=model.n_layer,
        n_head=model.n_head,
        d_model=model.d_model,
        n_vocab=store.meta["n_vocab"],
        n_ctx=store.shape("tokens")[1],
        objective=model.objective,
    )


def codec(store: Store) -> dict[str, Any]:
    """What a checkpoint must know about its tokens: all that stands beside them."""
    return dict(store.meta)


def averaged_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain names of an AveragedModel's state."""
    return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}


def begin(where: Machine, out: str | Path, recipe: dict[str, Any], resume: bool, overwrite: bool):
    """The partial folder and the saved state: the first rank makes it, the others read it."""
    if where.leads:
        partial, state = begin_run(out, recipe, resume, overwrite)
        where.wait()
        return partial, state
    where.wait()
    partial = atomic.partial_path(out)
    return partial, load_state(partial)


def plan(
    tokens: str | Path,
    config: PretrainFile,
    val_fraction: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    limits: Limits | None = None,
) -> dict[str, Any]:
    """--dry-run: the effective configuration with its size and cost, nothing trained.

    The time is the floating point operations over 40 % of this machine's matrix rate, measured for a moment.
    """
    with machine(device, precision) as where:
        store = open_tokens(tokens)
        shape = model_shape(config.model, store)
        with torch.device("meta"):
            model = ImageGPT(shape)
        train_images = store.shape("tokens")[0]
        if val_fraction:
            train_images = len(split_validation(train_images, val_fraction, config.train.seed)[0])
        seen = config.train.steps * config.train.batch_size * shape.n_ctx
        flops = seen * shape.flops_per_token()
        return {
            **as_dict(config),
            "parameters": shape.parameter_count(),
            "tokens_seen": seen,
            "epochs": round(config.train.steps * config.train.batch_size / train_images, 3),
            "training_flops": flops,
            "estimated_seconds": round(flops / (0.4 * matrix_rate(where)), 1),
            "state_gigabytes": round(16 * shape.parameter_count() / 1e9, 3),
            "micro_batch_images": (limits or Limits()).micro_batch or micro_batch_images(model, where),
            "device": str(where.device),
            "precision": where.precision,
        }


def matrix_rate(where: Machine) -> float:
    """Floating point operations a second of a square matrix product in the training precision."""
    dtype = torch.bfloat16 if where.precision == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=where.device, dtype=dtype)
    done, began = 0, 0.0
    for i in range(6):
        if i == 1:  # the first one warms up
            began = time.perf_counter()
        a @ a
        done += i > 0
    if where.device.type == "cuda":
        torch.cuda.synchronize()
    return done * 2 * 2048**3 / (time.perf_counter() - began)
