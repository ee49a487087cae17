"""The family of shapes of a scaling study: a ladder of widths, each with its depth and heads.

N parameters, D tokens, C training FLOPs, T positions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from pixseq.artifacts.codec import Codec
from pixseq.artifacts.plan import Cell
from pixseq.config import AimConfig, GridFile, ModelConfig, PretrainFile, as_dict, check
from pixseq.errors import PixseqError
from pixseq.models.family import SHAPES, Shape
from pixseq.numerics.orders import RASTER

MOST_WIDTH = 8192
HEAD_WIDTH = 32  # of a head at least; wide models have heads of 64, as published


def widths() -> list[int]:
    """Multiples of 8, then of 16, 32 and 64, so that neighbours differ by a fifth or less from 40 on."""
    steps = [(16, 64, 8), (64, 128, 16), (128, 512, 32), (512, MOST_WIDTH + 64, 64)]
    return list(itertools.chain.from_iterable(range(*step) for step in steps))


def model_config(grid: GridFile, d_model: int) -> ModelConfig | AimConfig:
    """The model of one width."""
    shapes = grid.shapes
    n_layer = max(round(d_model / shapes.aspect_ratio), shapes.min_layers)
    if shapes.family == "igpt":
        return ModelConfig(n_layer, heads(d_model), d_model)
    return AimConfig(
        n_layer=n_layer,
        n_head=heads(d_model),
        d_model=d_model,
        patch_size=shapes.patch_size,
        head_depth=shapes.head_depth,
        head_width=d_model,
    )


def heads(d_model: int) -> int:
    """As many heads of 32 numbers or more (64 from a width of 512 on) as divide the width."""
    least = HEAD_WIDTH if d_model < 512 else 2 * HEAD_WIDTH
    return max((n for n in range(1, d_model // least + 1) if d_model % n == 0), default=1)


def ladder(grid: GridFile, codec: Codec) -> list[Shape]:
    """Every shape of the family on pictures of `codec`, the smallest first."""
    kind = SHAPES[grid.shapes.family]
    return [kind.of(as_dict(model_config(grid, d)), codec.grid, codec.n_vocab, RASTER) for d in widths()]


def size(grid: GridFile, shape: Shape) -> int:
    """N as the study counts it."""
    return shape.trunk_count() if grid.params == "total" else shape.block_count()


def centre(grid: GridFile, rungs: list[Shape], budget: float) -> float:
    """N at which a budget gives `tokens_per_param` tokens a parameter, in between the rungs."""
    n = np.array([size(grid, shape) for shape in rungs], float)
    ratio = budget / np.array([shape.flops_per_token(grid.flops) for shape in rungs]) / n  # falls with N
    log = np.interp(-math.log(grid.tokens_per_param), -np.log(ratio), np.log(n))
    return float(np.exp(log))


def around(grid: GridFile, rungs: list[Shape], middle: float) -> list[Shape]:
    """`sizes_per_budget` different shapes, evenly spaced in log N over `size_range` times `middle` to both sides.

    Raises PixseqError where the ladder is too short for that.
    """
    count = grid.sizes_per_budget
    if len(rungs) < count:
        raise PixseqError(f"the ladder has {len(rungs)} shapes, {count} are asked for", "ask for fewer sizes")
    wanted = math.log(middle) + np.linspace(-1, 1, count) * math.log(grid.size_range)
    have = np.log([size(grid, shape) for shape in rungs])
    chosen: list[int] = []
    for i, target in enumerate(wanted):  # ascending: each takes the nearest rung that leaves room for the others
        low = chosen[-1] + 1 if chosen else 0
        free = have[low : len(have) - (count - 1 - i)]
        chosen.append(low + int(np.argmin(np.abs(free - target))))
    return [rungs[i] for i in chosen]


def recipe(grid: GridFile, d_model: int, steps: int, batch_size: int, lr: float, seed: int = 0) -> PretrainFile:
    """What `pretrain` gets for a cell; `seed` is above that of the grid."""
    train = replace(grid.train, steps=steps, batch_size=batch_size, lr=lr, seed=grid.train.seed + seed)
    return PretrainFile(model=model_config(grid, d_model), train=train)


def recipe_of(grid: GridFile, cell: Cell) -> PretrainFile:
    """Raises UsageError for a cell of numbers that no run can use: plans come from others too."""
    config = recipe(grid, cell.d_model, cell.steps, cell.batch_size, cell.lr, cell.seed)
    check(config)
    return config


def batch_of(grid: GridFile, images: float) -> int:
    """Images a step of a run that sees so many."""
    power = 2 ** round(math.log2(max(images / grid.batch.steps, 1)))
    return int(min(max(power, grid.batch.smallest), grid.batch.largest))


def rate_of(grid: GridFile, shape: Shape) -> float:
    return grid.train.lr * (shape.d_model / grid.rates.width) ** -grid.rates.exponent


def cell_of(
    grid: GridFile, shape: Shape, budget: float, images: int, *, id: str, resolution: int, data: int, seed: int
) -> Cell:
    """A cell of one shape and budget: its recipe, its cost and how often it sees each of `images` images."""
    flops = shape.flops_per_token(grid.flops)
    seen = budget / flops / shape.n_ctx  # images
    batch = batch_of(grid, seen)
    steps = max(round(seen / batch), 1)
    tokens = steps * batch * shape.n_ctx
    return Cell(
        id=id,
        resolution=resolution,
        budget=budget,
        data=data,
        seed=seed,
        n_layer=shape.n_layer,
        d_model=shape.d_model,
        n_head=shape.n_head,
        params=size(grid, shape),
        tokens=tokens,
        steps=steps,
        batch_size=batch,
        lr=float(f"{rate_of(grid, shape):.4g}"),
        flops=tokens * flops,
        epochs=round(steps * batch / images, 3),
        memory_gigabytes=round((16 * shape.parameter_count() + shape.activation_bytes(4)) / 1e9, 3),
    )
