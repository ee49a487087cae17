"""The one training loop, shared by pretrain and finetune.

A step is a pure function of the weights, the recipe and the step number, so that a resumed run repeats an uninterrupted
one bit for bit (on one CPU). "Step s" in the log is the loss of batch s, before its update; a validation row of step s
measures the weights after s updates.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pixseq import progress
from pixseq.artifacts.checkpoint import best_weights, has_state, keep_best, save_state, save_weights
from pixseq.artifacts.metrics import Log
from pixseq.config import TrainConfig
from pixseq.engine.batches import PAD
from pixseq.engine.cost import Pace, alike, announce, micro_batch_images, worth_compiling
from pixseq.engine.images import Images
from pixseq.engine.prefetch import Prefetch
from pixseq.engine.state import TrainState
from pixseq.engine.step import Batch, Score, accumulate, gradient_norm, share_of_batch
from pixseq.engine.stopping import Stopping
from pixseq.engine.validation import Validation
from pixseq.errors import Diverged, Interrupted, Stop, UsageError
from pixseq.numerics.schedule import learning_rate, warmup_steps
from pixseq.runtime import Machine, compiled
from pixseq.runtime.cuda import on_the_way

FIRST_SAVE_MINUTES = 1.0  # a run that is lost early was not yet worth waiting for the next ten minutes


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


def train(training: Training) -> dict[str, Any]:
    """Train its model in place; returns the state at the end (weights, best, ema, step, seconds) and `stopped_early`.

    The best weights are those of the best validation, of the weights themselves and not of their average. Raises
    Diverged on a non-finite loss, gradient or validation and Interrupted on a signal (see engine/stopping.py) or the
    time limit; the last good state is in the folder first.
    """
    machine, run, name = training.machine, training.run, training.name
    machine.keep_freed_memory()
    check_fit(machine, run.config, training.images)
    if not training.is_over():
        announce(name, machine, run, len(training.images), training.micro, training.folder)
        if training.compiles:
            progress.say(f"{name}: the first step is compiled, which may take minutes")
    stop = Stopping(name, machine, training.save)
    log_path = training.folder / "log.jsonl" if machine.leads else Path(os.devnull)
    with (
        Log(log_path, run.step, run.validated) as log,
        stop.listening(),
        progress.track(name, run.config.steps, "steps", run.step) as bar,
    ):
        try:
            stopped_early = training.steps(log, stop, bar)
        except Stop:
            stop.save()
            raise training.interrupted(stop.asked) from None
        if not run.is_finite():
            raise training.diverged("weights that are not finite after its last step")
        stop.save()  # so that nothing that goes wrong while the checkpoint is written costs the run
    return {**run.snapshot(), "stopped_early": stopped_early}


class PendingStep(NamedTuple):
    """The numbers of a step that its device may still be computing."""

    step: int
    numbers: Callable[[], dict[str, float]]


@dataclass
class Training:
    """A run of the loop: the model with its optimizers and step (`run`), what it trains on and how that is scored.

    `folder` holds its log and its state. After every update the weights are validated where it is time, and after
    `patience` rows of it without a better one the run stops early (0: never); then `after_step` is called, on every
    rank.
    """

    machine: Machine
    run: TrainState
    images: Images
    score: Score
    folder: Path
    limits: Limits
    validation: Validation | None = None
    patience: int = 0
    after_step: Callable[[TrainState], None] | None = None
    name: str = "pretrain"

    def __post_init__(self) -> None:
        self.config, self.model = self.run.config, self.run.model
        self.images = self.images.on(self.machine)
        self.batches = Prefetch(self.machine, self.make_batch, self.config.steps, self.images.on_device is None)
        self.pending: PendingStep | None = None
        self.reads_late = self.machine.device.type == "cuda"  # a CPU is never ahead of what it computes
        self.pace = Pace(self.machine, self.model.shape, self.config)
        self.compiles = self.limits.compile
        if self.compiles is None:
            self.compiles = worth_compiling(self.machine, self.model.shape, self.config)
        self.forward = compiled(self.model, self.machine, self.compiles)
        self.micro = self.limits.micro_batch or micro_batch_images(self.model, self.machine)
        if self.compiles and not self.limits.micro_batch:
            share = self.machine.share(self.config.batch_size)
            self.micro = alike(share.stop - share.start, self.micro)
        epoch = len(self.images) / self.config.batch_size
        self.warmup = warmup_steps(self.run.planned, epoch, self.config.warmup_epochs, self.config.warmup_fraction)
        self.val_every = self.config.val_every or max(self.config.steps // 20, 1)
        self.best_on_disk = self.run.best
        self.state_on_disk = (self.run.step, self.run.validated) if has_state(self.folder) else None

    def steps(self, log: Log, stop: Stopping, bar: progress.Bar) -> bool:
        """Run all of them; returns whether it stopped early. Raises Stop, where the state has yet to be saved."""
        began = self.run.step
        wait = self.limits.save_minutes if self.state_on_disk else min(FIRST_SAVE_MINUTES, self.limits.save_minutes)
        next_save = time.monotonic() + 60 * wait
        while True:
            if not self.run.validated:
                self.validate(log, stop)
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
        """Data, gradients, update, log."""
        step, config = self.run.step, self.config
        rate = learning_rate(step, config.steps, config.lr, self.warmup, config.schedule)
        due = step % config.log_every == 0 or step + 1 == config.steps
        with stop.may_be_cut():
            batch = self.batches.batch(step)
            numbers = accumulate(self.machine, self.forward, self.model, self.score, batch, self.micro, bar.advance)
            numbers["grad_norm"] = gradient_norm(self.model, config.clip_norm)
            self.read(bar)  # those of the step before, now that the device has work
        self.pending = PendingStep(step, on_the_way(numbers))
        row = self.read(bar) if due or not self.reads_late else None
        self.run.update(rate)
        bar.reach(self.run.step)
        if due and row is not None:
            speed = round(bar.rate() * config.batch_size * self.model.shape.n_ctx, 1)
            norm, seconds = row.pop("grad_norm"), round(self.run.seconds(), 3)
            extra = {"lr": rate, "grad_norm": norm, "tokens_per_second": speed, "seconds": seconds}
            log.write({"step": step, **row, **extra, **self.pace.mfu(step + 1)})
            self.pace.begin(step + 1)

    def make_batch(self, step: int) -> Batch:
        return share_of_batch(self.machine, self.images, self.config, step, self.model)

    def read(self, bar: progress.Bar | None = None) -> dict[str, float] | None:
        """The numbers of the last step, once: they may have to be waited for. Raises Diverged."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        row = pending.numbers()
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            norm = row["grad_norm"]
            raise self.diverged(f"a loss of {row['loss']} and a gradient norm of {norm} at step {pending.step}")
        if bar is not None:
            bar.note(f"loss {row['loss']:.4f}")
        return row

    def validate(self, log: Log, stop: Stopping) -> None:
        """What follows an update: its validation, where it is time for one, and what is kept of the step."""
        run, validation = self.run, self.validation
        if validation is not None and (run.step % self.val_every == 0 or run.step == self.config.steps):
            with stop.may_be_cut():
                measured = run.measure(validation.measure)
            if not all(map(math.isfinite, measured.values())):
                raise self.diverged(f"{measured} when it validated after {run.step} steps")
            better = run.update_best(measured, validation.quality)
            log.write({"step": run.step, **measured, "seconds": round(run.seconds(), 3)})
            self.pace.begin(run.step)
            if better and self.machine.leads and run.best is not None:
                save_weights(best_weights(self.folder, run.best), self.model.state_dict())
                keep_best(self.folder, self.best_on_disk, run.best)
        if self.after_step is not None:
            self.after_step(run)
        run.validated = True

    def has_stalled(self) -> bool:
        return bool(self.patience) and self.run.since_best >= self.patience

    def is_over(self) -> bool:
        return self.run.validated and (self.has_stalled() or self.run.step == self.config.steps)

    def is_out_of_time(self) -> bool:
        limit = self.limits.time_limit_minutes
        return limit is not None and time.monotonic() - self.run.began >= 60 * limit

    def save(self) -> None:
        """Save the state, unless it is on disk as it is. Raises Diverged where it comes of numbers that are none."""
        self.read()
        now = (self.run.step, self.run.validated)
        if self.machine.leads and self.state_on_disk != now:
            save_state(self.folder, self.run.snapshot())
            self.state_on_disk, self.best_on_disk = now, self.run.best
            keep_best(self.folder, self.best_on_disk)

    def interrupted(self, signal: str | None) -> Interrupted:
        return Interrupted(
            f"{self.name} stopped by {signal or 'the time limit'} after {self.run.step} of {self.config.steps} steps",
            f"its state is in {self.folder}: repeat the command with --resume to go on",
        )

    def diverged(self, what: str) -> Diverged:
        """Weights that gave a non-finite number are not worth more than the state saved before them."""
        if not has_state(self.folder) and self.run.is_finite():
            self.save()
        kept = f"the last good state is kept in {self.folder}; " if has_state(self.folder) else ""
        return Diverged(
            f"{self.name} met {what}",
            f"{kept}begin anew with a learning rate below {self.config.lr:g} or with clipping (clip_norm)",
        )


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
