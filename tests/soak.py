"""Kills, full disks, read-only folders and second writers over every command of a tiny chain; run by hand.

python tests/soak.py --minutes 10 --seed 0: each trial starts a command, lets one thing go wrong, looks at what is
there, and runs the command again to its end. Exit code 1 if anything that pipelines/promises promises did not hold.
"""

import argparse
import collections
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pixseq.artifacts import checkpoint, disk, layout, locking, owning, publishing
from pixseq.cli import main
from pixseq.errors import PixseqError
from pixseq.stages import encode, features, finetune, pretrain, probe, show  # noqa: F401

TINY = "model: {n_layer: 1, n_head: 2, d_model: 16}\ntrain: {batch_size: 16, steps: 6}\n"
FINE = "finetune: {batch_size: 16, steps: 4, val_every: 2}\n"
GRID = "data: {train: BASE/train.zarr, val: BASE/test.zarr}\nbudgets: [1.0e+9]\nsizes_per_budget: 2\n"
GRID += 'completions: {count: 8}\nprobe: {layers: "0", c: "1"}\n'

BEFORE = {  # what the commands read, in order
    "pal.json": "palette fit digits --colors 8 --size 8 --max-images 200",
    "train.zarr": "encode digits --palette BASE/pal.json --size 8 --limit 200",
    "test.zarr": "encode digits --split test --palette BASE/pal.json --size 8 --limit 100",
    "model": "pretrain BASE/train.zarr --config BASE/tiny.yaml",
    "a.zarr": "features BASE/model BASE/train.zarr",
    "b.zarr": "features BASE/model BASE/test.zarr",
    "hf": "export hf BASE/model",
    "fit.json": "scaling fit BASE/runs.csv --bootstrap 20",
    "study": "scaling plan BASE/grid.yaml --no-calibrate",
}
COMMANDS = {
    "palette": BEFORE["pal.json"],
    "encode": BEFORE["train.zarr"],
    "decode": "decode BASE/train.zarr",
    "pretrain": BEFORE["model"] + " --save-minutes 0.0001",
    "features": BEFORE["a.zarr"] + " --batch-size 16",
    "probe": "probe BASE/a.zarr --test BASE/b.zarr --c 1",
    "knn": "probe BASE/a.zarr --test BASE/b.zarr --method knn",
    "evaluate": "evaluate BASE/model BASE/test.zarr",
    "finetune": "finetune BASE/model BASE/train.zarr --config BASE/fine.yaml --save-minutes 0.0001",
    "sample": "sample BASE/model --count 4",
    "export": BEFORE["hf"],
    "import": "import hf BASE/hf --palette BASE/pal.json",
    "frechet": "frechet BASE/a.zarr BASE/b.zarr --layer 0",
    "plan": BEFORE["study"],
    "swatch": "palette show BASE/pal.json",
    "check": "check BASE/model BASE/test.zarr",
    "import-openai": "import openai BASE/openai",
    "import-aim": "import aim BASE/aim.pth --head BASE/head.pth --heads 2 --size 8",
    "fit": BEFORE["fit.json"],
    "compare": "scaling compare BASE/fit.json",
    "forecast": "scaling forecast BASE/fit.json --growth 4 --start-flops 1e20 --resolution 8 --target loss=2",
    "cell": "scaling run BASE/study --cell r8-b0-s0",  # in a copy of the study
    "run": "scaling run BASE/study",  # the same, in processes of its own
}
RESUMABLE = ("encode", "features", "pretrain", "finetune")
STEPS = [(locking, "write_owner"), (disk, "flush"), (disk, "fsync"), (owning, "delete"), (publishing, "delete")]
STEPS += [(locking, "forget_owner"), (disk, "write_text"), (publishing, "_renamed"), (checkpoint, "save_weights")]
IN_PLACE = ("cell", "run")
FAULTS = ("kill", "kill", "kill", "aimed", "aimed", "aimed", "signal", "two", "full", "read-only")


def start(words, log, aim=None):
    """The process of a command, forked from this one, which has all libraries loaded; `aim`: (module, name, when)."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(handle, number)
        if aim:
            hit(*aim)
        sys.argv = ["pixseq", *words]
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def hit(module, name, call, late):
    """Die at a call of a step, before it or after it."""
    step, calls = getattr(module, name), [0]

    def killed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, killed)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(path):
    """The ids of a study's results; raises PixseqError where anything that its cells have made is broken."""
    made = [p for p in (*path.glob("cells/*/*"), *path.glob("reference/*/*")) if not layout.is_partial(p)]
    ids = {str(p.relative_to(path)): show.run(p, verify=True)["id"] for p in sorted(made)}
    return {name: ids[name] for name in ids if name.endswith("result.json")}


