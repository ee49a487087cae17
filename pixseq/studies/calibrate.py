"""Expected training times of a study's cells, from a few steps measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.plan import Cell
from pixseq.config import GridFile
from pixseq.engine.cost import micro_batch_images
from pixseq.engine.image_store import some_images
from pixseq.engine.images import Images
from pixseq.engine.state import TrainState
from pixseq.engine.step import accumulate, share_of_batch
from pixseq.runtime import Machine, placed
from pixseq.stages.pretrain import fresh_model, losses, model_shape
from pixseq.studies import ladder

MOST_SECONDS = 10.0  # that measuring goes on to another shape for


def timed(where: Machine, grid: GridFile, train: Store, cells: Sequence[Cell]) -> list[Cell]:
    """The cells with `seconds`: from FLOP rates of the smallest, middle and largest shape, and between them.

    A shape that this machine's memory does not hold is not built, and taken to run like the largest that it does; where
    it holds none, the cells stay without.
    """
    by_width = {cell.d_model: cell for cell in cells if fits_memory(where, cell)}
    widths = sorted(by_width)
    if not widths:
        return list(cells)
    rates: list[tuple[float, float]] = []
    began = time.monotonic()
    for width in dict.fromkeys((widths[0], widths[len(widths) // 2], widths[-1])):
        if rates and time.monotonic() - began > MOST_SECONDS:
            break  # larger shapes run at about the rate of this one
        rates.append((math.log(width), math.log(flop_rate(where, grid, train, by_width[width]))))
    x, y = np.array(rates).T
    seconds = [cell.flops / math.exp(np.interp(math.log(cell.d_model), x, y)) for cell in cells]
    return [replace(cell, seconds=float(f"{each:.3g}")) for cell, each in zip(cells, seconds)]


def fits_memory(where: Machine, cell: Cell) -> bool:
    return cell.memory_gigabytes <= where.memory_bytes() / 1e9


def flop_rate(where: Machine, grid: GridFile, train: Store, cell: Cell) -> float:
    """FLOPs a second of whole training steps of a cell, by the counting of the study."""
    rows = some_images(train, slice(0, cell.batch_size))
    images = Images(rows, None, train.codec.grid)
    config = ladder.recipe(grid, cell.d_model, 1, len(rows), cell.lr)
    shape = model_shape(config, train)
    model = placed(fresh_model(shape, config, train.codec.grid, images), where)
    run, micro = TrainState(model, config.train, None), micro_batch_images(model, where)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < 1.0):
        began = time.perf_counter()
        accumulate(where, model, model, losses, share_of_batch(where, images, config.train, run.step, model), micro)
        run.update(cell.lr)
        float(next(model.parameters()).detach().flatten()[0])  # by then a GPU has done all of it
        seconds.append(time.perf_counter() - began)
    return len(rows) * shape.n_ctx * shape.flops_per_token(grid.flops) / min(seconds[1:])
