"""palette fit, palette show, encode, decode and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixseq import choices
from pixseq.cli import options as o
from pixseq.cli.output import made, talk

Size = Annotated[int, typer.Option("--size", help="Side of the square pictures, in pixels.")]
Resize = Annotated[
    choices.SquareResize,
    typer.Option("--resize", help="crop: shorter side, then centre crop (paper); squash: as Hugging Face."),
]
Background = Annotated[str, typer.Option("--background", help="Colour under transparent pixels.")]
OnError = Annotated[choices.OnError, typer.Option("--on-error", help="What to do at a picture that cannot be read.")]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", help="Column or array that holds the labels; none: read none [default: by name]."),
]
BitDepth = Annotated[
    int | None, typer.Option("--bit-depth", help="Bits that 16-bit pictures use, such as 12 [default: 16].")
]
MaxPixels = Annotated[
    int | None, typer.Option("--max-pixels", min=1, help="Pixels that a picture may have [default: 64000000].")
]
Columns = Annotated[int | None, typer.Option("--columns", min=1, help="Columns of the grid [default: by count].")]


def palette_fit(
    source: o.Source,
    out: o.Out,
    split: o.Split = "train",
    colors: Annotated[int, typer.Option("--colors", help="Colours of the palette.")] = 512,
    size: Size = 32,
    resize: Resize = "crop",
    max_images: Annotated[
        int | None, typer.Option("--max-images", help="Take only so many pictures, from all over the source.")
    ] = None,
    refine_steps: Annotated[
        int | None, typer.Option("--refine-steps", help="Lloyd steps over all distinct colours [default: 16].")
    ] = None,
    background: Background = "white",
    label_column: LabelColumn = None,
    bit_depth: BitDepth = None,
    max_pixels: MaxPixels = None,
    on_error: OnError = "fail",
    workers: o.Workers = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Cluster every pixel of a source into a palette."""
    talk(quiet, f"palette fit: {colors} colours of {source}")
    from pixseq.stages import palette

    record = palette.run_fit(
        source,
        out=out,
        split=split,
        colors=colors,
        size=size,
        resize=resize,
        max_images=max_images,
        seed=seed,
        refine_steps=refine_steps,
        background=background,
        on_error=on_error,
        workers=workers,
        overwrite=overwrite,
        label_column=label_column,
        bit_depth=bit_depth,
        max_pixels=max_pixels,
    )
    made(out, record, json)


