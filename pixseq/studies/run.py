"""scaling run: the cells of a plan, in as many processes as asked for; a cell that dies takes its process alone.

Budgets of a resolution run in ascending order, so that the sizes of each can be centred on what those below found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pixseq import progress
from pixseq.artifacts.fit import METRICS
from pixseq.artifacts.layout import partial_path
from pixseq.artifacts.metrics import read_log
from pixseq.artifacts.plan import Cell
from pixseq.choices import Precision
from pixseq.errors import Interrupted, PixseqError, UsageError
from pixseq.runtime import devices_for
from pixseq.studies import checks, judge, plan, rates, worker
from pixseq.studies.study import DIVERGED, DONE, Study, check_parents, open_study
from pixseq.studies.worker import STOPPED, Worker

POLL_SECONDS = 0.1


def run(
    path: str | Path,
    cell: str | None = None,
    jobs: int = 1,
    budget_limit: float | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    again: bool = False,
) -> dict[str, Any]:
    """Run the cells that are not done, `jobs` at a time, or the one `cell` in this process; returns all `cells`.

    The reference models that judge completions come first; each is also what `cell` may name. With several CUDA
    devices, the jobs go round them.

    Cells of budgets above `budget_limit` FLOPs are left. A diverged cell counts as done, and is recorded as such;
    `again` makes it anew. Raises PixseqError at the end, when all others are done, if cells failed.
    """
    study = open_study(path)
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, it must be at least 1")
    check_parents(study)
    for each in study.cells if again else ():
        if study.status(each) == DIVERGED and cell in (None, each.id):
            study.forget(each)
    if cell is not None:
        from pixseq.studies import cell as one

        one.run_named(study, cell, device, precision)
        return {"counting": study.counting, "cells": [one.to_json() for one in study.results()]}
    failed: dict[str, str] = {}
    queue = _in_order(study, budget_limit, failed)
    workers: list[Worker] = []
    with progress.board(HEAD) as board:
        try:
            _work(study, queue, workers, devices_for(device, jobs), precision, board, failed)
        except BaseException:
            worker.stop(workers)
            raise
        for ended in workers:
            ended.close()
    _raise(failed)
    return {"counting": study.counting, "cells": [one.to_json() for one in study.results()]}


def _raise(failed: Mapping[str, str]) -> None:
    """Raises PixseqError where cells failed, Interrupted where all that did not end were stopped."""
    broken = {id: why for id, why in failed.items() if why != STOPPED}
    if broken:
        id, why = next(iter(broken.items()))
        raise PixseqError(f"{len(broken)} cells failed; {id}: {why}", "mend it and run again: what is done is kept")
    if failed:
        raise Interrupted(
            f"{len(failed)} cells were stopped by a signal of their own, the first {next(iter(failed))}",
            "run it again: what is done is kept, and they go on from there",
        )


def _work(
    study: Study,
    queue: Iterator[Cell | Literal["wait"]],
    workers: list[Worker],
    devices: list[str],
    precision: Precision,
    board: progress.Board,
    failed: dict[str, str],
) -> None:
    """Give the cells of the queue to a worker for each device; `workers` and `failed` are kept up to date."""
    ended = False
    while not ended or any(each.cell for each in workers):
        while not ended and sum(each.cell is not None for each in workers) < len(devices):
            cell = next(queue, None)
            ended = cell is None
            if cell is None or cell == WAIT:
                break
            _idle(study, workers, devices, precision).give(cell)
        for each in [each for each in workers if each.cell]:
            answer = each.answer()
            if answer is None:
                continue
            if answer["error"] is not None and each.cell is not None:
                failed[each.cell.id] = answer["error"]
            board.say(_line(study, each, failed))
            each.cell = None
            if not each.alive:
                workers.remove(each)
                each.close()
        board.show(lambda: _rows(study, workers, failed))
        time.sleep(POLL_SECONDS)


def _idle(study: Study, workers: list[Worker], devices: list[str], precision: Precision) -> Worker:
    """One that waits, or a new one on a device that is free."""
    for each in workers:
        if each.cell is None:
            return each
    free = list(devices)
    for each in workers:
        free.remove(each.device)
    workers.append(Worker.start(study, devices, free[0], precision))
    return workers[-1]


WAIT: Literal["wait"] = "wait"  # no cell is ready before one that runs has ended


def _in_order(study: Study, budget_limit: float | None, failed: Mapping[str, str]) -> Iterator[Cell | Literal["wait"]]:
    """Cells to start, one a call; WAIT where the next budget waits for the one below it.

    A reference comes before the cells that it judges, and after the sweep that its learning rate is from.
    """
    needed: list[int] = []  # resolutions
    for reference in judge.references(study):
        here = [c for c in study.measured if c.resolution == reference.resolution]
        here = [c for c in here if budget_limit is None or c.budget <= budget_limit]
        if any(study.status(c) not in (DONE, DIVERGED) for c in here) and not judge.is_ready(study, reference):
            needed.append(reference.resolution)
    chains: dict[int, list[float]] = {}
    for resolution, budget in plan.groups(study.measured):
        if budget_limit is None or budget <= budget_limit:
            chains.setdefault(resolution, []).append(budget)
    started: set[str] = set()
    while any(chains.values()):
        now = next((r for r in needed if not rates.waits_for_sweep(study, r)), None)
        if now is not None:
            needed.remove(now)
            yield next(each for each in judge.references(study) if each.resolution == now)
            continue
        found = None
        for resolution, budgets in chains.items():
            found = found or _next(study, resolution, budgets, started, failed)
        if found is not None:
            started.add(found.id)
        if found is not None or any(chains.values()):
            yield WAIT if found is None else found


def _next(
    study: Study, resolution: int, budgets: list[float], started: set[str], failed: Mapping[str, str]
) -> Cell | None:
    """The next cell of a resolution, None where it waits or is through; what is through leaves `budgets`.

    A sweep of learning rates comes first.
    """
    if budgets and rates.waits_for_sweep(study, resolution):
        sweep = _open(study, rates.sweep_of(study, resolution), failed)
        if sweep:
            return next((cell for cell in sweep if cell.id not in started), None)
        rule = rates.settle(study, resolution)
        if rule is None:  # cells of its sweep failed
            budgets.clear()
        else:
            progress.say(rates.in_words(resolution, rule))
            return None  # a reference may now begin, before them
    while budgets:
        if study.grid.recentre and plan.move(study, resolution, budgets[0]):
            progress.say(f"r{resolution}: sizes at {budgets[0]:.3g} FLOPs centred anew")
        here = [c for c in study.measured if (c.resolution, c.budget) == (resolution, budgets[0])]
        open_ = _open(study, here, failed)
        found = next((cell for cell in open_ if cell.id not in started), None)
        if found is not None or (open_ and study.grid.recentre):  # or its last cells still run
            return found
        budgets.pop(0)
    return None


def _open(study: Study, cells: Sequence[Cell], failed: Mapping[str, str]) -> list[Cell]:
    return [cell for cell in cells if study.status(cell) not in (DONE, DIVERGED) and cell.id not in failed]


# ---- what is shown

HEAD = ("cell", "parameters", "tokens", "state", *METRICS)


def _rows(study: Study, workers: list[Worker], failed: Mapping[str, str]) -> list[tuple[str, ...]]:
    states = {each.cell.id: _state(study, each.cell) for each in workers if each.cell}
    states |= {id: "stopped" if why == STOPPED else "failed" for id, why in failed.items()}
    results = study.results()
    rows = [
        (id, f"{each.cell.params:,}", f"{each.cell.tokens:,}", states[id], *[""] * len(METRICS))
        for each in workers
        if each.cell and (id := each.cell.id) not in {one.cell.id for one in results}
    ]  # references and a sweep, which are no results
    for one in results:
        figures = ("" if value is None else f"{value:.4g}" for value in one.metrics.values())
        cell, state = one.cell, states.get(one.cell.id, one.status)
        rows.append((cell.id, f"{cell.params:,}", f"{cell.tokens:,}", state, *figures))
    return rows


def _state(study: Study, cell: Cell) -> str:
    """How far a running cell is: its step, or what follows training."""
    folder = judge.folder_of(study, cell) if checks.is_reference(cell) else study.folder(cell)
    if (folder / "model").exists():
        return "measured"
    log = partial_path(folder / "model") / "log.jsonl"
    rows = read_log(log) if log.is_file() else []
    return f"{rows[-1]['step']}/{cell.steps}" if rows else "starts"


def _line(study: Study, done: Worker, failed: Mapping[str, str]) -> str:
    assert done.cell is not None
    id, seconds = done.cell.id, progress.clock(time.monotonic() - done.began)
    if failed.get(id) == STOPPED:
        return f"{id}: stopped after {seconds}"
    if id in failed:
        return f"{id}: failed after {seconds}: {failed[id]}"
    found = next((one for one in study.results() if one.cell.id == id), None)
    if found is None:
        return f"{id}: done in {seconds}"
    if found.status == DIVERGED:
        return f"{id}: diverged after {seconds}: {found.reason}"
    figures = ", ".join(f"{key} {value:.4g}" for key, value in found.metrics.items() if value is not None)
    return f"{id}: done in {seconds}, {figures}"
