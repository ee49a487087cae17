"""Options that several commands share: one word, one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixseq import choices


def artifact(path: Path | None) -> Path | None:
    """An artifact that does not exist is told before its stage is imported: torch takes a second to tell the same."""
    from pixseq.artifacts.manifest import check_exists

    if path is not None:
        check_exists(path)
    return path


def artifacts(paths: list[Path] | None) -> list[Path] | None:
    """The same of several, or of none."""
    for path in paths or ():
        artifact(path)
    return paths


def pictures(spec: str | None) -> str | None:
    """The same of a source of pictures."""
    if spec is not None and not Path(spec).exists():
        from pixseq.data.sources import check_there

        check_there(spec)
    return spec


def extractor(model: Path) -> Path:
    """The same of what features are computed by: the word pixels is no path."""
    from pixseq.interop.places import check_exported, is_exported

    if is_exported(model):
        check_exported(model)
    elif str(model) != "pixels":
        artifact(model)
    return model


Out = Annotated[Path, typer.Option("--out", "-o", help="Path of what is made.", show_default=False)]
OptionalOut = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the result here.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing target, once the new one is whole.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run left.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.", min=0)]
Split = Annotated[str, typer.Option("--split", help="train, test or another split of the source.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or one as cuda:1.")]
Precision = Annotated[
    choices.Precision, typer.Option("--precision", help="auto: bf16 where the chip has units for it.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images at once [default: by memory].")]
Weights = Annotated[choices.Weights, typer.Option("--weights", help="Which weights of the checkpoint.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Threads that decode and resize, and processes for many pictures, one a core [default: one a core].",
    ),
]
Attention = Annotated[
    choices.Attention | None,
    typer.Option("--attention", help="Attention pattern of an AIM [default: the model's own]."),
]
Masks = Annotated[
    int | None, typer.Option("--masks", min=1, help="Random masks an image, for bert models [default: 5].")
]

SOURCE_HELP = (
    "digits; digits-placed; a folder of class folders or of pictures; CIFAR-10/100 (folder or .tar.gz); an idx "
    "(MNIST), STL-10, Downsampled ImageNet, .npz, .npy, .parquet, .tar or .zip source; or - for paths on stdin."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP, show_default=False)]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint.", show_default=False, callback=artifact)]
Tokens = Annotated[
    Path, typer.Argument(metavar="TOKENS", help="Tokens, or pixels for AIM.", show_default=False, callback=artifact)
]
