"""features, probe, evaluate, frechet, check and show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import cell_text, emit, made, table, talk, to_json
from pixseq.errors import PixseqError, UsageError
from pixseq.text import one_line

if TYPE_CHECKING:
    from pixseq.artifacts.lineage import Ancestor

CLASSES_SHOWN = 20


def features(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A checkpoint, a .pt2 file, or pixels for raw colours.", callback=o.extractor
        ),
    ],
    tokens: o.Tokens,
    out: o.Out,
    layers: Annotated[str, typer.Option("--layers", help="all, or a list as 0,4,8.")] = "all",
    pool: Annotated[choices.Pool, typer.Option("--pool", help="mean over positions, or none: all positions.")] = "mean",
    below: Annotated[
        float | None, typer.Option("--below", help="Average below this part of the rows: what sample --keep draws.")
    ] = None,
    attention: o.Attention = None,
    dtype: Annotated[choices.FeatureType, typer.Option("--dtype", help="Number type of what is stored.")] = "float32",
    masks: o.Masks = None,
    random_init: Annotated[
        int | None, typer.Option("--random-init", min=0, help="Fresh weights of this seed instead: a baseline.")
    ] = None,
    weights: o.Weights = "model",
    batch_size: o.BatchSize = None,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    seed: o.Seed = 0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write every layer's features in one forward pass.

    Layer l of an Image GPT is the ln_1 output that enters block l, the last layer the ln_f output; of an AIM it is the
    residual stream after l blocks.
    """
    talk(quiet, f"features: of {tokens} by {model}")
    from pixseq.stages import features

    record = features.run(
        model,
        tokens=tokens,
        out=out,
        layers=layers,
        pool=pool,
        below=below,
        attention=attention,
        dtype=dtype,
        masks=masks,
        random_init=random_init,
        weights=weights,
        batch_size=batch_size,
        device=device,
        precision=precision,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
    )
    made(out, record, json)


