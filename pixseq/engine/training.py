"""The one training loop, shared by pretrain and finetune.

A step is a pure function of the weights, the recipe and the step number, so that a resumed run repeats an uninterrupted
one bit for bit (on one CPU). "Step s" in the log is the loss of batch s, before its update; a validation row of step s
measures the weights after s updates.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from pixseq.engine.batches import PAD, batch_indices
from pixseq.engine.images import Images
from pixseq.engine.state import Run
from pixseq.engine.stopping import Stopping
from pixseq.errors import Diverged, Interrupted, Stop, UsageError
from pixseq.models.family import Model, Shape
from pixseq.models.output import Output
from pixseq.numerics.schedule import learning_rate, warmup_steps
from pixseq.runtime import Machine, compiled, generator, matrix_rate
from pixseq.streams import Stream

LAYER_SECONDS = 1e-3  # forward and backward through one layer of almost nothing
FIRST_SAVE_MINUTES = 1.0  # a run that is lost early was not yet worth waiting for the next ten minutes


class Counts(NamedTuple):
    """What means over the global batch are divided by: its images, and what of them is scored (see Model.scored)."""

    images: int
    scored: int

    @classmethod
    def of(cls, model: Model, images: int, masked: Tensor | None) -> Counts:
        """Where nothing is scored the sum of the losses is 0, and so shall its mean be."""
        return cls(images, max(model.scored(images, masked), 1))


class Batch(NamedTuple):
    """A rank's share of a global batch: images as they are stored, labels int [B] or None, masked bool [B, T] or None;
    and the counts of all of it.
    """

    images: Tensor
    labels: Tensor | None
    masked: Tensor | None
    counts: Counts


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

    def after(self, seconds: float) -> Limits:
        """What is left of them for a second run, when the first took so long."""
        if self.time_limit_minutes is None:
            return self
        return replace(self, time_limit_minutes=max(self.time_limit_minutes - seconds / 60, 0.0))


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
    loss, gradient or validation and Interrupted on a signal (see engine/stopping.py) or the time limit; the last good
    state is in `partial` first. `after_step` is called after every update and its validation, on every rank.
    """
    check_fit(machine, config, images)
    run = Run(model, config, state)
    loop = Loop(machine, run, images, losses, validate, score, patience, partial, limits, name, after_step)
    announce(loop)
    stop = Stopping(name, machine, loop.save)
    with (
        Log(partial / "log.jsonl" if machine.leads else Path(os.devnull), run.step, run.settled) as log,
        stop.listening(),
        progress.track(name, config.steps, "steps", run.step) as bar,
    ):
        try:
            stopped_early = loop.go(log, stop, bar)
        except Stop:
            stop.save()
            raise loop.interrupted(stop.asked) from None
        if not run.is_finite():
            raise loop.diverged("weights that are not finite after its last step")
        stop.save()  # so that nothing that goes wrong while the checkpoint is written costs the run
    return {**run.snapshot(), "stopped_early": stopped_early}


