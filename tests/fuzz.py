"""A seeded mutator of every kind of artifact and source: nothing but errors for users comes out of what reads them.

    python tests/fuzz.py 3000 [SEED]        so many mutations of each kind, by hand
    python tests/fuzz.py 3000 1 store npz   of these kinds

A kind is a function that makes a sound example in a folder. It returns what reads such a folder, and may return
command lines beside, of which one takes the reader's place in a share of the mutations; they run through the program's
own main(). By hand, all of it runs under a limit of the address space and of time.
"""

import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_artifacts
import fuzz_sources
import fuzz_studies
import fuzz_weights
import yaml
from program import called

from pixseq.errors import DIVERGED, INPUT, USAGE, PixseqError

KINDS = {
    make.__name__: make for each in (fuzz_artifacts, fuzz_sources, fuzz_weights, fuzz_studies) for make in each.KINDS
}
COMMANDS = 0.05  # of the mutations of a kind that has command lines are met by one
MOST = 1 << 30  # bytes beside what the program itself takes
LONGEST, WAITED = 30, 600  # seconds of computing, and of waiting on a busy machine
ODD = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e300, 10**30, 2**31, 2**63, "", "x", "\0", "../x", "9" * 30, "\u202e",
    [], {}, [[]], [None], {"": 0}, [1, 2], ["a"], {"a": {}}, [0] * 40,
)  # fmt: skip


class Hangs(BaseException):
    """Nothing that reads may take it for an error of its own."""


# ---- how it is mutated


def mutate(folder, rng):
    """Change something in one file of the folder; returns what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing is left"
    path = rng.choice(files)
    data = path.read_bytes()
    where = path.relative_to(folder)
    if rng.random() < 0.6 and path.suffix in (".json", ".jsonl", ".yaml"):
        with contextlib.suppress(ValueError, IndexError, yaml.YAMLError):  # it was damaged before, or holds nothing
            return f"{where}: {_restructure(path, data, rng)}"
    if rng.random() < 0.02:
        path.unlink()
        return f"{where}: removed"
    done, changed = _scramble(bytearray(data), rng)
    path.write_bytes(changed)
    return f"{where}: {done}"


def _restructure(path, data, rng):
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else None
    found = json.loads(lines[-1]) if lines else yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(min(len(value), 50)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    if isinstance(found, dict | list):
        walk(found)
    holder, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "class_names", "shape"))] = rng.choice(ODD)
    else:
        holder[key] = rng.choice(ODD)
    text = yaml.safe_dump(found) if path.suffix == ".yaml" else json.dumps(found)
    path.write_text("\n".join([*(lines or [])[:-1], text]) + "\n")
    return f"{key} of {str(holder)[:80]}"


def _scramble(data, rng):
    how, at = rng.choice(("flip", "cut", "byte", "bytes", "insert", "double", "number")), rng.randrange(len(data) or 1)
    if not data or how == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 20))
    elif how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "byte":
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("["), ord("-")))
    elif how == "bytes":
        data[at : at + 8] = rng.randbytes(8)
    elif how == "double":
        data[at:at] = data[max(at - 64, 0) : at]
    else:
        data[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**24)).to_bytes(4, rng.choice(("little", "big")))
    return f"{how} at {at}", bytes(data)


# ---- how it is met


def fuzz(name, count, seed=0, say=None, first=0, before=None, share=COMMANDS):
    """Mutations `first` to `count` of one kind: (what was done, what came out) of each that was met by anything but an
    error. `say` is told of each, `before` is called with the number of every mutation; `share`: of command lines.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        sound, kept, trial, made = (Path(scratch, part) for part in ("sound", "kept", "trial", "made"))
        sound.mkdir(), kept.mkdir()
        read, *commands = _parts(KINDS[name](sound, kept))
        for number in range(first, count):
            if before:
                before(number)
            rng = random.Random(f"{name} {seed} {number}")
            shutil.copytree(sound, trial)
            made.mkdir()
            done = [mutate(trial, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
            line = rng.choice(commands) if commands and rng.random() < share else None
            if line:
                done.append(line)
                line = line.replace("HERE", str(trial)).replace("KEPT", str(kept)).replace("OUT", f"{made}/out")
            fault = _fault(ran, line.split(), made / "out") if line else _fault(read, trial)
            if fault:
                found.append((f"{name} {seed} {number}: {'; '.join(done)}", fault))
                if say:
                    say(found[-1])
            shutil.rmtree(trial), shutil.rmtree(made)
    return found


def _parts(returned):
    return returned if isinstance(returned, tuple) else (returned,)


def _fault(call, *args):
    """What came out of a call but an error for users; None: nothing."""

    def late(number, frame):
        raise Hangs

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    signal.alarm(WAITED)
    try:
        call(*args)
    except PixseqError as error:
        if "allocate" in error.message or "MemoryError" in error.message:
            return traceback.format_exc()  # it was refused when the memory was gone
    except OSError:  # a line for the user
        pass
    except (Exception, Hangs):
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return None


def ran(words, out):
    """Run a command line within this process. Raises AssertionError for another end than the promised ones."""
    from pixseq.stages import show

    code, _, said = called(*words)
    assert code in (0, INPUT, USAGE, DIVERGED), f"exit code {code}: {said}"
    assert "Traceback" not in said and "out of memory" not in said, said
    assert code == 0 or said.startswith("error: ") or "\nerror: " in said, said
    assert code == 0 or not out.exists(), f"exit code {code}, and there is {out}: {said}"
    if out.exists() and (out.is_file() or not (out / "config.json").exists()):  # not what others open
        show.run(out, verify=True)


def limit_memory():
    """For all that follows: so much beside what is taken already, the libraries that readers load among it."""
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch  # noqa: F401

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST, taken + MOST))


def apart(name, count, seed):
    """The faults of so many mutations, each said, in processes of their own: what ends one is a fault too."""
    place = mmap.mmap(-1, 16)  # the number of the mutation that is met, and the faults so far

    def at(number=None, faults=None):
        now = struct.unpack("qq", place[:])
        if number is not None:
            place[:] = struct.pack("qq", number, now[1] if faults is None else faults)
        return now

    at(0, 0)
    while at()[0] < count:
        child = os.fork()
        if not child:
            try:
                first = at()[0]
                fuzz(name, count, seed, lambda each: (at(at()[0], at()[1] + 1), print(*each, sep="\n")), first, at)
                at(count)
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number, faults = at()
        if number < count:
            print(f"{name} {seed} {number}: the process ended with {code}", flush=True)
            if code == 1:  # the mutator itself
                return faults + 1
            at(number + 1, faults + 1)
    return at()[1]


def main(count, seed, names):
    import warnings

    warnings.simplefilter("ignore")
    limit_memory()
    total = 0
    for name in names or KINDS:
        began = time.monotonic()
        faults = apart(name, count, seed)
        total += faults
        print(f"{name}: {count} mutations, {faults} faults, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{count * len(names or KINDS)} mutations, {total} faults")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:]))
