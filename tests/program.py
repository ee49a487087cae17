"""The command line run where its libraries are loaded already, which takes a second: in this process, or in a fork."""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
import time
from typing import NamedTuple
from unittest.mock import patch

from typer.main import get_command

from pixseq import cli, progress, signals

FORKING = multiprocessing.get_context("forkserver")
LOADED = ["program", "pixseq.stages.pretrain", "pixseq.stages.features", "pixseq.stages.encode", "pixseq.studies.cell"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def called(*words, folder="."):
    """How `pixseq WORDS` ends in a folder: its exit code, what is on stdout and what on stderr."""
    handlers = {number: signal.getsignal(number) for number in signals.STOPPING}
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["pixseq", *map(str, words)]),
        patch.object(cli, "app", _built(cli.app)),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            progress.enable(False)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Ended(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def good(*words, folder="."):
    """What is on stdout of a command that ends well, without the last newline."""
    code, out, err = called(*words, folder=folder)
    assert code == 0, f"{' '.join(map(str, words))}\n{err}"
    return out.strip()


def forked(*words, folder="."):
    """The process of `pixseq WORDS`, begun in a folder: for what ends it from outside."""
    FORKING.set_forkserver_preload(LOADED)
    process = FORKING.Process(target=_main, args=([*map(str, words)], str(folder)))
    process.start()
    return process


def ended(process):
    """Its exit code, of a signal the number below zero."""
    process.join()
    return process.exitcode


def until(so, alive):
    """Wait till it is so, or the process has ended. How long that may take is for the suite's limit to say."""
    while not so() and alive():
        time.sleep(0.01)


def _main(words, folder):
    os.chdir(folder)
    sys.argv = ["pixseq", *words]
    cli.main()


@functools.cache
def _built(app):
    return get_command(app)  # which takes longer than most of what is run