@dataclass
class Loop:
    """A run under way: what `train` was given, and what is done step by step."""

    machine: Machine
    run: Run
    images: Images
    losses: Losses
    validate: Callable[[Model], dict[str, float]] | None
    score: Callable[[dict[str, float]], float]
    patience: int
    partial: Path
    limits: Limits
    name: str
    after_step: Callable[[Run], None]

    def __post_init__(self):
        self.config, self.model = self.run.config, self.run.model
        self.forward = compiled(self.model, self.machine, self.limits.compile)
        self.micro = self.limits.micro_batch or micro_batch_images(self.model, self.machine)
        epoch = len(self.images) / self.config.batch_size
        self.warmup = warmup_steps(self.config.steps, epoch, self.config.warmup_epochs, self.config.warmup_fraction)
        self.val_every = self.config.val_every or max(self.config.steps // 20, 1)
        self.best_on_disk = self.run.best
        self.state_on_disk = (self.run.step, self.run.settled) if has_state(self.partial) else None

    def go(self, log: Log, stop: Stopping, bar: progress.Bar) -> bool:
        """Run all steps; returns whether it stopped early. Raises Stop, where the state has yet to be saved."""
        began = self.run.step
        wait = self.limits.save_minutes if self.state_on_disk else min(FIRST_SAVE_MINUTES, self.limits.save_minutes)
        next_save = time.monotonic() + 60 * wait
        while True:
            if not self.run.settled:
                self.settle(log, stop)
            if self.is_over():  # perhaps before it was interrupted, and only its checkpoint lacks
                return self.has_stalled()
            out_of_time = self.run.step > began and self.is_out_of_time()
            if self.machine.any(stop.asked is not None or out_of_time):
                stop.save()
                raise self.interrupted(None if out_of_time else stop.asked or "a signal")
            if time.monotonic() >= next_save:
                stop.save()
                next_save = time.monotonic() + 60 * self.limits.save_minutes
            self.step(log, stop, bar)

    def step(self, log: Log, stop: Stopping, bar: progress.Bar) -> None:
        step, config = self.run.step, self.config
        rate = learning_rate(step, config.steps, config.lr, self.warmup, config.schedule)
        with stop.may_be_cut():
            batch = share_of_batch(self.machine, self.images, config, step, self.model)
            row = accumulate(self.machine, self.forward, self.model, self.losses, batch, self.micro, bar.advance)
            norm = _gradient_norm(self.model, config.clip_norm)
        if not math.isfinite(row["loss"]) or not math.isfinite(norm):
            raise self.diverged(f"a loss of {row['loss']} and a gradient norm of {norm} at step {step}")
        self.run.update(rate)
        bar.note(f"loss {row['loss']:.4f}")
        bar.reach(self.run.step)
        if step % config.log_every == 0 or self.run.step == config.steps:
            speed = round(bar.rate() * config.batch_size * self.model.shape.n_ctx, 1)
            extra = {"lr": rate, "grad_norm": norm, "tokens_per_second": speed, "seconds": round(self.run.seconds(), 3)}
            log.write({"step": step, **row, **extra})

    def settle(self, log: Log, stop: Stopping) -> None:
        """What follows an update: its validation, where there is one, and what is kept of the step."""
        run = self.run
        if self.validate is not None and (run.step % self.val_every == 0 or run.step == self.config.steps):
            with stop.may_be_cut():
                measured = run.measure(self.validate)
            if not all(map(math.isfinite, measured.values())):
                raise self.diverged(f"{measured} when it validated after {run.step} steps")
            better = run.judge(measured, self.score)
            log.write({"step": run.step, **measured, "seconds": round(run.seconds(), 3)})
            if better and self.machine.leads:
                save_weights(best_weights(self.partial, run.best), self.model.state_dict())
                keep_best(self.partial, self.best_on_disk, run.best)
        self.after_step(run)
        run.settled = True

    def has_stalled(self) -> bool:
        return bool(self.patience) and self.run.since_best >= self.patience

    def is_over(self) -> bool:
        return self.run.settled and (self.has_stalled() or self.run.step == self.config.steps)

    def is_out_of_time(self) -> bool:
        limit = self.limits.time_limit_minutes
        return limit is not None and time.monotonic() - self.run.began >= 60 * limit

    def save(self) -> None:
        """Save the state, unless it is on disk as it is."""
        now = (self.run.step, self.run.settled)
        if self.machine.leads and self.state_on_disk != now:
            save_state(self.partial, self.run.snapshot())
            self.state_on_disk, self.best_on_disk = now, self.run.best
            keep_best(self.partial, self.best_on_disk)

    def interrupted(self, signal: str | None) -> Interrupted:
        return Interrupted(
            f"{self.name} stopped by {signal or 'the time limit'} after {self.run.step} of {self.config.steps} steps",
            f"its state is in {self.partial}: repeat the command with --resume to go on",
        )

    def diverged(self, what: str) -> Diverged:
        """Weights that gave a non-finite number are not worth more than the state saved before them."""
        if not has_state(self.partial) and self.run.is_finite():
            self.save()
        return Diverged(
            f"{self.name} met {what}",
            f"the last good state is kept in {self.partial}; begin anew with a learning rate below {self.config.lr:g} "
            "or with clipping (clip_norm)",
        )


def announce(loop: Loop) -> None:
    """Say what is trained, at what cost and where to, before a first step that may take minutes."""
    if not progress.enabled() or loop.is_over():
        return  # the estimate takes a moment
    name, partial, config, shape = loop.name, loop.partial, loop.config, loop.model.shape
    machine, images, begun = loop.machine, len(loop.images), loop.run.step
    epochs = config.steps * config.batch_size / images
    seconds = expected_seconds(machine, shape, config, config.steps - begun, loop.micro)
    whole = partial.name.endswith(".partial")  # not so a part of a larger run
    target = f"; it will be {partial.with_suffix('')}" if whole else ""
    progress.say(
        f"{name}: {shape.family} of {shape.n_layer} layers of width {shape.d_model}, {shape.parameter_count():,} "
        f"parameters, on {images:,} images of {shape.n_ctx:,} positions"
    )
    progress.say(
        f"{name}: {config.steps:,} steps of {config.batch_size} images ({epochs:.3g} epochs) on {machine.device} in "
        f"{machine.precision}, about {progress.clock(seconds)}, as far as can be told before{target}"
    )
    progress.say(f"{name}: step {begun} has begun; until the end, {partial} holds what --resume goes on from")


def expected_seconds(machine: Machine, shape: Shape, config: TrainConfig, steps: int, micro: int) -> float:
    """Roughly: floating point operations over 40 % of the matrix rate, measured for a moment, and what small models
    spend most of their time on, the overhead of a layer whatever its size.
    """
    images = config.batch_size / machine.world
    computing = images * shape.n_ctx * shape.flops_per_token() / (0.4 * matrix_rate(machine))
    return steps * (computing + math.ceil(images / micro) * LAYER_SECONDS * (shape.n_layer + 1))


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
            machine.any(opened[2] is not None)
            yield opened
        return
    finished = machine.any(False)  # from the first rank, which may give the folder its name at once
    partial = atomic.partial_path(out)
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
            if resume and machine.leads:
                progress.say(_where_it_begins(partial, state))
            record = work(partial, state)
        return record if machine.leads else None


def _where_it_begins(partial: Path, state: Mapping[str, Any] | None) -> str:
    if state is None:
        return f"--resume: no saved state in {partial}, beginning at step 0"
    return f"--resume: going on from {partial} after {state['step']} steps"


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
    batch: Batch,
    micro: int,
    advance: Callable[[float], None] = lambda part: None,
) -> dict[str, float]:
    """Gradients of the mean loss over the global batch, in micro-batches and over all ranks; returns the mean losses.

    `batch` is what this rank takes of it; `advance` is told which part of that each micro-batch was.
    """
    totals: dict[str, Any] = {}
    for start in range(0, len(batch.images), micro):
        part = slice(start, start + micro)
        x, y, m = (None if a is None else a[part].to(machine.device) for a in batch[:3])
        done = len(x) / len(batch.images)
        x = model.prepare(x)
        with machine.autocast():
            values = {key: v.sum() for key, v in losses(model, forward(x, m), x, y, m, batch.counts).items()}
        values["loss"].backward()
        for key, value in values.items():
            totals[key] = totals.get(key, 0) + value.detach()
        advance(done)
    machine.sum([*totals.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return {key: float(value) for key, value in totals.items()}


def share_of_batch(machine: Machine, images: Images, config: TrainConfig, step: int, model: Model) -> Batch:
    """What this rank takes of the global batch of a step, on the CPU.

    Order, augmentation and masks are drawn for all of the batch, as seed and step have it whatever the ranks; images
    are read and changed of the share alone.
    """
    share = machine.share(config.batch_size)
    rows = batch_indices(config.seed, step, config.batch_size, len(images))
    masked = model.draw_masks(config.batch_size, generator(config.seed, step, Stream.TRAINING_MASK))
    counts = Counts.of(model, config.batch_size, masked)
    return Batch(*images.training_batch(rows, config, step, share), None if masked is None else masked[share], counts)


def micro_batch_images(model: Model, machine: Machine) -> int:
    """Images whose activations fit in about a third of the memory beside weights and optimizer.

    A CPU gains nothing from more than some thousands of tokens at once, and loses its caches.
    """
    s = model.shape
    width = 2 if machine.precision == "bf16" else 4
    room = machine.memory_bytes() - 16 * s.parameter_count()
    images = max(room, 0) / 3 / s.activation_bytes(width)
    if machine.device.type == "cpu":
        images = min(images, 8192 / s.n_ctx)
    return max(int(images), 1)


def _gradient_norm(model: Model, clip: float) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], clip, norm)
    return float(norm)