def states(path):
    """What `identity` may say of a study while it is run: of some of the results that it has in the end."""
    plan, all_results = show.run(path, verify=True)["id"], results(path).items()
    parts = (part for n in range(len(all_results)) for part in itertools.combinations(all_results, n))
    return {plan + str(dict(part)) for part in parts}


def identity(path):
    """The content id of a whole artifact, the hash of an export's files; raises PixseqError for a broken one.

    Of a study: the ids of what its cells have made, so far as each has its name.
    """
    if (path / "cells").is_dir():
        return show.run(path, verify=True)["id"] + str(results(path))
    if path.is_dir() and (path / "config.json").exists():
        files = sorted(p for p in path.iterdir() if p.name not in ("README.md", "owner.json"))
        return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()
    return show.run(path, verify=True)["id"]


def foreign(base):
    """Weights of other programs, and a table of runs."""
    from bundle_writer import write_bundle
    from openai_graph import variables
    from test_import_aim import backbone, probe_head

    write_bundle(
        base / "openai" / "model.ckpt-1", variables(layers=1, heads=1, size=8, colours=8, context=64), shards=2
    )
    torch.save(backbone(8, 1), base / "aim.pth")
    torch.save(probe_head(8, 3), base / "head.pth")
    lines = ["params,tokens,flops,loss,resolution"]
    for flops in (1e9, 1e10, 1e11):
        for share in (0.25, 0.5, 1, 2, 4):
            params = share * (flops / 6) ** 0.5
            loss = 1.5 + 40 * params**-0.35 + 60 * (flops / 6 / params) ** -0.35
            lines.append(f"{params:.0f},{flops / 6 / params:.0f},{flops:.4g},{loss:.4f},8")
    (base / "runs.csv").write_text("\n".join(lines) + "\n")


