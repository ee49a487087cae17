"""bench: what this machine makes of every stage, beside peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import emit, table, talk, to_json
from pixseq.errors import UsageError


def bench(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE]...", help="palette, encode, read, pretrain, features, probe, sample [default: all]."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="scikit-learn, pillow, transformers, faiss, nanogpt, or none; may be repeated [default: who is here].",
        ),
    ] = None,
    nanogpt: Annotated[Path | None, typer.Option("--nanogpt", help="A checkout of nanoGPT, which is a peer.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Time and memory of ours alone while images, positions, layers ... grow.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the peak memory of each, in a process of its own.")
    ] = False,
    preset: Annotated[str | None, typer.Option("--preset", help="The model [default: 8 layers of width 256].")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One key of the model, as model.n_layer=12; may be repeated.")
    ] = None,
    size: Annotated[int, typer.Option("--size", min=1, max=1024, help="Side of the pictures in pixels.")] = 16,
    colors: Annotated[int, typer.Option("--colors", min=2, max=4096, help="Colours of the palette.")] = 512,
    classes: Annotated[int, typer.Option("--classes", min=2, help="Classes of what is probed.")] = 10,
    count: Annotated[int, typer.Option("--count", min=32, help="Pictures of palette, encode, read and probe.")] = 4096,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images at once of pretrain, features and sample.")
    ] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each is timed, at most.")] = 7,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0, help="Seconds of a stage, or with --cost of a size; no round begins later."),
    ] = 30.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of all that computes [default: one a core].")
    ] = None,
    device: o.Device = "auto",
    precision: Annotated[
        choices.Precision, typer.Option("--precision", help="auto: fp32, and what auto takes elsewhere.")
    ] = "auto",
    out: o.OptionalOut = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time the stages beside other programs and the machine's limits.

    All are timed in turns on drawn data, after a warm-up. A ratio is how many times as long as pixseq it takes, in the
    same precision and against pixseq as it runs where nothing is chosen.
    """
    talk(quiet, "bench: preparing")
    from pixseq.bench.settings import Settings

    settings = Settings(
        preset=preset,
        sets=tuple(set_ or ()),
        size=size,
        colors=colors,
        classes=classes,
        count=count,
        batch_size=batch_size,
        seed=seed,
        device=device,
        precision=precision,
        threads=threads,
        nanogpt=None if nanogpt is None else str(nanogpt),
    )
    if cost:
        if peer or nanogpt or memory:
            raise UsageError("--cost is of ours alone, and measures memory", "leave out --peer, --nanogpt and --memory")
        from pixseq.bench import cost as costs

        numbers = costs.run(
            stages or (),
            settings=settings,
            most_rounds=rounds,
            seconds=seconds,
            out=out,
            overwrite=overwrite,
        )
        emit(to_json(numbers) if json else _cost_table(numbers))
        return
    from pixseq.bench import run

    numbers = run.run(
        stages or (),
        peer=peer or (),
        settings=settings,
        most_rounds=rounds,
        seconds=seconds,
        memory=memory,
        out=out,
        overwrite=overwrite,
    )
    emit(to_json(numbers) if json else _table(numbers))


def _table(numbers: dict[str, Any]) -> str:
    """The rows of all stages, the ceilings, the machine."""
    head = ["stage", "by", "precision", "median", "spread", "rate", "ratio", "ratio to auto", "of ceiling", "result"]
    rows, abouts, memory = [], [], "peak_bytes" in numbers["stages"][0]["rows"][0]
    limits: dict[tuple[str, str], tuple[float, str]] = {}  # the best that was measured of each
    for each in numbers["stages"]:
        abouts.append(f"{each['stage']}: {each['about']}")
        for row in each["rows"]:
            shown = [each["stage"], row["by"], row["precision"] or "", _time(row["median_seconds"])]
            shown += [f"{100 * row['spread']:.0f} %", f"{_three(row['rate'])} {each['unit']}", _times(row["ratio"])]
            shown += [_times(row["ratio_to_auto"]), _share(row["share_of_ceiling"]), row["result"] or ""]
            shown += [_bytes(row["peak_bytes"])] if memory else []
            rows.append(shown + ([_share(row["mfu"])] if numbers["machine"]["gpu"] else []))
        for limit in each["ceilings"]:
            name = limit["ceiling"], limit["precision"] or ""
            limits[name] = max(limits.get(name, (0.0, "")), (limit["rate"], limit["unit"]))
    head += ["peak memory"] * memory + ["mfu"] * bool(numbers["machine"]["gpu"])
    shown = [(*name, f"{_three(rate / 1e9)} G{unit}") for name, (rate, unit) in limits.items()]
    ceilings = table(("ceiling", "precision", "rate"), shown)
    return "\n".join([table(head, rows), "", *abouts, "", ceilings, "", _machine(numbers)])


def _cost_table(numbers: dict[str, Any]) -> str:
    """Times and memory along each size, then the powers."""
    rows = [
        [row["stage"], f"{row['size']} {row['value']:,}", _time(row["median_seconds"]), _bytes(row["peak_bytes"])]
        for row in numbers["rows"]
    ]
    laws = [
        (law["stage"], law["size"], f"{law['time_power']:.2f}", f"{law['memory_power']:.2f}", law["said"])
        for law in numbers["laws"]
    ]
    powers = table(("stage", "grows with", "time to the power", "memory", ""), laws)
    return "\n".join([table(("stage", "size", "median", "peak memory"), rows), "", powers, "", _machine(numbers)])


def _machine(numbers: dict[str, Any]) -> str:
    m = numbers["machine"]
    chip = m["gpu"] or f"{m['cores']} cores of {m['processor']} ({m['instructions']})"
    calm = "calm" if numbers["calm"] else f"not calm: {'; '.join(numbers['unrest'])}"
    return (
        f"{chip}, {m['threads']} threads, {_bytes(m['memory_bytes'])}, torch {m['torch']}, auto is {m['auto']}; {calm}"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"


def _three(value: float) -> str:
    """With thousands apart, from a thousand on without decimals."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"
