"""scaling plan, run, fit, compare and forecast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import cell_text, emit, table, talk, to_json
from pixseq.errors import UsageError
from pixseq.progress import clock
from pixseq.text import one_line

Plan = Annotated[
    Path, typer.Argument(metavar="PLAN", help="What `scaling plan` made.", show_default=False, callback=o.artifact)
]
Fit = Annotated[Path, typer.Argument(metavar="FIT", help="What `scaling fit` made.", show_default=False)]
Method = Annotated[choices.FitMethod, typer.Option("--method", help="Which of the three fits.")]


def _grid(path: Path) -> Path:
    """One that is not there is told before torch is imported."""
    from pixseq.presets import read_yaml

    if not path.exists():
        read_yaml(path)
    return path


def plan(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML of the grid.", show_default=False, callback=_grid)],
    out: o.Out,
    recentre: Annotated[
        bool, typer.Option("--recentre", help="Move the sizes of budgets not yet begun in the plan at --out.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Measure some steps to expect times.")
    ] = True,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Lay out a study: sizes at each budget of compute, and costs.

    The smallest grid: data: {train: t.zarr, val: v.zarr}, budgets: [1.0e+12, 1.0e+14], sizes_per_budget: 5
    """
    talk(quiet, f"scaling plan: {grid}")
    from pixseq.studies import plan

    planned = plan.run(
        grid, out=out, recentre=recentre, timed=calibrate, device=device, precision=precision, overwrite=overwrite
    )
    if json:
        emit(to_json(planned))
        return
    head = (
        *("id", "n_layer", "d_model", "n_head", "params", "tokens", "steps", "batch_size", "lr", "flops"),
        *("epochs", "seconds", "memory_gigabytes"),
    )
    every = planned["references"] + planned["cells"]
    lines = [table(head, [_in_short(cell, head) for cell in every])]
    counting = planned["counting"]
    lines += [_cost(f"{len(planned['cells'])} cells", planned["cells"], counting)]
    if planned["references"]:
        count = len(planned["references"])
        name = f"{count} reference model{'s' * (count != 1)} for completions"
        lines += [_cost(name, planned["references"], counting)]
    emit("\n\n".join([*lines, *planned["remarks"]]))


def _in_short(cell: dict[str, Any], head: Sequence[str]) -> list[Any]:
    """A row of a table; FLOPs by their first digits."""
    return [float(cell[key]) if key == "flops" and cell[key] is not None else cell[key] for key in head]


def _cost(name: str, cells: list[dict[str, Any]], counting: str) -> str:
    known = [cell["seconds"] for cell in cells if cell["seconds"] is not None]
    total = sum(cell["flops"] for cell in cells)
    time = f"about {clock(sum(known))} of training here" if known else "for how long here was not measured"
    return f"{name}, {total:.3g} FLOPs ({counting}), {time}"