def palette_show(
    palette: Annotated[
        Path, typer.Argument(metavar="PALETTE", help="A palette, or what carries one.", show_default=False)
    ],
    out: o.Out,
    columns: Annotated[int, typer.Option("--columns", min=1, help="Columns of the swatch.")] = 32,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw a palette's colours, in order, as PNG."""
    talk(quiet, f"palette show: {palette}")
    from pixseq.stages.palette import run_show

    made(out, run_show(palette, out=out, columns=columns, overwrite=overwrite), json)


def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help=f"{o.SOURCE_HELP} Also palette ids [N, T]: OpenAI's {{cifar10,imagenet}}_{{tr,va,te}}X.npy, or a "
            "folder of them.",
            show_default=False,
        ),
    ],
    out: o.Out,
    palette: Annotated[
        Path | None,
        typer.Option(
            "--palette",
            help="A palette: ours, OpenAI's .npy, or a preprocessor_config.json; not needed for palette ids.",
        ),
    ] = None,
    split: o.Split = "train",
    size: Annotated[
        int, typer.Option("--size", help="Side of the square pictures; of whole ones the shorter side, at most.")
    ] = 32,
    resize: Annotated[
        choices.Resize,
        typer.Option(
            "--resize",
            help="crop: shorter side, then centre crop (paper); squash: as Hugging Face; whole: both sides are kept, "
            "for AIM to crop from.",
        ),
    ] = "crop",
    filter: Annotated[choices.Filter, typer.Option("--filter", help="How pictures are resized.")] = "bilinear",
    resized_side: Annotated[
        int | None,
        typer.Option("--resized-side", help="Shorter side that the centre crop is cut from [default: --size]."),
    ] = None,
    scheme: Annotated[
        choices.Scheme,
        typer.Option("--scheme", help="rgb: 3 tokens a pixel; gray: its luma; pixels: for AIM."),
    ] = "palette",
    views: Annotated[
        int, typer.Option("--views", help="Random resized crops of each image, as the paper trains on; 0: none.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take only so many images, of every class its share.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option("--val-fraction", help="Part of the images that is held out, drawn by --seed; see --part."),
    ] = None,
    part: Annotated[
        choices.Part | None, typer.Option("--part", help="train: what --val-fraction leaves; val: what it holds out.")
    ] = None,
    background: Background = "white",
    label_column: LabelColumn = None,
    bit_depth: BitDepth = None,
    max_pixels: MaxPixels = None,
    on_error: OnError = "fail",
    workers: o.Workers = None,
    seed: o.Seed = 0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn pictures into tokens, or into pixels (--scheme pixels).

    Palette ids that others published become tokens, too.
    """
    talk(quiet, f"encode: {source} as {scheme} at size {size}")
    from pixseq.stages import encode

    record = encode.run(
        source,
        out=out,
        palette=palette,
        split=split,
        size=size,
        resize=resize,
        filter=filter,
        resized_side=resized_side,
        scheme=scheme,
        views=views,
        limit=limit,
        val_fraction=val_fraction,
        part=part,
        seed=seed,
        background=background,
        on_error=on_error,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        label_column=label_column,
        bit_depth=bit_depth,
        max_pixels=max_pixels,
    )
    made(out, record, json)


def decode(
    tokens: o.Tokens,
    out: o.Out,
    count: Annotated[int, typer.Option("--count", help="Pictures to draw.")] = 64,
    first: Annotated[
        int | None, typer.Option("--first", help="Rows from this one on [default: some of every class].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Draw random rows of this seed instead.")] = None,
    columns: Columns = None,
    scale: Annotated[
        int | None, typer.Option("--scale", min=1, help="Screen pixels a pixel [default: by size].")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Also write a folder of single PNGs.")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn tokens, or pixels, back into pictures."""
    talk(quiet, f"decode: {tokens}")
    from pixseq.stages import decode

    made(
        out,
        decode.run(
            tokens,
            out=out,
            count=count,
            first=first,
            seed=seed,
            columns=columns,
            scale=scale,
            images_dir=images,
            overwrite=overwrite,
        ),
        json,
    )


def sample(
    model: o.Model,
    out: o.Out,
    count: Annotated[int, typer.Option("--count", help="Pictures, or prompts (some of every class), to draw.")] = 16,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Tokens, or a SOURCE of pictures, to complete.", callback=o.pictures)
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a prompt SOURCE [default: test, where there is one].")
    ] = None,
    label_column: LabelColumn = None,
    bit_depth: BitDepth = None,
    max_pixels: MaxPixels = None,
    on_error: OnError = "fail",
    keep: Annotated[float, typer.Option("--keep", help="Part of each prompt's rows that is given.")] = 0.5,
    completions: Annotated[int, typer.Option("--completions", help="Pictures drawn for each prompt.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="1 is the paper's; 0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Only the k likeliest colours; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest colours of this mass.")] = 1.0,
    seed: o.Seed = 0,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="Also write what was drawn as tokens.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Also write a folder of single PNGs.")] = None,
    columns: Columns = None,
    weights: o.Weights = "model",
    batch_size: o.BatchSize = None,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Draw pictures, or complete given ones."""
    talk(quiet, f"sample: from {model}")
    from pixseq.stages import sample

    record = sample.run(
        model,
        out=out,
        count=count,
        prompt=prompt,
        split=split,
        label_column=label_column,
        bit_depth=bit_depth,
        max_pixels=max_pixels,
        on_error=on_error,
        keep=keep,
        completions=completions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        tokens_out=tokens,
        images_out=images,
        columns=columns,
        weights=weights,
        batch_size=batch_size,
        device=device,
        precision=precision,
        overwrite=overwrite,
    )
    made(out, record, json)