def probe(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="Features to fit on.", show_default=False)],
    test: Annotated[Path, typer.Option("--test", help="Features to test on, once.", show_default=False)],
    out: o.OptionalOut = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw accuracy by layer as PNG.")] = None,
    method: Annotated[choices.ProbeMethod, typer.Option("--method", help="What reads the features.")] = "logistic",
    layers: Annotated[str, typer.Option("--layers", help="all, or a list as 0,4,8.")] = "all",
    concat: Annotated[
        int, typer.Option("--concat", min=0, help="Also probe this many layers centred on the best, concatenated.")
    ] = 0,
    labels_per_class: Annotated[
        int | None, typer.Option("--labels-per-class", min=1, help="Also fit on so few labels, on random subsets.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Random subsets for --labels-per-class.")] = 5,
    low_data_choice: Annotated[
        choices.LowDataChoice | None,
        typer.Option(
            "--low-data-choice",
            help="--labels-per-class: subset chooses layer and scaling by its own images, all by the whole of FEATURES "
            "[default: subset].",
        ),
    ] = None,
    c: Annotated[
        str | None,
        typer.Option(
            "--c", help="Inverse regularisations to choose from, as 0.01,1,100 [default: 0.0001 to 100 by tens]."
        ),
    ] = None,
    val_fraction: Annotated[float, typer.Option("--val-fraction", help="Part of FEATURES that chooses C.")] = 0.1,
    standardize: Annotated[
        bool | None,
        typer.Option("--standardize/--no-standardize", help="Scale by train mean and deviation [default: logistic]."),
    ] = None,
    max_iter: Annotated[int, typer.Option("--max-iter", min=1, help="L-BFGS iterations at most.")] = 1000,
    solver: Annotated[
        choices.LogisticSolver | None,
        typer.Option("--solver", help="logistic: whose solver; sklearn's is slower [default: pixseq]."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="attentive: the mean of so many neighbouring layers [default: of the last six]."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="attentive: attention heads [default: the model's own].")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option("--lr", help="attentive: rates to choose from, as 0.001,0.01 [default: six from 0.0001 to 0.03]."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="attentive: passes [default: 10, or as many as make 300 steps].")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="attentive: rows a step [default: 256].")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="attentive: AdamW's, of matrices [default: 0.01].")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or one as cuda:1 [default: auto].")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", help="Another row, as NAME=TRAIN.zarr:TEST.zarr.")
    ] = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fit a classifier on every layer's features: accuracy by layer.

    --method attentive reads features made with --pool none: a learned query pools the mean of several layers.
    """
    talk(quiet, f"probe: {method} on {features}, tested on {test}")
    from pixseq.numerics.linear_probe import DEFAULT_CS
    from pixseq.stages import probe

    numbers = probe.run(
        features,
        test=test,
        out=out,
        plot=plot,
        method=method,
        layers=layers,
        concat=concat,
        labels_per_class=labels_per_class,
        trials=trials,
        low_data_choice=low_data_choice,
        c=c or DEFAULT_CS,
        val_fraction=val_fraction,
        standardize=standardize,
        max_iter=max_iter,
        solver=solver,
        window=window,
        heads=heads,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        device=device,
        baselines=[_baseline(text) for text in baseline or []],
        seed=seed,
        overwrite=overwrite,
    )
    emit(to_json(numbers) if json else _probe_table(numbers))


def _baseline(text: str) -> tuple[str, str, str]:
    name, equals, paths = text.partition("=")
    train, colon, test = paths.partition(":")
    if not (name and equals and train and colon and test):
        raise UsageError(f"--baseline {text!r} is not of the form NAME=TRAIN.zarr:TEST.zarr")
    return name, train, test


def _probe_table(numbers: dict[str, Any]) -> str:
    """The curve, then one line a summary figure."""
    head: tuple[str, ...] = ("layer", "c", "val_accuracy", "test_accuracy", "converged", "gradient")
    if numbers["method"] == "knn":
        head = ("layer", "val_accuracy", "test_accuracy")
    if numbers["method"] == "attentive":
        head = ("layer", "window", "lr", "val_accuracy", "test_accuracy")
    lines = [table(head, [[row.get(key) for key in head] for row in numbers["layers"]]), ""]
    rows = [(f"best layer {numbers['best_layer']} (by val)", numbers["test_accuracy"])]
    for row in numbers.get("baselines", []):
        rows.append((f"{row['name']}, layer {row['best_layer']}", row["test_accuracy"]))
    if concat := numbers.get("concat"):
        rows.append((f"layers {', '.join(map(str, concat['layers']))} concatenated", concat["test_accuracy"]))
    if few := numbers.get("low_data"):
        spread, choice = cell_text(few["test_accuracy_std"]), f"layer {few['layer']} and scaling chosen with all"
        if few["layer"] is None:
            choice = f"layer ({', '.join(map(str, sorted({*few['layers']})))}) and scaling chosen with them alone"
        name = f"{few['labels_per_class']} labels a class, {choice}, mean of {few['trials']} (std {spread})"
        rows.append((name, few["test_accuracy_mean"]))
    rows.append(("majority class", numbers.get("majority")))
    lines.append(table(("probe", "test_accuracy"), rows))
    if numbers.get("solver"):
        lines += ["", f"logistic regressions solved by {numbers['solver']} on {numbers['device']}"]
    return "\n".join(lines)


def evaluate(
    model: o.Model,
    tokens: o.Tokens,
    out: o.OptionalOut = None,
    masks: o.Masks = None,
    attention: o.Attention = None,
    by_position: Annotated[
        Path | None,
        typer.Option("--by-position", help="Write the loss along the sequence: a .json, and a .png beside."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Draw images beside what is predicted at each place (.png).")
    ] = None,
    weights: o.Weights = "model",
    batch_size: o.BatchSize = None,
    device: o.Device = "auto",
    precision: o.Precision = "fp32",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a model's loss, and accuracy where it has a classifier.

    The loss is in the units of the model: nats a token, or the squared error of patches.
    """
    talk(quiet, f"evaluate: {model} on {tokens}")
    from pixseq.stages import evaluate

    numbers = evaluate.run(
        model,
        tokens=tokens,
        out=out,
        weights=weights,
        masks=masks,
        batch_size=batch_size,
        device=device,
        precision=precision,
        seed=seed,
        overwrite=overwrite,
        attention=attention,
        by_position=by_position,
        pictures=pictures,
    )
    emit(to_json(numbers) if json else table(("measure", "value"), list(numbers.items())))