class Soak:
    def __init__(self, base, seed, faults):
        self.base, self.random, self.among = base, random.Random(seed), faults
        self.counts, self.faults = collections.Counter(), []
        self.ids, self.seconds = {}, {}
        for name, text in (("tiny.yaml", TINY), ("fine.yaml", FINE), ("grid.yaml", GRID)):
            (base / name).write_text(text.replace("BASE", str(base)))
        foreign(base)
        for name, line in BEFORE.items():
            self.done(self.words(line, base / name), base / "log")
        for name in COMMANDS:
            began = time.monotonic()
            if name in IN_PLACE:
                shutil.copytree(base / "study", base / f"{name}-whole")
            self.done(self.command(name, base / f"{name}-whole"), base / "log")
            self.seconds[name] = time.monotonic() - began
            self.ids[name] = identity(base / f"{name}-whole")

    def command(self, name, out):
        if name in IN_PLACE:
            return [*COMMANDS[name].replace("BASE/study", str(out)).split(), "-q"]
        return self.words(COMMANDS[name], out)

    def words(self, line, out):
        return [*line.replace("BASE", str(self.base)).split(), "-q", "-o", str(out)]

    def done(self, words, log):
        code = finish(start(words, log))
        if code:
            raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.read_text()}")

    def fault(self, kind, story):
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {story}")

    def trial(self, folder):
        draw = self.random
        name, how, stands = draw.choice(list(COMMANDS)), draw.choice(self.among), draw.random() < 0.6
        if how in ("full", "read-only") and (os.geteuid() or not sys.platform.startswith("linux")):
            how = "kill"  # these mount a disk
        folder.mkdir()
        mounted = how in ("full", "read-only")
        if mounted:
            size = draw.choice(["16k", "40k", "100k", "300k"]) if how == "full" else "64m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            self.tried(folder, name, how, stands and how != "full")
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder)

    def tried(self, folder, name, how, stands):
        target, log, old = folder / "T", self.base / "log", None
        log.write_text("")
        theirs = [folder / "thesis.txt", folder / "T.old.partial" / "log.jsonl"]
        for path in theirs:
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        if name in IN_PLACE:
            shutil.copytree(self.base / "study", target)
        elif stands and name != "plan":  # a plan that stands is replaced in its place
            before = self.base / f"{self.random.choice(sorted(self.ids.keys() - {'plan', *IN_PLACE}))}-whole"
            (shutil.copytree if before.is_dir() else shutil.copy)(before, target)
            old = identity(target)
        words = self.command(name, target) + (["--overwrite"] if old else [])
        told = self.interrupted(words, name, how, folder, log)
        story = f"{name}, {told}{', over an older target' if old else ''}"
        self.counts[f"trials: {how}"] += 1
        begun = states(self.base / f"{name}-whole") if name in IN_PLACE else set()
        self.look(target, {old, self.ids[name], *begun}, old, story)
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        if how == "full":
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        resume = ["--resume"] if name in RESUMABLE else []
        if name in IN_PLACE or not target.exists() or (old and identity(target) == old):
            code = finish(start([*words, *resume], log))
            while code and name == "run" and "another process" in log.read_text():  # a cell of the one that was killed
                log.write_text("")
                time.sleep(1)
                code = finish(start(words, log))
            if code:
                self.fault("cannot go on", f"{story}: {code}\n{log.read_text()[-600:]}")
        self.look(target, {self.ids[name]}, True, f"{story}, then again")
        partial = layout.partial_path(target)
        if partial.exists():  # killed when only tidying was left: the next command that writes there does it
            finish(start([*self.command(name, target), "--overwrite"], log))
            self.look(target, {self.ids[name]}, True, f"{story}, then tidied")
            if partial.exists():
                self.fault("left behind", story)
        if not all(path.read_text() == "x" for path in theirs if path.exists() or self.fault("foreign gone", story)):
            self.fault("foreign changed", story)
        if "Traceback" in log.read_text():
            self.fault("traceback", f"{story}\n{log.read_text()[-800:]}")

    def interrupted(self, words, name, how, folder, log):
        """Run the command and let it go wrong; returns how, in words."""
        if how == "aimed":
            module, step = self.random.choice(STEPS)
            aim = (module, step, self.random.choice([1, 1, 1, 1, 2, 3]), self.random.random() < 0.5)
            code = finish(start(words, log, aim))
            self.counts["kills"] += code == -signal.SIGKILL
            return f"killed at call {aim[2]} of {step} ({'after' if aim[3] else 'before'}), code {code}"
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        child = start(words, log)
        wait = self.random.uniform(0, 1.1 * self.seconds[name])
        if how == "two":
            time.sleep(wait * self.random.random())
            codes = sorted([finish(start(words, log)), finish(child)])
            return f"two writers, codes {codes}"
        if how in ("kill", "signal"):
            number = signal.SIGKILL if how == "kill" else self.random.choice([signal.SIGTERM, signal.SIGINT])
            time.sleep(wait)
            os.kill(child, number)
            code = finish(child)
            self.counts["kills"] += code == -signal.SIGKILL
            if code == 0:  # too late: the next time is drawn from less
                self.seconds[name] = min(self.seconds[name], max(wait, 0.02))
            return f"{signal.Signals(number).name} after {wait:.3f} s, code {code}"
        code = finish(child)
        if code not in (0, 1):
            self.fault("wrong code", f"{name} in a {how} folder: {code}\n{log.read_text()[-600:]}")
        return f"{how} folder, code {code}"

    def look(self, target, ids, needed, story):
        if not os.path.lexists(target):
            if needed:
                self.fault("target lost", story)
            return
        try:
            found = identity(target)
        except (PixseqError, OSError) as error:
            self.fault("broken target", f"{story}: {error}")
            return
        if found not in ids:
            self.fault("wrong id", f"{story}: {found}")


def run(minutes, trials, seed, faults, folder):
    torch.set_num_threads(1)
    base = folder / "base"
    base.mkdir()
    soak, began, made = Soak(base, seed, faults), time.monotonic(), 0
    while made < trials and time.monotonic() - began < 60 * minutes:
        soak.trial(folder / f"trial{made}")
        made += 1
    print(f"{made} trials: " + ", ".join(f"{count} {name}" for name, count in sorted(soak.counts.items())))
    print("\n".join(soak.faults) or "nothing lost, nothing broken")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="which may happen; the default is all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(given.minutes, given.trials, given.seed, given.faults.split(","), Path(scratch)))
