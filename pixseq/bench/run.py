"""bench: stages timed beside their peers in turns, with the ceilings of this machine measured in the same process."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pixseq import progress
from pixseq.artifacts.owning import owns
from pixseq.artifacts.targets import check_apart, check_target
from pixseq.bench import alone, ceilings, colours, models, peers, probing, reading, rounds
from pixseq.bench.settings import US, Bench, Copy, Settings, Task, Work
from pixseq.errors import UsageError
from pixseq.runtime import machine
from pixseq.runtime.rates import peak_rate

TASKS: dict[str, Callable[[Bench], Task]] = {
    "palette": colours.palette,
    "encode": colours.encode,
    "read": reading.read,
    "pretrain": models.pretrain,
    "features": models.features,
    "probe": probing.probe,
    "sample": models.sample,
}
ROUNDS, SECONDS = 7, 30.0

Row = dict[str, Any]


@owns("bench", "out")
def run(
    stages: Sequence[str] = (),
    peer: Sequence[str] = (),
    settings: Settings | None = None,
    most_rounds: int = ROUNDS,
    seconds: float = SECONDS,
    memory: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The figures of `stages` (none: all that the model has) and of peers (see peers.chosen) as a mapping, written to
    `out` as metrics where that is given.

    Of each stage at most `most_rounds` rounds are timed, and none begins after `seconds`. `memory` measures each row's
    peak too, in a process of its own.

    Raises UsageError and PixseqError for stages, peers and settings that cannot be.
    """
    settings = settings or Settings()
    stages = chosen_stages(stages, settings)
    if out is not None:
        check_apart([out], [settings.nanogpt])
        check_target(out, overwrite)
    with opened(settings, peers.chosen(peer, stages, settings)) as bench:
        numbers: dict[str, Any] = {"machine": ceilings.described(bench.where), "settings": asdict(settings)}
        numbers["stages"] = []
        for stage in stages:
            task = TASKS[stage](bench)
            progress.say(f"bench {stage}: {task.about}")
            with hushed():
                found = timed(bench, task, most_rounds, seconds)
            for name in found["left_out"]:
                progress.warn(f"{stage}: there is not the memory for {name}, which is left out")
            if memory:
                ceilings.release(bench.where)
                for row in found["rows"]:
                    row["peak_bytes"] = alone.measured(settings, stage, row["by"], row["precision"])["peak_bytes"]
            numbers["stages"].append({"stage": stage, **found})
    spreads = {_name(each["stage"], row): row["spread"] for each in numbers["stages"] for row in each["rows"]}
    return concluded(numbers, spreads, out, overwrite)


def chosen_stages(stages: Sequence[str], settings: Settings) -> list[str]:
    """Each once; of none, all that there are for the model. Raises UsageError for one that is none."""
    for stage in stages:
        if stage not in TASKS:
            raise UsageError(f"{stage} is no stage that bench times", f"choose among {', '.join(TASKS)}")
    return list(dict.fromkeys(stages)) or [name for name in TASKS if name != "sample" or settings.shape().can_sample]


def concluded(
    numbers: dict[str, Any], spreads: dict[str, float], out: str | Path | None, overwrite: bool
) -> dict[str, Any]:
    """`numbers` with whether the machine was calm, by the spreads of their rows; written where that is asked for."""
    numbers["unrest"] = rounds.unrest(numbers["machine"]["load"], numbers["machine"]["cores"], spreads)
    numbers["calm"] = not numbers["unrest"]
    for reason in numbers["unrest"]:
        progress.warn(f"the machine is not calm: {reason}")
    if out is not None:
        from pixseq.artifacts.metrics import write_metrics

        write_metrics(out, "bench", numbers["settings"], {}, numbers, overwrite)
    return numbers