def run(
    plan: Plan,
    cell: Annotated[str | None, typer.Option("--cell", help="Only this cell, as one of many processes.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Cells at once on this machine.")] = 1,
    budget_limit: Annotated[
        float | None, typer.Option("--budget-limit", help="Only budgets up to so many FLOPs.")
    ] = None,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make diverged cells anew; those that are done are kept.")
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train and measure the cells of a plan, or go on with them.

    A cell is trained, scored, probed, and completes held-out pictures, as ordinary artifacts below PLAN/cells/ID.
    """
    talk(quiet, f"scaling run: the cells of {plan}")
    from pixseq.studies import run

    done = run.run(
        plan, cell=cell, jobs=jobs, budget_limit=budget_limit, device=device, precision=precision, again=overwrite
    )
    if json:
        emit(to_json(done))
        return
    head = ("id", "status", "params", "tokens", "flops", "loss", "accuracy", "frechet_distance", "reason")
    rows = [_in_short(row, head) for row in done["cells"]]
    emit(f"{table(head, rows)}\n\nflops are counted as {done['counting']}")


def fit(
    source: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="A plan that was run, or a CSV: params, tokens, flops, metrics."),
    ],
    out: o.OptionalOut = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures: a sheet, and each beside.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="A column to fit [default: all].")] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="More of --metric is better.")] = False,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="What is what in a CSV, as params=NAME [default: by name].")
    ] = None,
    bootstrap: Annotated[int, typer.Option("--bootstrap", help="Resamples for the 95 % intervals; 0: none.")] = 400,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fit how the best size and data grow with compute, in three ways.

    For every metric and resolution: parabolas, and two fits of the law of Chinchilla.
    """
    talk(quiet, f"scaling fit: the runs of {source}")
    from pixseq.studies import fit

    numbers = fit.run(
        source,
        out=out,
        plot=plot,
        metrics=metric,
        maximize=maximize,
        resamples=bootstrap,
        seed=seed,
        overwrite=overwrite,
        columns=column,
    )
    emit(to_json(numbers) if json else _fit_tables(numbers))


def _fit_tables(numbers: dict[str, Any]) -> str:
    head = ("metric", "resolution", "method", "N ~ C^", "95 %", "D ~ C^", "95 %", "E", "alpha", "beta")
    rows = []
    for fit in numbers["fits"]:
        exponents = (fit["params_exponent"], _interval(fit, "params"), fit["tokens_exponent"], _interval(fit, "tokens"))
        name = f"{fit['metric']} ({fit['direction']})"
        rows.append((name, fit["resolution"], fit["method"], *exponents, fit["E"], fit["alpha"], fit["beta"]))
    lines = [table(head, rows)]
    remarks = [f"flops are counted as {numbers['counting'] or 'the runs state them'}", *numbers.get("notes", [])]
    remarks += _by_fit((f, f"no fit: {f['refused']}") for f in numbers["fits"] if f["refused"])
    remarks += _by_fit((f, flag) for f in numbers["fits"] for flag in f["flags"])
    remarks += [
        f"{f['metric']}: seeds of one size differ by {f['seed_spread']:.2%}"
        for f in numbers["fits"]
        if f["seed_spread"]
    ]
    remarks += [each["text"] for each in numbers["disagreements"]]
    remarks += [f"{row['id']} is left out: {row['reason']}" for row in numbers["excluded"]]
    return "\n".join([*lines, "", *dict.fromkeys(map(one_line, remarks))]).rstrip()


def _interval(fit: dict[str, Any], key: str) -> str | None:
    ends = fit[f"{key}_exponent_ci"]
    return None if ends is None else "..".join(cell_text(end) for end in ends)


def _by_fit(said: Iterable[tuple[dict[str, Any], str]]) -> list[str]:
    """What is said of several methods of one metric is said once: loss at 8 (direct, varpro): ..."""
    methods: dict[tuple[str, str], list[str]] = {}
    for fit, text in said:
        at = "" if fit["resolution"] is None else f" at {fit['resolution']}"
        methods.setdefault((f"{fit['metric']}{at}", text), []).append(fit["method"])
    return [f"{name} ({', '.join(by)}): {text}" for (name, text), by in methods.items()]


def compare(
    fit: Fit,
    budget: Annotated[
        float | None, typer.Option("--budget", help="FLOPs at which to tell tokens per parameter.")
    ] = None,
    method: Method = "varpro",
    images: Annotated[
        float | None, typer.Option("--images", help="Images that there are to train on, to test whether data suffice.")
    ] = None,
    start_flops: Annotated[
        float | None, typer.Option("--start-flops", help="Compute that one run can have today [default: the paper's].")
    ] = None,
    out: o.OptionalOut = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Set a study beside the paper on next-pixel scaling.

    That is arXiv 2511.08704, so far as its numbers are known here.
    """
    talk(quiet, f"scaling compare: {fit}")
    from pixseq.studies import compare

    numbers = compare.run(
        fit, budget=budget, method=method, out=out, overwrite=overwrite, images=images, start_flops=start_flops
    )
    if json:
        emit(to_json(numbers))
        return
    head = ("what", "metric", "resolution", "value", "95 %", "paper")
    rows = [(r["what"], r["metric"], r["resolution"], r["value"], _span(r["ci"]), r["paper"]) for r in numbers["rows"]]
    lines = [table(head, rows), ""]
    for paper in dict.fromkeys(each["statement"] for each in numbers["statements"]):
        lines.append(f"The paper: {paper}")
        lines += [_judged(each) for each in numbers["statements"] if each["statement"] == paper]
    emit("\n".join([*lines, "", *map(one_line, numbers["remarks"])]).rstrip())


def _judged(each: dict[str, Any]) -> str:
    at = "" if each["resolution"] is None else f" at {each['resolution']}"
    subject = f"{each['metric']}{at}: " if each["metric"] else ""
    here = f"{each['here']}: " if each["here"] != "-" else ""
    return f"  {each['verdict']}: {one_line(subject)}{here}{one_line(each['why'])}"


def _span(ends: list[float | None] | None) -> str | None:
    return None if ends is None else "..".join(cell_text(end) for end in ends)


def forecast(
    fit: Fit,
    growth: Annotated[float, typer.Option("--growth", help="Compute grows so many times a year.", show_default=False)],
    start_flops: Annotated[
        float, typer.Option("--start-flops", help="Compute that one run can have today.", show_default=False)
    ],
    resolution: Annotated[
        str, typer.Option("--resolution", help="Sides of the pictures, as 32,64,128.", show_default=False)
    ],
    target: Annotated[
        list[str] | None, typer.Option("--target", help="METRIC=VALUE to reach [default: near the irreducible].")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="A metric of the fit [default: all].")] = None,
    method: Method = "varpro",
    out: o.OptionalOut = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the forecast as PNG.")] = None,
    tokens_per_pixel: Annotated[
        float | None, typer.Option("--tokens-per-pixel", help="To count images by [default: as the study's].")
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Tell the compute that targets need, and the years until then.

    The years hold if compute keeps growing at --growth.
    """
    talk(quiet, f"scaling forecast: by {fit}")
    from pixseq.studies import forecast

    targets = dict(_target(text) for text in target) if target else None
    numbers = forecast.run(
        fit,
        growth=growth,
        start_flops=start_flops,
        resolutions=resolution,
        targets=targets,
        metrics=metric,
        method=method,
        out=out,
        plot=plot,
        overwrite=overwrite,
        tokens_per_pixel=tokens_per_pixel,
    )
    if json:
        emit(to_json(numbers))
        return
    head = (
        *("metric", "resolution", "target", "flops", "95 %", "params", "tokens"),
        *("images", "years", "years 95 %", "status"),
    )
    spans = [{"95 %": _span(row["flops_ci"]), "years 95 %": _span(row["years_ci"])} for row in numbers["rows"]]
    rows = [[(row | span)[key] for key in head] for row, span in zip(numbers["rows"], spans)]
    emit("\n".join([table(head, rows), "", *map(one_line, numbers["assumptions"])]))


def _target(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = None
    if not name or not equals or number is None:
        raise UsageError(f"--target {text!r} is not of the form METRIC=VALUE", "for example loss=2.1")
    return name, number
