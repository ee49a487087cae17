"""The command line: every command's signature, help and example, one lazy call each, and the exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from pixseq import __version__, progress, signals
from pixseq.cli import bench, images, measuring, scaling, stdio, training, weights
from pixseq.errors import BUG, CLOSED_PIPE, INPUT, INTERRUPTED, USAGE, PixseqError, Stop


class _ChainFirst(TyperGroup):
    """Lists palettes, a group of commands, where the chain begins: before the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "palette")


app = typer.Typer(
    cls=_ChainFirst,
    help="Pretrain generative models on pixels: Image GPT and AIM as chains of stages that read and write artifacts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

LONGEST = 200  # characters of what is said of a command line, into which a shell may put a thousand names

Commands = dict[str, tuple[Callable[..., None], str]]  # name: function, example (shown at the end of its help)
COMMANDS: Commands = {
    "encode": (images.encode, "pixseq encode photos/ --palette palette.json --size 32 -o train.zarr"),
    "decode": (images.decode, "pixseq decode train.zarr -o grid.png"),
    "pretrain": (training.pretrain, "pixseq pretrain train.zarr --preset igpt-s --val val.zarr -o model"),
    "features": (measuring.features, "pixseq features model train.zarr -o train.features.zarr"),
    "probe": (measuring.probe, "pixseq probe train.features.zarr --test test.features.zarr --plot probe.png"),
    "finetune": (training.finetune, "pixseq finetune model train.zarr --val-fraction 0.1 -o tuned"),
    "evaluate": (measuring.evaluate, "pixseq evaluate tuned test.zarr"),
    "sample": (images.sample, "pixseq sample model --prompt test.zarr --keep 0.5 --count 8 -o halves.png"),
    "frechet": (measuring.frechet, "pixseq frechet completions.features.zarr real.features.zarr"),
    "check": (measuring.check, "pixseq check model test.zarr"),
    "show": (measuring.show, "pixseq show train.zarr --verify"),
    "bench": (bench.bench, "pixseq bench pretrain sample --nanogpt nanoGPT/ --size 32 --memory"),
}
# group: help, its commands
GROUPS: dict[str, tuple[str, Commands]] = {
    "palette": (
        "Fit and look at colour palettes.",
        {
            "fit": (images.palette_fit, "pixseq palette fit cifar-10-python.tar.gz --colors 512 -o palette.json"),
            "show": (images.palette_show, "pixseq palette show palette.json -o swatch.png"),
        },
    ),
    "scaling": (
        "Study how pixels scale: IsoFLOP profiles, laws, forecasts.",
        {
            "plan": (scaling.plan, "pixseq scaling plan grid.yaml -o plan"),
            "run": (scaling.run, "pixseq scaling run plan --jobs 2"),
            "fit": (scaling.fit, "pixseq scaling fit plan -o fit.json --plot fit.png"),
            "compare": (scaling.compare, "pixseq scaling compare fit.json --budget 7.0e+19"),
            "forecast": (
                scaling.forecast,
                "pixseq scaling forecast fit.json --growth 4.5 --start-flops 1.0e+21 --resolution 32,64,128",
            ),
        },
    ),
    "import": (
        "Turn published weights into checkpoints.",
        {
            "hf": (weights.import_hf, "pixseq import hf imagegpt-small/ -o model"),
            "openai": (
                weights.import_openai,
                "pixseq import openai igpt-s/model.ckpt-1000000 --palette kmeans_centers.npy -o model",
            ),
            "aim": (
                weights.import_aim,
                "pixseq import aim aim_600m_2bimgs_attnprobe_backbone.pth --head aim_600m_head_last.pth -o model",
            ),
        },
    ),
    "export": (
        "Turn checkpoints into what other programs open.",
        {"hf": (weights.export_hf, "pixseq export hf model -o my-imagegpt")},
    ),
}


def _add(group: typer.Typer, commands: Commands) -> None:
    for name, (function, example) in commands.items():
        group.command(name, epilog=f"Example: {example}")(function)


_add(app, COMMANDS)
for name, (about, commands) in GROUPS.items():
    group = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None)
    _add(group, commands)
    app.add_typer(group, name=name)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; turn faults into one error line, a hint and an exit code."""
    stdio.secure()
    try:
        signals.heed()
        _run()
    except Stop as stop:
        try:
            _stopped(stop)
        except Stop as again:  # before the first one was answered
            _stopped(again)


def _stopped(stop: Stop) -> None:
    signals.pass_over()
    hint = "nothing was lost: run the command again; encode, features, pretrain and finetune go on with --resume"
    _fail(f"stopped by {stop}", hint, INTERRUPTED)


def _run() -> None:
    try:
        code = app(standalone_mode=False)
        progress.last_words()
        sys.exit(code)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # nobody reads the help that was asked for
            stdio.silence(sys.stdout)
            sys.exit(CLOSED_PIPE)
        raise
    except TyperException as fault:
        _misused(fault)
    except PixseqError as fault:
        _fail(fault.message, fault.hint, fault.code)
    except OSError as fault:
        named = f"{fault.filename}: " if fault.filename else ""
        _fail(f"{named}{fault.strerror or fault}", "check the path, its permissions and the space on its disk", INPUT)
    except Exception as fault:
        if _out_of_memory(fault):
            _fail("out of memory", "choose a smaller --batch-size or --micro-batch", INPUT)
        traceback.print_exc()
        _fail(f"this is a bug in pixseq {__version__}: {fault!r}", "please report it with the lines above", BUG)


def _misused(fault: TyperException) -> None:
    """A command line that typer refuses is told as every other fault is; nothing at all is answered with the help."""
    message, context = fault.format_message(), getattr(fault, "ctx", None)
    if message.startswith("Usage:"):
        progress.tell(message)
        sys.exit(USAGE)
    hint = f"see {'pixseq' if context is None else context.command_path} --help"
    if context is not None:
        command = context.command
        if message.startswith("Missing") and command.epilog:
            hint = f"{command.epilog.replace('Example: ', 'for example ')}; {hint}"
        elif "extra argument" in message and any(parameter.metavar == "SOURCE" for parameter in command.params):
            hint = f"many pictures are one SOURCE: their folder, or - and their paths on stdin; {hint}"
    message = _with_value(message.replace("Value error, ", ""), fault.__cause__)
    _fail(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...", hint, USAGE)


def _with_value(message: str, cause: BaseException | None) -> str:
    """What pydantic says of an "Input" names what was given in its place."""
    errors = getattr(cause, "errors", None)
    if errors is None:
        return message
    return message.replace("Input should", f"{errors()[0]['input']!r} should").partition(", unable to parse")[0]


def _out_of_memory(fault: Exception) -> bool:
    """Python's, or one of torch's, which is not imported here."""
    return (
        isinstance(fault, MemoryError)
        or type(fault).__name__ == "OutOfMemoryError"
        or (isinstance(fault, RuntimeError) and "allocate memory" in str(fault))
    )


def _fail(message: str, hint: str | None, code: int) -> None:
    progress.tell(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""))
    if code == INTERRUPTED:
        signals.leave(code)
    sys.exit(code)
