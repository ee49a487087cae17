"""scaling plan: the grid of a study, each cell with its shape, tokens, cost and time (IsoFLOP profiles).

N parameters, D tokens, C training FLOPs, T positions.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.layout import partial_path
from pixseq.artifacts.locking import in_turn, read_owner
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.owning import give_up, own
from pixseq.artifacts.plan import Cell, write_plan
from pixseq.artifacts.targets import check_target
from pixseq.choices import Precision
from pixseq.config import GridFile, StudyData, as_dict, effective
from pixseq.engine.image_store import open_images
from pixseq.errors import PixseqError
from pixseq.models.family import SHAPES
from pixseq.numerics.isoflop import far_off, parabola, power_law
from pixseq.runtime import machine
from pixseq.studies import calibrate, checks, judge, ladder, rates
from pixseq.studies.ranges import check_ranges, probe_layers
from pixseq.studies.study import BEGUN, DONE, WAITING, Result, Study, open_study, stores_of

SPACING = 10**0.5  # of budgets between two ends
FEW_STEPS = 50


def run(
    grid: str | Path,
    out: str | Path,
    recentre: bool = False,
    timed: bool = True,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the plan of a grid file; returns its `cells`, how their FLOPs are counted, the `references` that judge
    completions, and `remarks`.

    `recentre`: instead, move the sizes of budgets not yet begun in the plan `out` to the optimum that the budgets
    below suggest. A plan whose cells have begun is never overwritten.
    """
    config = checked(effective(GridFile, file=grid))
    if recentre:
        return _recentred(grid, config, out)
    with _holding(out, overwrite):
        return _planned(config, out, timed, device, precision)


def _recentred(grid: str | Path, config: GridFile, out: str | Path) -> dict[str, Any]:
    study = open_study(out)
    _check_same(study, config, grid)
    resolutions = dict.fromkeys(cell.resolution for cell in study.cells)
    remarks = [rates.in_words(r, rule) for r in resolutions if (rule := rates.settle(study, r)) is not None]
    changed = [b for r, b in groups(study.measured) if move(study, r, b)]
    remarks.append(f"{len(changed)} budgets were centred anew")
    return _document(study.counting, study.cells, judge.references(study), remarks)


@contextlib.contextmanager
def _holding(out: str | Path, overwrite: bool) -> Iterator[None]:
    """One process at a time plans there. A plan that stands keeps its folder: only its cells are replaced."""
    if not os.path.lexists(out):
        with own(out, overwrite, "scaling plan"):
            yield
        return
    _check_replaceable(out, overwrite)
    with in_turn(Path(out)):
        _check_replaceable(out, overwrite)
        left = read_owner(partial_path(out))
        if left is not None and left["command"] == "scaling plan":
            give_up(out)  # killed when the plan had its name, and before all was tidy
        yield


def _planned(config: GridFile, out: str | Path, timed: bool, device: str, precision: Precision) -> dict[str, Any]:
    config = checks.absolute(config)
    inputs = checks.extractor_inputs(config)
    cells: list[Cell] = []
    references: list[Cell] = []
    remarks: list[str] = []
    with machine(device, precision) as where:
        for i, data in enumerate(config.data):
            stores = _stores(config, data)
            inputs |= {f"{role} {i}": reference(store.path, store.manifest) for role, store in stores.items()}
            checks.check_stores(where, config, stores, remarks)
            planned = _plan_data(config, i, stores["train"], remarks)
            judged = judge.reference_cell(config, i, stores["train"].codec, len(stores["train"]))
            planned += rates.sweep_cells(planned, config)
            both = planned if judged is None else [*planned, judged]
            checks.check_cells(where, config, both, remarks)
            if timed:
                both = calibrate.timed(where, config, stores["train"], both)
            cells += both[: len(planned)]
            references += both[len(planned) :]
    if config.rates.sweep:
        remarks.append("the learning rates of cells are those of the grid until the sweep (ids in -f) is done")
    _check_distinct([cell.id for cell in cells])
    summary: dict[str, Any] = {"cells": len(cells), "flops": sum(cell.flops for cell in cells)}
    if references:
        summary["references"] = [each.to_json() for each in references]
    judge.forget(out)
    write_plan(out, as_dict(config), inputs, cells, summary)
    return _document(config.flops, cells, references, remarks)


