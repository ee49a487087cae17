"""What training costs, told before it begins: the time it takes, and how many images fit into memory at once."""

from __future__ import annotations

import math
import time
from importlib.util import find_spec
from pathlib import Path

from pixseq import progress
from pixseq.artifacts.layout import is_partial
from pixseq.config import TrainConfig
from pixseq.engine.state import TrainState
from pixseq.models.family import Model, Shape
from pixseq.runtime import Machine
from pixseq.runtime.rates import matrix_rate, peak_rate

COMPILING_PAYS = 5e16  # training operations: some minutes of the fastest card
LAYER_SECONDS = 1e-3  # forward and backward through one layer of almost nothing
WITHOUT_GRADIENTS = 2  # so many times the images of a micro-batch fit where nothing is learnt


def announce(name: str, machine: Machine, run: TrainState, images: int, micro: int, folder: Path) -> None:
    """Say what is trained, at what cost and where to, before a first step that may take minutes."""
    if not progress.enabled():
        return  # the estimate takes a moment
    config, shape = run.config, run.model.shape
    epochs = config.steps * config.batch_size / images
    seconds = expected_seconds(machine, shape, config, config.steps - run.step, micro)
    target = f"; it will be {folder.with_suffix('')}" if is_partial(folder) else ""  # not so a part of a larger run
    progress.say(
        f"{name}: {shape.family} of {shape.n_layer} layers of width {shape.d_model}, {shape.parameter_count():,} "
        f"parameters, on {images:,} image{'s' * (images != 1)} of {shape.n_ctx:,} positions"
    )
    progress.say(
        f"{name}: {config.steps:,} steps of {config.batch_size} images ({epochs:.3g} epochs) on {machine.device} in "
        f"{machine.precision}, about {progress.clock(seconds)}, as far as can be told before{target}"
    )
    progress.say(f"{name}: step {run.step} has begun; until the end, {folder} holds what --resume goes on from")


def worth_compiling(machine: Machine, shape: Shape, config: TrainConfig) -> bool:
    """Whether torch.compile, which takes a minute or so, pays: on CUDA where there is Triton, of a run that takes some
    minutes without. Not on a CPU, where it gains nothing in float32 and loses a fifth in bf16 against the gradients
    of models/branches.py.
    """
    if machine.device.type != "cuda" or find_spec("triton") is None:
        return False
    return config.steps * config.batch_size * shape.n_ctx * shape.flops_per_token() >= COMPILING_PAYS


class Pace:
    """How much of what a card can do training uses, from one row of the log to the next; nothing where its peak is not
    known. Operations are counted as `exact` does (see models/flops.py), those of an update or of masks not at all.
    """

    def __init__(self, machine: Machine, shape: Shape, config: TrainConfig):
        peak = peak_rate(machine)
        images = config.batch_size / machine.world
        self.least = None if peak is None else images * shape.n_ctx * shape.flops_per_token() / peak  # seconds a step
        self.began: tuple[int, float] | None = None

    def begin(self, step: int) -> None:
        """So many steps are done, and what follows is training."""
        self.began = step, time.monotonic()

    def mfu(self, step: int) -> dict[str, float]:
        """Since it began; not where that was this very step."""
        if self.least is None or self.began is None or self.began[0] == step:
            return {}
        steps, seconds = step - self.began[0], time.monotonic() - self.began[1]
        return {"mfu": round(self.least * steps / seconds, 4)}


def expected_seconds(machine: Machine, shape: Shape, config: TrainConfig, steps: int, micro: int) -> float:
    """Roughly: floating point operations over 40 % of the matrix rate, measured for a moment, and what small models
    spend most of their time on, the overhead of a layer whatever its size.
    """
    images = config.batch_size / machine.world
    computing = images * shape.n_ctx * shape.flops_per_token() / (0.4 * matrix_rate(machine))
    return steps * (computing + math.ceil(images / micro) * LAYER_SECONDS * (shape.n_layer + 1))


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


def alike(images: int, most: int) -> int:
    """Parts of at most `most` images, all of one size where that does not make twice as many: what is compiled is
    compiled for one size.
    """
    parts = math.ceil(images / most)
    return math.ceil(images / next((n for n in range(parts, 2 * parts) if images % n == 0), parts))
