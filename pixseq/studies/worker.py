"""A process that runs the cells of a study one after another, as it is told: torch and a device are loaded once.

It reads ids from standard input, one a line, and answers each with a line of JSON: {"error": null or why it failed}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from pixseq import signals
from pixseq.artifacts.plan import Cell
from pixseq.choices import Precision
from pixseq.cores import usable_cores
from pixseq.errors import INTERRUPTED, Interrupted, PixseqError, Stop
from pixseq.runtime import JOBS
from pixseq.studies.study import Study

# glibc gives large blocks back to the system at once, and small models spend a third of their time fetching them again
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 28))
STOPPED = "a signal stopped it"  # it alone, which is no fault of its cell
GRACE_SECONDS = 60.0  # for cells to save their state when the run is stopped


@dataclass
class Worker:
    """Such a process, seen from the one that started it. `cell` is what it works on, None while it waits."""

    device: str
    process: subprocess.Popen
    errors: IO[str]
    cell: Cell | None = None
    began: float = 0.0

    @classmethod
    def start(cls, study: Study, devices: Sequence[str], device: str, precision: Precision) -> Worker:
        """One of several that share the cores of this machine: one a device of `devices`, which may be alike."""
        jobs = len(devices)
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process outlives this function)
        command = [sys.executable, "-m", "pixseq.studies.worker", str(study.path), device, precision]
        shares = {JOBS: str(devices.count(device))}
        shares |= {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(usable_cores() // jobs, 1))}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**KEEP_MEMORY, **os.environ, **shares},
            start_new_session=True,  # a Ctrl-C reaches the first process alone, which then stops the cells in order
        )
        return cls(device, process, errors)

    def give(self, cell: Cell) -> None:
        self.cell, self.began = cell, time.monotonic()
        try:
            self.asked.write(cell.id + "\n")
            self.asked.flush()
        except BrokenPipeError:
            pass  # it has died, which its answer says

    def answer(self) -> dict[str, Any] | None:
        """What it says of its cell, None while it works."""
        if not select.select([self.answers], [], [], 0)[0]:
            return None
        line = self.answers.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if code in (INTERRUPTED, *(-number for number in signals.STOPPING)):
            return {"error": STOPPED}
        self.errors.seek(0)
        last = [line for line in self.errors.read().splitlines() if line.strip()][-1:]
        return {"error": f"its process ended with {code}" + "".join(f" ({line.strip()})" for line in last)}

    @property
    def asked(self) -> IO[str]:
        """Its stdin, a pipe."""
        return cast(IO[str], self.process.stdin)

    @property
    def answers(self) -> IO[str]:
        """Its stdout, a pipe."""
        return cast(IO[str], self.process.stdout)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Let it end, which it does at once where it waits."""
        self.asked.close()
        self.process.wait()
        self.answers.close()
        self.errors.close()


def stop(workers: list[Worker]) -> None:
    """Let every cell save its state and end."""
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


# ---- inside the process


def main(path: str, device: str, precision: Precision) -> None:
    from pixseq.studies import cell
    from pixseq.studies.study import open_study

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        error = None
        try:
            cell.run_named(open_study(path), line.strip(), device, precision)
        except Interrupted:
            raise Stop("a signal") from None
        except PixseqError as fault:
            error = fault.message
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
        answers.write(json.dumps({"error": error}) + "\n")


if __name__ == "__main__":
    signals.heed()
    try:
        study, device, precision = sys.argv[1:]
        main(study, device, cast(Precision, precision))  # as `start` gives them
    except Stop:
        signals.pass_over()
        signals.leave(INTERRUPTED)