@contextlib.contextmanager
def opened(settings: Settings, beside: tuple[str, ...]) -> Iterator[Bench]:
    """The settings on this machine. Precision auto is fp32 and what auto takes here."""
    with ceilings.limited(settings.threads), machine(settings.device, settings.precision) as where:
        precisions = dict.fromkeys(["fp32", where.precision] if settings.precision == "auto" else [where.precision])
        with tempfile.TemporaryDirectory(prefix="pixseq-bench-") as scratch:
            yield Bench(settings, where, tuple(precisions), beside, Path(scratch))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Stages do not talk inside."""
    talked = progress.enabled()
    progress.enable(False)
    try:
        yield
    finally:
        progress.enable(talked)


def timed(bench: Bench, task: Task, most_rounds: int, seconds: float) -> dict[str, Any]:
    """The rows of a task, one a work, and the ceilings of the precisions in them. `mfu` is the part of what its maker
    says that the card can do, None where that is not known. `left_out`: peers that the device has no memory for.
    """
    settle = ceilings.settle(bench.where)
    begun, left_out = _called_once(bench, task)
    works, calls, results = zip(*begun)
    task = replace(task, works=works)
    settle()
    times = rounds.interleaved(calls, most_rounds, seconds, settle)
    limits = {
        precision: ceilings.rate(task.ceiling, bench.where, precision)
        for precision in dict.fromkeys(work.precision or "fp32" for work in task.works)
    }
    copy = isinstance(task.ceiling, Copy)
    rows = [
        {"by": work.by, "precision": work.precision, **figures, "result": result}
        for work, figures, result in zip(task.works, compared(task, times, limits, bench.where.precision), results)
    ]
    for row in rows:
        peak = None if copy else peak_rate(replace(bench.where, precision=row["precision"] or "fp32"))
        row["mfu"] = None if peak is None else task.demand / row["median_seconds"] / peak
    tops = [
        {
            "ceiling": str(task.ceiling),
            "precision": None if copy else precision,
            "rate": rate,
            "unit": "bytes/s" if copy else "FLOP/s",
        }
        for precision, rate in limits.items()
    ]
    return {"about": task.about, "unit": f"{task.unit}/s", "ceilings": tops, "rows": rows, "left_out": left_out}


Begun = tuple[Work, Callable[[], str | None], str | None]  # a work, its call, and the result of a first one


def _called_once(bench: Bench, task: Task) -> tuple[list[Begun], list[str]]:
    """The works of a task, warmed up, and the names of peers that the device has no memory for."""

    def begun(work: Work) -> Begun:
        call = work.prepare()
        return work, call, call()

    found, left_out = [], []
    for work in task.works:
        try:
            found.append(begun(work))
        except torch.OutOfMemoryError:
            if work.by == US:
                raise
            left_out.append(" in ".join([work.by, *([work.precision] if work.precision else [])]))
        ceilings.release(bench.where)
    return found, left_out


def compared(task: Task, times: Sequence[Sequence[float]], limits: dict[str, float], auto: str) -> list[Row]:
    """The figures of each work: `ratio` to our time in the same precision, `ratio_to_auto` to ours as it runs where
    nothing is chosen. None where we have no such row.
    """
    ours = {work.precision: taken for work, taken in zip(task.works, times) if work.by == US}
    rows = []
    for work, taken in zip(task.works, times):
        median, same = statistics.median(taken), ours.get(work.precision)
        usual = ours.get(auto, ours.get(None))
        rows.append(
            {
                "rounds": len(taken),
                "median_seconds": median,
                "spread": rounds.spread(taken),
                "rate": task.amount / median,
                "ratio": None if same is None else rounds.ratio(taken, same),
                "ratio_to_auto": None if usual is None else rounds.ratio(taken, usual),
                "share_of_ceiling": task.demand / median / limits[work.precision or "fp32"],
            }
        )
    return rows


def _name(stage: str, row: Row) -> str:
    return " ".join([stage, row["by"], *([row["precision"]] if row["precision"] else [])])
