"""The one training loop, shared by pretrain and finetune.

A step is a pure function of the weights, the recipe and the step number, so that a resumed run repeats an uninterrupted
one bit for bit (on one CPU). "Step s" in the log is the loss of batch s, before its update; a validation row of step s
measures the weights after s updates.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.checkpoint import (
    best_weights,
    has_state,
    keep_best,
    load_state,
    run_folder,
    save_state,
    save_weights,
)
from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.metrics import Log
from pixseq.config import TrainConfig
from pixseq.data.batches import PAD, batch_indices
from pixseq.errors import Diverged, Interrupted, UsageError
from pixseq.models.family import Model, Shape
from pixseq.models.muon import Muon
from pixseq.models.output import Output
from pixseq.numerics.schedule import learning_rate, warmup_steps
from pixseq.runtime import Machine, compiled, generator
from pixseq.stages.images import Images
from pixseq.streams import Stream


class Counts(NamedTuple):
    """What means over the global batch are divided by: its images, and what of them is scored (see Model.scored)."""

    images: int
    scored: int

    @classmethod
    def of(cls, model: Model, images: int, masked: Tensor | None) -> Counts:
        """Where nothing is scored the sum of the losses is 0, and so shall its mean be."""
        return cls(images, max(model.scored(images, masked), 1))


# (model, output, images, labels, masked, counts) -> {"loss": [B], ...}: each image's share of the mean over the global
# batch, of what is minimised and of what is logged beside it
Losses = Callable[[Model, Output, Tensor, Tensor | None, Tensor | None, Counts], dict[str, Tensor]]


@dataclass
class Limits:
    """What belongs to the machine and the day rather than to the recipe."""

    micro_batch: int | None = None  # images at once; None: by memory
    time_limit_minutes: float | None = None
    save_minutes: float = 10.0
    compile: bool | None = None


class Run:
    """What changes during a run, saved and restored whole: weights, optimizers, step, best validation."""

    def __init__(self, model: Model, config: TrainConfig, state: dict[str, Any] | None):
        self.model, self.config = model, config
        self.optimizers = make_optimizers(model, config)
        self.averaged = _averaged(model, config.ema)
        self.step, self.best, self.since_best = 0, None, 0
        self.seconds_before, self.began = 0.0, time.monotonic()
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))  # pop: a second copy of everything would stay in memory
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers")):
            optimizer.load_state_dict(saved)
        if self.averaged is not None:
            self.averaged.load_state_dict(state.pop("ema"))
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]
        self.seconds_before = state["seconds"]

    def seconds(self) -> float:
        """Training time, interruptions left out."""
        return self.seconds_before + time.monotonic() - self.began

    def snapshot(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.averaged.state_dict() if self.averaged is not None else None,
            "step": self.step,
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds(),
        }

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def update(self, rate: float) -> None:
        """One optimizer step at learning rate `rate` from the gradients at hand."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1

    def measure(self, validate: Callable[[Model], dict[str, float]], score: Callable) -> tuple[dict, bool]:
        """A validation row (of the averaged weights too), and whether it is the best so far."""
        row = validate(self.model)
        if self.averaged is not None:
            row |= {f"ema_{key}": value for key, value in validate(self.averaged.module).items()}
        value = score(row)
        better = self.best is None or value > self.best["score"]
        if better:
            self.best = {"score": value, "step": self.step, **row}
        self.since_best = 0 if better else self.since_best + 1
        return row, better


