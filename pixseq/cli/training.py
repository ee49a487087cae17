"""pretrain and finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import emit, made, table, talk, to_json

Val = Annotated[Path | None, typer.Option("--val", help="Tokens to validate on.", callback=o.artifact)]
ValFraction = Annotated[float | None, typer.Option("--val-fraction", help="Hold out this part of TOKENS instead.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps [default: the recipe's].")]
GlobalBatch = Annotated[
    int | None,
    typer.Option("--batch-size", help="Images a step, over micro-batches and ranks [default: the recipe's]."),
]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch", min=1, help="Images at once [default: by memory].")]
Rate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate [default: the recipe's].")]
Augment = Annotated[
    choices.Augment | None,
    typer.Option("--augment", help="How training images vary [default: the recipe's]; resized crops are of pixels."),
]
TrainSeed = Annotated[
    int | None, typer.Option("--seed", help="Seed of weights, order, augmentation and masks [default: the recipe's].")
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML of shape and recipe; goes over the preset.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="One key of the recipe, as train.ema=0.999; goes over the file.")
]
TimeLimit = Annotated[
    float | None, typer.Option("--time-limit", help="Minutes after which to stop, resumable (exit 130).")
]
SaveMinutes = Annotated[
    float, typer.Option("--save-minutes", help="Minutes between saves of the state; the first comes after 1.")
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile [default: on CUDA, of a run of some minutes]."),
]


def _keep_config(out: Path | None, config: Path | None) -> None:
    """A checkpoint may be trained anew from its own config.yaml; a file is not replaced by what is made of it."""
    from pixseq.artifacts.targets import check_apart

    if out is not None and out.is_file():
        check_apart([out], [config])


def pretrain(
    tokens: o.Tokens,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The checkpoint to make.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="A named shape and recipe: igpt-s, igpt-cifar16, aim-64 ... [default: a small Image GPT]."
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option("--from", help="A checkpoint to start from; shape and order are its own.", callback=o.artifact),
    ] = None,
    objective: Annotated[
        choices.Objective | None, typer.Option("--objective", help="Objective of an Image GPT [default: ar].")
    ] = None,
    attention: Annotated[
        choices.PretrainingAttention | None, typer.Option("--attention", help="Attention of an AIM [default: prefix].")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            "--order",
            help="Order of pixels or patches: raster, column, reversed, spiral-out, checkerboard, random, or an .npy.",
        ),
    ] = None,
    val: Val = None,
    val_fraction: ValFraction = None,
    steps: Steps = None,
    batch_size: GlobalBatch = None,
    micro_batch: MicroBatch = None,
    lr: Rate = None,
    augment: Augment = None,
    seed: TrainSeed = None,
    config: Config = None,
    set_: Set = None,
    precision: o.Precision = "auto",
    device: o.Device = "auto",
    compile: Compile = None,
    time_limit: TimeLimit = None,
    save_minutes: SaveMinutes = 10.0,
    resume: o.Resume = False,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Also keep checkpoints OUT-stepN: 1000,2000 or every:500.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, size and cost; train nothing.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train an Image GPT on tokens, or an AIM on pixels.

    Pixels are made by `encode --scheme pixels`.
    """
    from pixseq.config import PretrainFile, effective, read_preset
    from pixseq.errors import UsageError

    talk(quiet, f"pretrain: on {tokens}")
    _keep_config(out, config)
    flags = {
        "model.objective": objective,
        "model.attention": attention,
        "sequence.order": order,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.lr": lr,
        "train.augment": augment,
        "train.seed": seed,
    }
    if init_from is None:
        recipe = effective(PretrainFile, preset, config, set_ or [], flags)
    if out is None and not dry_run:
        raise UsageError("no --out was given", "name the checkpoint to make with -o, or look first with --dry-run")

    from pixseq.engine.training import Limits
    from pixseq.stages import pretrain

    if init_from is not None:
        recipe = pretrain.config_from(init_from, preset, config, set_ or [], flags)

    limits = Limits(micro_batch, time_limit, save_minutes, compile)
    if dry_run or out is None:
        plan = pretrain.plan(
            tokens,
            config=recipe,
            val_fraction=val_fraction,
            device=device,
            precision=precision,
            limits=limits,
            init_from=init_from,
        )
        if preset:
            plan |= {f"preset.{key}": value for key, value in read_preset(preset)["about"].items()}
        if json:
            emit(to_json(plan))
        else:
            flat = {f"{s}.{k}": v for s in ("model", "sequence", "train") for k, v in plan.pop(s).items()} | plan
            lines = {key: "; ".join(value) if isinstance(value, list) else str(value) for key, value in flat.items()}
            emit(table(("key", "value"), list(lines.items())))
        return
    record = pretrain.run(
        tokens,
        out=out,
        config=recipe,
        val=val,
        val_fraction=val_fraction,
        device=device,
        precision=precision,
        limits=limits,
        resume=resume,
        overwrite=overwrite,
        keep=keep,
        init_from=init_from,
    )
    made(out, record, json)


def finetune(
    model: o.Model,
    tokens: o.Tokens,
    out: o.Out,
    val: Val = None,
    val_fraction: Annotated[
        float | None, typer.Option("--val-fraction", help="Hold out this part of TOKENS instead [default: 0.1].")
    ] = None,
    gen_weight: Annotated[
        float | None, typer.Option("--gen-weight", help="Weight of the generative loss [default: 1.0].")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Train low-rank updates of the blocks alone, as 8 [default: all].")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Scales low-rank updates by alpha / rank [default: 8].")
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option("--lora-targets", help="Of q, k, v, o, fc, proj, what they adapt [default: q,k,v,o].")
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit", help="Train anew on train and validation for the chosen steps [default: no]."
        ),
    ] = None,
    attention: o.Attention = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", help="Validations without a better accuracy before the stop [default: 5]."),
    ] = None,
    steps: Steps = None,
    batch_size: GlobalBatch = None,
    micro_batch: MicroBatch = None,
    lr: Rate = None,
    augment: Augment = None,
    seed: TrainSeed = None,
    config: Config = None,
    set_: Set = None,
    weights: o.Weights = "model",
    precision: o.Precision = "auto",
    device: o.Device = "auto",
    compile: Compile = None,
    time_limit: TimeLimit = None,
    save_minutes: SaveMinutes = 10.0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a classifier on a pretrained model.

    The loss is that of the classes and the generative one together; training stops when validation accuracy does not
    rise any more.
    """
    from pixseq.config import FinetuneFile, effective

    talk(quiet, f"finetune: {model} on {tokens}")
    _keep_config(out, config)
    flags = {
        "finetune.gen_weight": gen_weight,
        "finetune.lora_rank": lora_rank,
        "finetune.lora_alpha": lora_alpha,
        "finetune.lora_targets": lora_targets,
        "finetune.refit": refit,
        "finetune.patience": patience,
        "finetune.steps": steps,
        "finetune.batch_size": batch_size,
        "finetune.lr": lr,
        "finetune.augment": augment,
        "finetune.seed": seed,
    }
    recipe = effective(FinetuneFile, None, config, set_ or [], flags)
    from pixseq.engine.training import Limits
    from pixseq.stages import finetune

    limits = Limits(micro_batch, time_limit, save_minutes, compile)
    record = finetune.run(
        model,
        tokens=tokens,
        out=out,
        config=recipe,
        val=val,
        val_fraction=val_fraction,
        weights=weights,
        attention=attention,
        device=device,
        precision=precision,
        limits=limits,
        resume=resume,
        overwrite=overwrite,
    )
    made(out, record, json)
