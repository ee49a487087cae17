"""import and export: weights that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import made, talk

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
    talk(quiet, f"import: {folder}")
    from pixseq.interop.places import check_folder

    check_folder(folder)
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
    """Make a checkpoint of OpenAI's TensorFlow checkpoint.

    Autoregressive or BERT models; TensorFlow is not needed. The palette is OpenAI's kmeans_centers.npy, which is not
    part of the checkpoint.
    """
    talk(quiet, f"import: {prefix}")
    from pixseq.interop.bundle import find_prefix

    find_prefix(prefix)
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
    """Make a checkpoint of an AIM backbone, and of its probe head.

    Those of the first version, with an attentive probe. No prediction head was published: such a model gives
    features, probes and, with its head, accuracy.
    """
    talk(quiet, f"import: {backbone}")
    from pixseq.interop.places import check_file

    for file in (backbone, *([] if head is None else [head])):
        check_file(file)
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
        choices.Drop | None,
        typer.Option("--drop", help="What is left out of a model with both, which no class of transformers carries."),
    ] = None,
    metrics: Annotated[
        list[Path] | None,
        typer.Option(
            "--metrics", help="Numbers of `evaluate` on this model, for the model card.", callback=o.artifacts
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the directory that from_pretrained of transformers opens.

    It holds the weights, the processor and a model card.
    """
    talk(quiet, f"export: {model}")
    from pixseq.stages import exporting

    record = exporting.run(model, out=out, weights=weights, drop=drop, metrics=metrics or [], overwrite=overwrite)
    made(out, record, json)