def train(
    machine: Machine,
    model: Model,
    config: TrainConfig,
    images: Images,
    losses: Losses,
    validate: Callable[[Model], dict[str, float]] | None,
    partial: Path,
    state: dict[str, Any] | None,
    limits: Limits,
    score: Callable[[dict[str, float]], float],
    patience: int = 0,
    name: str = "pretrain",
    after_step: Callable[[Run], None] = lambda run: None,
) -> dict[str, Any]:
    """Train `model` in place; returns the state at the end (weights, best, ema, step, seconds) and `stopped_early`.

    `score` of a validation row, of the weights themselves and not of their average, decides the best weights: higher is
    better; after `patience` rows without a better one the run stops early (0: never). Raises Diverged on a non-finite
    loss, gradient or validation and Interrupted on SIGINT, SIGTERM or the time limit; the last good state is in
    `partial` first. `after_step` is called after every update and its validation, on every rank.
    """
    check_fit(machine, config, images)
    run = Run(model, config, state)
    forward = compiled(model, machine, limits.compile)
    micro = limits.micro_batch or micro_batch_images(model, machine)
    warmup = warmup_steps(config.steps, len(images) / config.batch_size, config.warmup_epochs, config.warmup_fraction)
    val_every = config.val_every or max(config.steps // 20, 1)
    last_save = time.monotonic()
    saved = run.best  # that of the state on disk
    stopped_early = bool(patience) and run.since_best >= patience  # it may have ended before, and lacked its checkpoint

    def save() -> None:
        nonlocal saved
        if machine.leads:
            save_state(partial, run.snapshot())
            saved = run.best
            keep_best(partial, saved)

    def diverged(what: str) -> Diverged:
        """Weights that gave a non-finite number are not worth more than the state saved before them."""
        if not has_state(partial) and run.is_finite():
            save()
        return Diverged(
            f"{name} met {what}",
            f"the last good state is kept in {partial}; begin anew with a learning rate below {config.lr:g} "
            "or with clipping (clip_norm)",
        )

    with (
        Log(partial / "log.jsonl" if machine.leads else Path(os.devnull), run.step) as log,
        _stop_signals() as stop,
        progress.track(name, config.steps, "steps", run.step) as bar,
    ):
        while run.step < config.steps and not stopped_early:
            step = run.step
            rate = learning_rate(step, config.steps, config.lr, warmup, config.schedule)
            minutes = (time.monotonic() - run.began) / 60
            out_of_time = limits.time_limit_minutes is not None and minutes >= limits.time_limit_minutes
            batch = global_batch(images, config, step, model)
            row = accumulate(machine, forward, model, losses, *batch, micro, stop.is_set() or out_of_time)
            stopping = row.pop("stop") > 0
            norm = _gradient_norm(model, config.clip_norm)
            if not math.isfinite(row["loss"]) or not math.isfinite(norm):
                raise diverged(f"a loss of {row['loss']} and a gradient norm of {norm} at step {step}")
            run.update(rate)
            bar.note(f"loss {row['loss']:.4f}")
            bar.advance()
            if step % config.log_every == 0 or run.step == config.steps:
                speed = round(bar.rate() * config.batch_size * model.shape.n_ctx, 1)
                extra = {"lr": rate, "grad_norm": norm, "tokens_per_second": speed, "seconds": round(run.seconds(), 3)}
                log.write({"step": step, **row, **extra})

            if validate is not None and (run.step % val_every == 0 or run.step == config.steps):
                measured, better = run.measure(validate, score)
                if not all(map(math.isfinite, measured.values())):
                    raise diverged(f"{measured} when it validated after {run.step} steps")
                log.write({"step": run.step, **measured, "seconds": round(run.seconds(), 3)})
                if better and machine.leads:
                    save_weights(best_weights(partial, run.best), model.state_dict())
                    keep_best(partial, saved, run.best)
                stopped_early = bool(patience) and run.since_best >= patience
            after_step(run)
            if run.step == config.steps or stopped_early:
                break

            if stopping:
                save()
                raise Interrupted(
                    f"{name} stopped by {'the time limit' if out_of_time else 'a signal'} "
                    f"after {run.step} of {config.steps} steps",
                    f"its state is in {partial}: repeat the command with --resume to go on",
                )
            if time.monotonic() - last_save > 60 * limits.save_minutes:
                save()
                last_save = time.monotonic()
        if not run.is_finite():
            raise diverged("weights that are not finite after its last step")
        save()  # so that nothing that goes wrong while the checkpoint is written costs the run
    return {**run.snapshot(), "stopped_early": stopped_early}


def check_fit(machine: Machine, config: TrainConfig, images: Images) -> None:
    """What configuration, data and machine can only say together. Raises UsageError."""
    if config.batch_size < machine.world:
        raise UsageError(f"batch_size {config.batch_size} cannot be shared by {machine.world} processes")
    if config.augment == "crop-flip" and min(images.grid[:2]) <= PAD:
        raise UsageError(
            f"augment crop-flip pads by {PAD} reflected pixels, the pictures are {images.grid[0]}x{images.grid[1]}",
            "use flip or none",
        )
    if config.augment.startswith("resized-crop") and images.are_tokens:
        raise UsageError(
            f"augment {config.augment} mixes colours, so it needs pixels, and these are tokens", "use crop-flip or flip"
        )


@contextmanager
def begin(
    machine: Machine, out: str | Path, command: str, recipe: dict[str, Any], resume: bool, overwrite: bool
) -> Iterator[tuple]:
    """`run_folder` for all ranks: the first one makes and locks it, the others read it."""
    if machine.leads:
        with run_folder(out, command, recipe, resume, overwrite) as opened:
            machine.wait()
            yield opened
        return
    machine.wait()
    partial = atomic.partial_path(out)
    finished = (partial / "manifest.json").is_file() or not partial.exists()
    yield partial, None if finished else load_state(partial), {} if finished else None


def recipe_of(config: Mapping[str, Any], inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    return {"config": dict(config), "inputs": {role: parent["id"] for role, parent in inputs.items()}, **flags}


def checkpointed(
    machine: Machine,
    out: str | Path,
    command: str,
    recipe: dict[str, Any],
    resume: bool,
    overwrite: bool,
    work: Callable,
) -> Manifest | None:
    """The manifest of the checkpoint `out`, None on ranks other than the first.

    `work` takes the partial folder and the state to go on from (or None), trains, and has the first rank write the
    checkpoint there, whose manifest it returns. What only lacks its name is not made again.
    """
    with begin(machine, out, command, recipe, resume, overwrite) as (partial, state, record):
        if record is None:
            record = work(partial, state)
        return record if machine.leads else None


def run_summary(machine: Machine, shape: Shape, images: Images, end: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that made it."""
    return {
        "parameters": shape.parameter_count(),
        **images.count(),
        "steps": end["step"],
        "stopped_early": end["stopped_early"],
        "training_seconds": round(end["seconds"], 1),
        "best": end["best"],
        "device": str(machine.device),
    }


def averaged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain names of an AveragedModel's state."""
    return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}


def accumulate(
    machine: Machine,
    forward: Callable,
    model: Model,
    losses: Losses,
    images: Tensor,
    labels: Tensor | None,
    masked: Tensor | None,
    micro: int,
    stop: bool = False,
) -> dict[str, float]:
    """Gradients of the mean loss over the global batch, in micro-batches and over all ranks; returns the mean losses.

    images [B, ...] and its companions hold the whole global batch; each rank takes its share of the images. `stop` is
    summed over the ranks beside the losses, so that all of them stop at the same step.
    """
    share = machine.share(len(images))
    counts = Counts.of(model, len(images), masked)
    totals = {"stop": torch.tensor(float(stop), device=machine.device)}
    for start in range(share.start, share.stop, micro):
        part = slice(start, min(start + micro, share.stop))
        x, y, m = (None if a is None else a[part].to(machine.device) for a in (images, labels, masked))
        x = model.prepare(x)
        with machine.autocast():
            values = {key: v.sum() for key, v in losses(model, forward(x, m), x, y, m, counts).items()}
        values["loss"].backward()
        for key, value in values.items():
            totals[key] = totals.get(key, 0) + value.detach()
    machine.sum([*totals.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return {key: float(value) for key, value in totals.items()}


def global_batch(images: Images, config: TrainConfig, step: int, model: Model):
    """The global batch of a step on the CPU: images, labels [B] or None, masked [B, T] or None."""
    rows = batch_indices(config.seed, step, config.batch_size, len(images))
    masked = model.draw_masks(len(rows), generator(config.seed, step, Stream.TRAINING_MASK))
    return *images.training_batch(rows, config, step), masked


def make_optimizers(model: Model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam with decoupled decay; with optimizer "muon", Muon on the blocks' matrices instead.

    decay "matrices" spares what has one axis: biases and the gains of norms.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {}
    if config.optimizer == "muon":
        matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = [p for name, p in parameters.items() if name not in matrices]
    spared = [p for p in rest if config.decay == "matrices" and p.ndim < 2]
    groups = [{"params": [p for p in rest if not any(p is s for s in spared)]}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]
    if matrices:
        made.append(Muon(matrices.values(), lr=config.lr, weight_decay=config.weight_decay))
    return made


def micro_batch_images(model: Model, machine: Machine) -> int:
    """Images whose activations fit in about a third of the memory beside weights and optimizer.

    A CPU gains nothing from more than some thousands of tokens at once, and loses its caches.
    """
    s = model.shape
    width = 2 if machine.precision == "bf16" else 4
    room = machine.memory_bytes() / machine.world - 16 * s.parameter_count()
    images = max(room, 0) / 3 / s.activation_bytes(width)
    if machine.device.type == "cpu":
        images = min(images, 8192 / s.n_ctx)
    return max(int(images), 1)


def _averaged(model: Model, decay: float) -> torch.optim.swa_utils.AveragedModel | None:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def _gradient_norm(model: Model, clip: float) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], clip, norm)
    return float(norm)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the loop stops between two steps; a second signal acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
