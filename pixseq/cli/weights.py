"""import, export and check: weights that come and go, and the certificates of what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pixseq.cli import options as o
from pixseq.cli.output import emit, made, table, talk, to_json
from pixseq.errors import PixseqError

Palette = Annotated[
    Path | None, typer.Option("--palette", help="The colours of its tokens [default: those beside the weights].")
]


def import_hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A downloaded ImageGPT directory.", show_default=False)],
    out: o.Out,
    palette: Palette = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a checkpoint of a Hugging Face ImageGPT directory.

    Reads safetensors or pytorch_model.bin, whole or in shards, without running code from them, and the palette of
    preprocessor_config.json. What Image GPT cannot express is refused by name.
    """
    talk(quiet)
    from pixseq.stages import importing

    made(out, importing.run("hf", path=folder, out=out, palette=palette, overwrite=overwrite), json)


def import_openai(
    prefix: Annotated[
        Path, typer.Argument(metavar="PREFIX", help="As model.ckpt-1000000, without .index.", show_default=False)
    ],
    out: o.Out,
    palette: Palette = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a checkpoint of OpenAI's TensorFlow checkpoint, autoregressive or BERT; TensorFlow is not needed.

    The palette is OpenAI's kmeans_centers.npy, which is not part of the checkpoint.
    """
    talk(quiet)
    from pixseq.stages import importing

    made(out, importing.run("openai", path=prefix, out=out, palette=palette, overwrite=overwrite), json)


def import_aim(
    backbone: Annotated[
        Path, typer.Argument(metavar="BACKBONE", help="A backbone's .pth or .safetensors.", show_default=False)
    ],
    out: o.Out,
    head: Annotated[Path | None, typer.Option("--head", help="Its attentive probe's .pth or .safetensors.")] = None,
    probe_layers: Annotated[
        str | None,
        typer.Option(
            "--probe-layers", help="Blocks the head reads: last, best, or from 0 as 12,13,14 [default: last]."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Attention heads [default: width / 128].")] = None,
    size: Annotated[int, typer.Option("--size", help="Side of the pictures.")] = 224,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a checkpoint of an AIM backbone of the first version, and of its attentive probe head.

    No prediction head was published: such a model gives features, probes and, with its head, accuracy.
    """
    talk(quiet)
    from pixseq.stages import importing

    made(
        out,
        importing.run_aim(
            backbone, out=out, head=head, probe_layers=probe_layers, n_heads=heads, size=size, overwrite=overwrite
        ),
        json,
    )


def export_hf(
    model: o.Model,
    out: o.Out,
    weights: o.Weights = "model",
    drop: Annotated[
        Literal["head", "classifier"] | None,
        typer.Option("--drop", help="Of a model with both: no class of transformers carries both."),
    ] = None,
    metrics: Annotated[
        list[Path] | None, typer.Option("--metrics", help="Numbers of `evaluate` on this model, for the model card.")
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the directory that from_pretrained of transformers opens: weights, processor, model card."""
    talk(quiet)
    from pixseq.stages import exporting

    record = exporting.run(model, out=out, weights=weights, drop=drop, metrics=metrics or [], overwrite=overwrite)
    made(out, record, json)


def check(
    model: o.Model,
    tokens: Annotated[
        Path | None, typer.Argument(metavar="[TOKENS]", help="Pictures to check with [default: random ones].")
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
    """Certify a checkpoint: causality, cache, loss, palette, parameter count, finite weights. Exits 1 if one fails."""
    talk(quiet)
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
