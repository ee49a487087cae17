"""pretrain: tokens in, a trained Image GPT out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import finish_checkpoint, read_weights
from pixseq.artifacts.manifest import Manifest
from pixseq.config import ModelConfig, PretrainFile, as_dict
from pixseq.data.batches import split_validation
from pixseq.models.igpt import ImageGPT, Output, Shape
from pixseq.models.objectives import generative_nats
from pixseq.runtime import generator, machine, matrix_rate
from pixseq.stages.opening import check_fraction, first_images, open_tokens, read_images
from pixseq.stages.training import (
    Limits,
    averaged_weights,
    begin,
    generative_loss,
    micro_batch_images,
    run_summary,
    train,
)

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
    limits, train_config = limits or Limits(), config.train
    with machine(device, precision, ranks=True) as where:
        store, images, held, inputs = read_images(tokens, val, val_fraction, train_config.seed)
        shape = model_shape(config.model, store)
        flags = {"val_fraction": val_fraction, "precision": where.precision}
        recipe = {"config": as_dict(config), "inputs": {role: parent["id"] for role, parent in inputs.items()}, **flags}
        with begin(where, out, recipe, resume, overwrite) as (partial, state, record):
            if record is None:
                model = ImageGPT(shape).init_weights(generator(train_config.seed, INIT_STREAM)).to(where.device)
                held = first_images(held, train_config.val_images)
                micro = 2 * (limits.micro_batch or micro_batch_images(model, where))
                end = train(
                    where,
                    model,
                    train_config,
                    images,
                    losses,
                    (lambda m: {"val_loss": generative_loss(where, m, held, micro)}) if held is not None else None,
                    partial,
                    state,
                    limits,
                    score=lambda row: -row["val_loss"],
                )
                if where.leads:
                    weights = {"model": end["model"]}
                    if end["best"] is not None:
                        weights["best"] = read_weights(partial / "best.safetensors")
                    if end["ema"] is not None:
                        weights["ema"] = averaged_weights(end["ema"])
                    summary = {**run_summary(where, shape, images, end), "tokens_seen": tokens_seen(config, shape)}
                    record = finish_checkpoint(
                        partial, weights, asdict(shape), store.meta, "pretrain", as_dict(config), flags, inputs, summary
                    )
            if not where.leads:
                return None
            atomic.publish(partial, Path(out))
            return record


def losses(output: Output, x: Tensor, labels: Tensor | None, masked: Tensor | None) -> dict[str, Tensor]:
    """§2.1: the mean nats a token of each image."""
    return {"loss": generative_nats(output.logits, x, masked)}


def tokens_seen(config: PretrainFile, shape: Shape) -> int:
    return config.train.steps * config.train.batch_size * shape.n_ctx


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
    check_fraction(None, val_fraction)
    with machine(device, precision) as where:
        store = open_tokens(tokens)
        shape = model_shape(config.model, store)
        with torch.device("meta"):
            model = ImageGPT(shape)
        train_images = store.shape("tokens")[0]
        if val_fraction:
            train_images = len(split_validation(train_images, val_fraction, config.train.seed)[0])
        seen = tokens_seen(config, shape)
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
