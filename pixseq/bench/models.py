"""pretrain, features and sample: a step, a forward pass over a batch and a batch of pictures, as the stages do them.

Weights and tokens are drawn: speed does not depend on them. B images, T positions, D width, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts.metrics import Log
from pixseq.bench import drawn, peers
from pixseq.bench.settings import US, Bench, Product, Task, Work
from pixseq.engine.images import Images
from pixseq.engine.masks import mask_count
from pixseq.engine.state import TrainState
from pixseq.engine.stopping import Stopping
from pixseq.engine.training import Limits, Training
from pixseq.errors import UsageError
from pixseq.models.family import Model
from pixseq.runtime import Machine, placed
from pixseq.stages import features as extraction
from pixseq.stages import sample as drawing
from pixseq.stages.pretrain import fresh_model, losses

COUNTING = "exact-causal"  # of operations: what kernels compute
BATCHES = 4  # that a training set has


def pretrain(bench: Bench) -> Task:
    """A training step: its batch, gradients of all micro-batches, and the update."""
    s, shape = bench.settings, bench.settings.shape()

    def ours(where: Machine) -> Callable[[], None]:
        images = _images(bench, BATCHES * s.batch_size)
        run = TrainState(_model(bench, where, images), s.config().train, None)
        limits = Limits(compile=where.device.type == "cuda")  # as the peers are, and as long runs
        training = Training(where, run, images, losses, bench.scratch, limits)
        stop, log = Undisturbed("bench", where, lambda: None), Unwritten()
        bar = progress.Bar("bench", None, "steps")
        return partial(training.step, log, stop, bar)

    ways = {US: ours, "transformers": peers.transformers_step(bench), "nanogpt": peers.nanogpt_step(bench)}
    about = f"a step of {s.batch_size} images of {shape.n_ctx} positions, {_named(bench)}"
    positions = s.batch_size * shape.n_ctx
    return _task(bench, about, positions, "tokens", positions, positions * shape.flops_per_token(COUNTING), ways)


class Unwritten(Log):
    """Of steps that are timed: no file."""

    def __init__(self) -> None: ...

    def write(self, row: Mapping[str, Any]) -> None: ...


class Undisturbed(Stopping):
    """Of steps that are timed: nothing of them is saved."""

    @contextlib.contextmanager
    def may_be_cut(self) -> Iterator[None]:
        yield


def features(bench: Bench) -> Task:
    """All layers of a batch, averaged over positions and brought to the host."""
    s, shape = bench.settings, bench.settings.shape()

    def ours(where: Machine) -> Callable[[], None]:
        images = _images(bench, s.batch_size)
        net, layers = _model(bench, where, images).eval(), list(range(shape.n_layer + 1))
        net.freeze(where.dtype)
        net.attention = shape.attention_patterns[0]
        masks = mask_count(shape, None)
        compute = extraction.activations(where, net, layers, masks, s.seed, pooled=True, first_position=0)
        rows = images.rows
        assert isinstance(rows, np.ndarray)

        def call() -> None:
            with torch.inference_mode():
                compute(rows, 0)

        return call

    positions = s.batch_size * mask_count(shape, None) * shape.n_ctx
    about = f"all layers of {s.batch_size} images of {shape.n_ctx} positions, {_named(bench)}"
    demand = positions * shape.flops_per_token(COUNTING) / 3
    ways = {US: ours, "transformers": peers.transformers_features(bench)}
    return _task(bench, about, s.batch_size, "images", positions, demand, ways)


def sample(bench: Bench) -> Task:
    """Pictures from nothing, pixel by pixel. Raises UsageError for models that draw none."""
    s, shape = bench.settings, bench.settings.shape()
    if not shape.can_sample:
        raise UsageError(f"a {shape.family} model of objective {shape.objective} draws no pictures", "leave sample out")

    def ours(where: Machine) -> Callable[[], None]:
        net = _model(bench, where, _images(bench, s.batch_size)).eval()
        starts = np.zeros((s.batch_size, 0), np.uint16)
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

        def call() -> None:
            drawing.draw_pictures(where, net, starts, s.seed, s.batch_size, settings, 1)

        return call

    positions = s.batch_size * shape.n_ctx
    about = f"{s.batch_size} pictures of {shape.n_ctx} positions at once, {_named(bench)}"
    demand = positions * shape.flops_per_token(COUNTING) / 3
    ways = {US: ours, "transformers": peers.transformers_sample(bench)}
    return _task(bench, about, positions, "tokens", s.batch_size, demand, ways)


def _task(
    bench: Bench,
    about: str,
    amount: int,
    unit: str,
    rows: int,
    demand: float,
    ways: dict[str, Callable[[Machine], Callable[[], None]]],
) -> Task:
    """`ways`: by name, what makes the call on a machine of one of the precisions. `rows` a matrix product has."""
    shape = bench.settings.shape()
    works = []
    for precision in bench.precisions:
        where = replace(bench.where, precision=precision)
        for by, prepare in ways.items():
            if by in (US, *bench.peers):
                works.append(Work(by, precision, partial(prepare, where)))
    ceiling = Product(rows, shape.d_model, 4 * shape.d_model, shape.n_layer)
    return Task(about, amount, unit, ceiling, demand, tuple(works))


def _images(bench: Bench, count: int) -> Images:
    s, codec = bench.settings, bench.settings.codec()
    if codec.n_vocab is None:
        return Images(drawn.pictures(count, s.size, s.seed), None, codec.grid)
    return Images(drawn.tokens(count, math.prod(codec.grid), codec.n_vocab, s.seed), None, codec.grid)


def _model(bench: Bench, where: Machine, images: Images) -> Model:
    s = bench.settings
    return placed(fresh_model(s.shape(), s.config(), images.grid, images), where)


def _named(bench: Bench) -> str:
    shape = bench.settings.shape()
    return f"{shape.n_layer} layers of width {shape.d_model} with {shape.n_head} heads"