def _document(counting: str, cells: Sequence[Cell], references: Sequence[Cell], remarks: list[str]) -> dict[str, Any]:
    both = {"cells": cells, "references": references}
    listed = {name: [cell.to_json() for cell in some] for name, some in both.items()}
    return {"counting": counting, **listed, "remarks": remarks}


# ---- the grid


def checked(grid: GridFile) -> GridFile:
    """The grid with its budgets ascending and spelt out. Raises UsageError for values that plan nothing."""
    check_ranges(grid)
    budgets = sorted(set(grid.budgets))
    if len(budgets) == 2:
        steps = round(math.log(budgets[1] / budgets[0]) / math.log(SPACING))
        budgets = np.geomspace(budgets[0], budgets[1], max(steps, 1) + 1).tolist()
    return replace(grid, budgets=tuple(budgets))


def _stores(grid: GridFile, data: StudyData) -> dict[str, Store]:
    kind = SHAPES[grid.shapes.family].reads
    stores = {role: open_images(path, kind) for role, path in stores_of(data).items()}
    for store in stores.values():
        if store.whole:
            raise PixseqError(
                f"{store.path} holds whole pictures, and a study compares models of one size of them",
                "encode squares: --resize crop",
            )
    return stores


def _check_replaceable(out: str | Path, overwrite: bool) -> None:
    if not overwrite:
        check_target(out, overwrite)
    study = open_study(out)
    begun = [cell.id for cell in study.cells if study.status(cell) != WAITING]
    if begun:
        raise PixseqError(
            f"{out} is a plan of which {len(begun)} cells have begun",
            "plan into another folder, or move the sizes of budgets not yet begun with --recentre",
        )


def _check_same(study: Study, grid: GridFile, path: str | Path) -> None:
    theirs, ours = as_dict(study.grid), as_dict(checks.absolute(grid))
    differing = sorted(key for key in ours if ours[key] != theirs[key])
    if differing:
        raise PixseqError(
            f"{study.path} was planned from another grid than {path} (it differs in: {', '.join(differing)})",
            "plan it into another folder",
        )


