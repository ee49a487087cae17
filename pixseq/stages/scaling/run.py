"""scaling run: the cells of a plan, a process each, so that a cell that dies takes nothing with it.

Budgets of a resolution run in ascending order, so that the sizes of each can be centred on what those below found.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pixseq import progress
from pixseq.artifacts.metrics import read_log
from pixseq.artifacts.plan import Cell
from pixseq.errors import PixseqError, UsageError
from pixseq.stages.scaling import plan
from pixseq.stages.scaling.study import DIVERGED, DONE, METRICS, Study, check_parents, open_study

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for cells to save their state when the run is stopped


def run(
    path: str | Path,
    cell: str | None = None,
    jobs: int = 1,
    budget_limit: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    again: bool = False,
) -> dict[str, Any]:
    """Run the cells that are not done, `jobs` at a time, or the one `cell` in this process; returns all `cells`.

    Cells of budgets above `budget_limit` FLOPs are left. A diverged cell counts as done, and is recorded as such;
    `again` makes it anew. Raises PixseqError at the end, when all others are done, if cells failed.
    """
    study = open_study(path)
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, it must be at least 1")
    check_parents(study)
    for each in study.cells if again else ():
        if study.status(each) == DIVERGED and cell in (None, each["id"]):
            shutil.rmtree(study.folder(each))
    if cell is not None:
        from pixseq.stages.scaling import cell as one

        one.run(study, study.cell(cell), device, precision)
        return {"counting": study.counting, "cells": study.results()}
    failed: dict[str, str] = {}
    queue = _in_order(study, budget_limit, failed)
    running: list[Job] = []
    with progress.board(HEAD) as board:
        try:
            ended = False
            while not ended or running:
                while not ended and len(running) < jobs:
                    next_cell = next(queue, None)
                    ended = next_cell is None
                    if next_cell is WAIT or ended:
                        break
                    running.append(Job.start(study, next_cell, jobs, device, precision))
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    failed.update(job.failure())
                    board.say(_line(study, job, failed))
                board.show(lambda: _rows(study, running, failed))
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(running)
            raise
    if failed:
        id, why = next(iter(failed.items()))
        raise PixseqError(f"{len(failed)} cells failed; {id}: {why}", "mend it and run again: what is done is kept")
    return {"counting": study.counting, "cells": study.results()}


WAIT: Cell = {}  # no cell is ready before one that runs has ended


def _in_order(study: Study, budget_limit: float | None, failed: Mapping[str, str]) -> Iterator[Cell]:
    """Cells to start, one a call; WAIT where the next budget waits for the one below it."""
    chains = {r: [b for q, b in plan.groups(study.cells) if q == r] for r, _ in plan.groups(study.cells)}
    started: set[str] = set()
    while any(chains.values()):
        found = None
        for resolution, budgets in chains.items():
            while budgets and found is None:
                if budget_limit is not None and budgets[0] > budget_limit:
                    budgets.clear()
                    break
                if study.grid.recentre and plan.move(study, resolution, budgets[0]):
                    progress.say(f"r{resolution}: sizes at {budgets[0]:.3g} FLOPs centred anew")
                here = [c for c in study.cells if (c["resolution"], c["budget"]) == (resolution, budgets[0])]
                open_ = [c for c in here if study.status(c) not in (DONE, DIVERGED) and c["id"] not in failed]
                found = next((c for c in open_ if c["id"] not in started), None)
                if found is None and open_ and study.grid.recentre:
                    break  # its last cells still run
                if found is None:
                    budgets.pop(0)
        if found is not None:
            started.add(found["id"])
        if found is not None or any(chains.values()):
            yield found or WAIT


@dataclass
class Job:
    """A cell that runs in a process of its own."""

    cell: Cell
    process: subprocess.Popen
    errors: IO[str]
    began: float

    @classmethod
    def start(cls, study: Study, cell: Cell, jobs: int, device: str, precision: str) -> Job:
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process outlives this function)
        command = [sys.executable, "-m", "pixseq", "scaling", "run", str(study.path), "--cell", cell["id"], "--quiet"]
        command += ["--device", device, "--precision", precision]
        threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // jobs, 1))}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **threads},
            start_new_session=True,  # a Ctrl-C reaches this process alone, which then stops the cells in order
        )
        return cls(cell, process, errors, time.monotonic())

    def failure(self) -> dict[str, str]:
        """{id: the error line} where the process, which has ended, failed."""
        with self.errors:
            self.errors.seek(0)
            lines = [line[7:] for line in self.errors.read().splitlines() if line.startswith("error: ")]
        if self.process.returncode == 0:
            return {}
        return {self.cell["id"]: lines[-1] if lines else f"its process ended with {self.process.returncode}"}


def _stop(running: list[Job]) -> None:
    """Let every cell save its state and end."""
    for job in running:
        job.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for job in running:
        try:
            job.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            job.process.kill()
        job.errors.close()


# ---- what is shown

HEAD = ("cell", "parameters", "tokens", "state", *METRICS)


def _rows(study: Study, running: list[Job], failed: Mapping[str, str]) -> list[tuple[str, ...]]:
    states = {job.cell["id"]: _state(study, job) for job in running} | dict.fromkeys(failed, "failed")
    rows = []
    for row in study.results():
        figures = ("" if row[key] is None else f"{row[key]:.4g}" for key in METRICS)
        state = states.get(row["id"], row["status"])
        rows.append((row["id"], f"{row['params']:,}", f"{row['tokens']:,}", state, *figures))
    return rows


def _state(study: Study, job: Job) -> str:
    """How far a running cell is: its step, or what follows training."""
    folder = study.folder(job.cell)
    if (folder / "model").exists():
        return "measured"
    log = folder / "model.partial" / "log.jsonl"
    rows = read_log(log) if log.is_file() else []
    return f"{rows[-1]['step']}/{job.cell['steps']}" if rows else "starts"


def _line(study: Study, job: Job, failed: Mapping[str, str]) -> str:
    id, seconds = job.cell["id"], progress.clock(time.monotonic() - job.began)
    if id in failed:
        return f"{id}: failed after {seconds}: {failed[id]}"
    row = next(row for row in study.results() if row["id"] == id)
    if row["status"] == DIVERGED:
        return f"{id}: diverged after {seconds}: {row['reason']}"
    figures = ", ".join(f"{key} {row[key]:.4g}" for key in METRICS if row[key] is not None)
    return f"{id}: done in {seconds}, {figures}"