def frechet(
    a: Annotated[Path, typer.Argument(metavar="A", help="Features, or [n, d] as .npy or zarr.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The real side, of the same extractor.", show_default=False)],
    out: o.OptionalOut = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Which layer of features with several.")] = None,
    count: Annotated[int | None, typer.Option("--count", min=2, help="So many rows of each, from all over it.")] = None,
    floor: Annotated[
        Path | None, typer.Option("--floor", help="Other real pictures' features: the floor is theirs from B.")
    ] = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure the Fréchet distance of two sets of features.

    Beside it stand its floor, real pictures against real, and an unbiased companion (KID).
    """
    talk(quiet, f"frechet: {a} against {b}")
    from pixseq.stages import frechet

    numbers = frechet.run(a, b=b, out=out, layer=layer, count=count, seed=seed, overwrite=overwrite, floor=floor)
    if json:
        emit(to_json(numbers))
        return
    rows = [(key, value) for key, value in numbers.items() if not isinstance(value, dict | list)]
    least = numbers["floor"]
    if least is not None:
        rows.append((f"floor: real against real, n {least['n']}", least["frechet_distance"]))
    emit(table(("measure", "value"), rows))


def check(
    model: o.Model,
    tokens: Annotated[
        Path | None,
        typer.Argument(metavar="[TOKENS]", help="Pictures to check with [default: random ones].", callback=o.artifact),
    ] = None,
    out: o.OptionalOut = None,
    weights: o.Weights = "model",
    device: o.Device = "auto",
    precision: o.Precision = "fp32",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Certify a checkpoint: its causality, cache, loss and palette.

    Its parameter count and finite weights too. Exits 1 if a check fails.
    """
    talk(quiet, f"check: {model}")
    from pixseq.stages import check

    result = check.run(
        model,
        tokens=tokens,
        out=out,
        weights=weights,
        device=device,
        seed=seed,
        overwrite=overwrite,
        precision=precision,
    )
    rows = [[c["name"], "ok" if c["ok"] else "FAILS", _figure(c["figure"]), c["about"]] for c in result["checks"]]
    emit(to_json(result) if json else table(("check", "", "figure", "what it is"), rows))
    failed = [c["name"] for c in result["checks"] if not c["ok"]]
    if failed:
        raise PixseqError(
            f"{len(failed)} of {len(result['checks'])} checks fail for {model}: {', '.join(failed)}",
            "the line of each says what was measured and what it must be",
        )


def _figure(value: float | int | str) -> str:
    """Ids are cut to what tells them apart."""
    return value[:19] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def show(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Anything a stage made.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare it with its id.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a checkpoint's loss curve as PNG.")] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Draw all it was made of, down to the sources, as a tree.")
    ] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what an artifact is, how it was made, and from what."""
    talk(quiet, f"show: {'reading all of ' * verify}{artifact}")
    from pixseq.stages import show

    if lineage:
        if verify or plot is not None:
            raise UsageError("--lineage goes with neither --verify nor --plot", "one of them at a time")
        tree = show.lineage(artifact)
        emit(to_json(tree.to_json()) if json else "\n".join(_tree(tree)))
        return

    record = show.run(artifact, verify=verify, plot=plot, overwrite=overwrite)
    if json:
        emit(to_json(record))
        return
    rows = [(key, record.get(key)) for key in ("kind", "id", "stage", "version")]
    for part in ("config", "inputs", "summary"):
        rows += _flat(part, record[part], 2 if part == "config" else 1)
    rows += [("made", record["made"].get("at")), ("command", " ".join(map(cell_text, record["argv"])))]
    if verify:
        rows.append(("verified", "content equals its id"))
    if record["kind"] in ("tokens", "pixels", "features") and (found := show.classes(artifact)) is not None:
        listed = [f"{name} {count:,}" for name, count in found.items()]
        more = [f"and {len(listed) - CLASSES_SHOWN} more"] * (len(listed) > CLASSES_SHOWN)
        rows.append((f"rows of {len(listed)} classes", ", ".join([*listed[:CLASSES_SHOWN], *more])))
    shown = [(key, value if isinstance(value, str) else to_json(value)) for key, value in rows]
    emit(table(("key", "value"), [(key, value if len(value) < 200 else value[:200] + " ...") for key, value in shown]))


def _flat(name: str, values: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    """Rows of a mapping, down to so many levels: a recipe is read key by key."""
    for key, value in values.items():
        if depth > 1 and isinstance(value, Mapping):
            yield from _flat(f"{name}.{key}", value, depth - 1)
        else:
            yield f"{name}.{key}", value


def _tree(ancestor: Ancestor, lead: str = "", under: str = "") -> Iterator[str]:
    """Two lines each: what it is, and the command that made it."""
    kind = "" if ancestor.kind in (None, ancestor.role) else f"{ancestor.kind} "
    role = "" if ancestor.role == "artifact" else f"{ancestor.role}: "
    lacking = f" ({ancestor.lacking})" if ancestor.lacking else " (see above)" if ancestor.again else ""
    yield one_line(f"{lead}{role}{kind}{ancestor.path}  {ancestor.id}{lacking}")
    inner = under + ("│   " if ancestor.parents else "    ")
    if ancestor.command:
        yield one_line(f"{inner}{ancestor.command}")
    for i, parent in enumerate(ancestor.parents, 1):
        last = i == len(ancestor.parents)
        yield from _tree(parent, under + ("└── " if last else "├── "), under + ("    " if last else "│   "))