def _check_distinct(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        raise PixseqError("two entries of data have the same resolution", "give each resolution once")


# ---- cells


def _plan_data(grid: GridFile, index: int, train: Store, remarks: list[str]) -> list[Cell]:
    rungs = ladder.ladder(grid, train.codec)
    cells = []
    for b, budget in enumerate(grid.budgets):
        middle = ladder.centre(grid, rungs, budget)
        cells += cells_of(grid, index, train.codec, len(train), b, middle)
    resolution = train.codec.height
    repeated = [cell for cell in cells if cell.epochs > grid.most_epochs]
    if repeated:
        most = max(cell.epochs for cell in repeated)
        remarks.append(
            f"at {resolution}x{resolution}, {len(repeated)} of {len(cells)} cells see their data more than "
            f"{grid.most_epochs:g} times (at most {most:.1f}): repeated tokens are worth less than new ones"
        )
    short = [cell for cell in cells if cell.steps < FEW_STEPS]
    if short:
        remarks.append(f"at {resolution}x{resolution}, {len(short)} cells train for fewer than {FEW_STEPS} steps")
    return cells


def cells_of(grid: GridFile, index: int, codec: Codec, images: int, b: int, middle: float) -> list[Cell]:
    """The cells of one budget around a size. Raises PixseqError for a budget that no model can spend."""
    budget, rungs = grid.budgets[b], ladder.ladder(grid, codec)
    one_step = [shape.flops_per_token(grid.flops) * shape.n_ctx * grid.batch.smallest for shape in rungs]
    if budget < one_step[0]:
        raise PixseqError(
            f"a budget of {budget:.3g} FLOPs is below one step of the smallest model ({one_step[0]:.3g})",
            "raise the budget, or lower batch.smallest",
        )
    able = [shape for shape, cost in zip(rungs, one_step) if cost <= budget]
    shapes = ladder.around(grid, able, middle)
    resolution, _, _ = codec.grid
    cells = []
    for s, shape in enumerate(shapes):
        for k in range(grid.seeds):
            name = f"r{resolution}-b{b}-s{s}" + f"-k{k}" * (k > 0)
            cells.append(
                ladder.cell_of(grid, shape, budget, images, id=name, resolution=resolution, data=index, seed=k)
            )
    return cells


# ---- sizes around what the budgets below have found


def groups(cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """(resolution, budget) of the cells, each once, budgets ascending."""
    return list(dict.fromkeys((cell.resolution, cell.budget) for cell in cells))


def move(study: Study, resolution: int, budget: float) -> bool:
    """Centre the cells of a budget anew where none has begun and the budgets below are done. True if they moved."""
    here = [c for c in study.measured if (c.resolution, c.budget) == (resolution, budget)]
    if any(study.status(cell) != WAITING for cell in here):
        return False
    middle = _expected_optimum(study, resolution, budget)
    if middle is None:
        return False
    grid, data = study.grid, here[0].data
    store = open_images(grid.data[data].train, SHAPES[grid.shapes.family].reads)
    index = list(grid.budgets).index(budget)
    cells = cells_of(grid, data, store.codec, len(store), index, middle)
    new = {cell.id: rates.ruled(study, cell) for cell in cells}
    if max(probe_layers(grid) or [0]) > min(cell.n_layer for cell in new.values()):
        return False  # smaller models would lack a layer that is probed
    if all(new[cell.id].d_model == cell.d_model for cell in here):
        return False
    speeds = [cell.flops / cell.seconds for cell in here if cell.seconds]
    for id, cell in new.items():
        seconds = float(f"{cell.flops / np.median(speeds):.3g}") if speeds else None
        new[id] = replace(cell, seconds=seconds)
    study.rewrite([new.get(cell.id, cell) for cell in study.cells])
    return True


def _expected_optimum(study: Study, resolution: int, budget: float) -> float | None:
    """N of the lowest loss at `budget`: the power law through the budgets below, or N ~ C^0.5 from a single one."""
    found = []
    lower = [one for one in study.results() if one.cell.resolution == resolution and one.cell.budget < budget]
    kept = _without_far([one for one in lower if one.status == DONE])
    for below in sorted({one.cell.budget for one in lower}):
        unfinished = any(one.status in (WAITING, BEGUN) for one in lower if one.cell.budget == below)
        done = [one for one in kept if one.cell.budget == below]
        if unfinished or len({one.cell.params for one in done}) < 3:
            continue
        found.append((math.log(below), _lowest(done)))
    if not found:
        return None
    x, y = np.array(found).T
    slope = float(power_law(x, y)[0]) if len(found) > 2 else 0.5
    slope = min(max(slope, 0.2), 0.8)  # three noisy points must not send the next budget away
    return float(np.exp(y.mean() + slope * (math.log(budget) - x.mean())))


def _without_far(done: Sequence[Result]) -> list[Result]:
    """Finished runs without those that lie far off the others of their budget, as a fit leaves them out."""
    if not done:
        return []
    _, index = np.unique([one.cell.budget for one in done], return_inverse=True)
    n, loss = np.log([one.cell.params for one in done]), np.array([one.loss for one in done])
    far, _ = far_off(n, loss, index, np.ones(len(done)))
    return [one for one, out in zip(done, far) if not out]


def _lowest(done: Sequence[Result]) -> float:
    """log N at the vertex of a parabola, kept between the sizes that were run."""
    n, loss = np.log([one.cell.params for one in done]), np.array([one.loss for one in done])
    found = parabola(n, loss)
    best = found.vertex if found.curvature > 0 else n[loss.argmin()]
    return float(np.clip(best, n.min(), n.max()))
