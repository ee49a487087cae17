"""Processes that make rows: the same as threads make, whatever becomes of them, and none is left."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixseq
from pixseq.data import images, processes, resample
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, Stop
from pixseq.numerics import quantize
from pixseq.stages import encode, palette

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


@pytest.fixture
def pictures(tmp_path):
    """Of all kinds, in two classes, and one that is cut."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for i in range(48):
        height, width = rng.integers(9, 60, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        kind = ("RGB", "L", "CMYK", "RGBA", "I;16", "turned")[i % 6]
        options = {"exif": TURNED} if kind == "turned" else {}
        if kind == "I;16":
            image = Image.fromarray(rng.integers(0, 4000, (height, width), np.uint16))
        elif kind != "turned":
            image = image.convert(kind)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "ab"[i % 2] / f"{i:02}.{'png' if kind in ('RGBA', 'I;16') else 'jpg'}", **options)
    (folder / "b" / "99.jpg").write_bytes((folder / "a" / "00.jpg").read_bytes()[:400])
    return folder


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """Whatever is read, processes read it: those that were begun, and how many chunks they made."""
    begun, made, begin, chunk = [], [], processes._begin, processes.Processes.chunk

    def beginning(socket):
        begun.append(begin(socket))
        return begun[-1]

    def counting(self, *given):
        made.append(chunk(self, *given))
        return made[-1]

    monkeypatch.setattr(images, "WORTH", 1)
    monkeypatch.setattr(images, "usable_cores", lambda: 3)
    monkeypatch.setattr(images, "DECODE_CHUNK", 3)
    monkeypatch.setattr(images, "DECODE_SECONDS", 0)
    monkeypatch.setattr(processes, "_begin", beginning)
    monkeypatch.setattr(processes.Processes, "chunk", counting)
    yield begun, made
    assert all(process.returncode is not None for process in begun)


def told(source, prep, workers, **options):
    """All that a reader says of a source."""
    reader = Reader(open_source(str(source)), prep, batch_size=20, workers=workers, **options)
    batches = list(reader)
    joined = [
        np.concatenate([getattr(batch, name) for batch in batches]).tolist()
        for name in ("images", "labels", "numbers", *(("shapes",) if prep.resize == "whole" else ()))
    ]
    return joined, [batch.stop for batch in batches], reader.counts, reader.problems


@pytest.mark.parametrize("options", [{}, {"views": 2}, {"resize": "whole", "background": "red"}], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_they_make_what_threads_make(pictures, options, compiled, worth_it, monkeypatch):
    if not compiled:
        monkeypatch.setattr(resample, "made", lambda: None)
    prep = Preparation(size=8, on_error="skip", **options)
    alone = told(pictures, prep, 0)
    assert not worth_it[1]
    assert told(pictures, prep, 2) == alone and alone[2]["skipped"] == 1 and len(alone[2]) > 5
    assert len(worth_it[1]) > 9 and None not in worth_it[1]
    rows = np.arange(1, 49, 3)
    assert told(pictures, prep, 2, rows=rows, start=2) == told(pictures, prep, 0, rows=rows, start=2)


def test_they_make_rows_of_bytes_that_we_read(pictures, tmp_path, worth_it):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, path in enumerate(sorted(pictures.rglob("*.*"))):
            for name, data in ((f"{i:03}{path.suffix}", path.read_bytes()), (f"{i:03}.cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    prep = Preparation(size=8, on_error="skip")
    assert told(tmp_path / "x.tar", prep, 2) == told(tmp_path / "x.tar", prep, 0)
    assert worth_it[1] and None not in worth_it[1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no folder is opened by its descriptor")
def test_files_that_only_we_see_are_read(pictures):
    prep, handle = Preparation(size=8, on_error="skip"), os.open(pictures, os.O_RDONLY)
    try:
        alone = told(f"/dev/fd/{handle}", prep, 0)
        assert told(f"/dev/fd/{handle}", prep, 2) == alone and alone[2]["skipped"] == 1
    finally:
        os.close(handle)


def test_a_fault_is_told_as_by_threads(pictures):
    faults = []
    for workers in (0, 2):
        with pytest.raises(PixseqError) as fault:
            told(pictures, Preparation(size=8), workers)
        faults.append((fault.value.message, fault.value.hint))
    assert faults[0] == faults[1] and "99.jpg" in faults[0][0]


def test_nothing_is_lost_with_those_that_are_killed(pictures, worth_it):
    prep, (begun, made) = Preparation(size=8, on_error="skip"), worth_it
    alone, found = told(pictures, prep, 0)[0][0], []
    for batch in Reader(open_source(str(pictures)), prep, batch_size=6, workers=3):
        found += batch.images.tolist()
        for process in begun[: len(found) // 9]:
            process.kill()
    assert found == alone and None in made and len(made) > made.count(None)


def test_threads_serve_where_there_are_none(pictures, monkeypatch, worth_it):
    prep = Preparation(size=8, on_error="skip")
    alone = told(pictures, prep, 0)
    for path in ("", "/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", path)
        worth_it[1].clear()
        assert told(pictures, prep, 2) == alone
        assert worth_it[1].count(None) == len(worth_it[1]) > 9


def test_few_files_and_one_worker_are_not_worth_it(pictures, monkeypatch, worth_it):
    prep = Preparation(size=8, on_error="skip")
    told(pictures, prep, 1)
    monkeypatch.setattr(images, "WORTH", 50)
    told(pictures, prep, 2)
    assert not worth_it[0]
    monkeypatch.setattr(images, "WORTH", 49)
    told(pictures, prep, 2)
    assert len(worth_it[0]) == 2


def test_there_are_no_more_than_cores(pictures, monkeypatch, worth_it):
    """Many threads are asked for where a disk is slow; as many interpreters would take their time and memory."""
    prep = Preparation(size=8, on_error="skip")
    alone = told(pictures, prep, 0)
    assert told(pictures, prep, 20) == alone and len(worth_it[0]) == 3
    monkeypatch.setattr(images, "usable_cores", lambda: 1)
    assert told(pictures, prep, 20) == alone and len(worth_it[0]) == 3


def test_large_pictures_wait_for_room(pictures, monkeypatch):
    asked = []

    class Room(images.Room):
        def entered(self):
            asked.append(self)
            return super().entered()

    monkeypatch.setattr(images, "Room", Room)
    monkeypatch.setattr(processes, "UNASKED", 1_000_000)
    for i in range(9):
        Image.new("RGB", (400, 400), (i, 0, 0)).save(pictures / "a" / f"x{i}.png")
    prep = Preparation(size=8, on_error="skip")
    reader = Reader(open_source(str(pictures)), prep, workers=3)
    assert sum(len(batch.images) for batch in reader) == 57
    assert len(asked) == 9 and reader.room.left == reader.room.most


def test_a_reader_that_is_left_ends_them(pictures, worth_it):
    batches = iter(Reader(open_source(str(pictures)), Preparation(size=8, on_error="skip"), batch_size=6, workers=2))
    next(batches)
    assert [process.poll() for process in worth_it[0]] == [None, None]
    batches.close()
    assert [process.returncode for process in worth_it[0]] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("stage", ["encode", "palette fit"])
def test_a_signal_while_they_end_is_told_as_any(pictures, tmp_path, monkeypatch, stage):
    """The first comes where no picture is read, and ends them; another meanwhile must not fall into a collection."""
    end, lost = processes._end, []

    def stopped(*given):
        raise Stop("a signal")

    def ending(begun):
        end(begun)
        stopped()

    class Short(Reader):
        """Of short batches: it has not come to its end."""

        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.batch_size = 6

    monkeypatch.setattr(images, "Reader", Short)
    monkeypatch.setattr(processes, "_end", ending)
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr(quantize, "add_to_histogram", stopped)
    monkeypatch.setattr(encode, "_say_source", stopped)
    with pytest.raises(Stop):
        if stage == "encode":
            encode.run(str(pictures), tmp_path / "x.zarr", scheme="pixels", size=8, on_error="skip", workers=2)
        else:
            palette.run_fit(str(pictures), tmp_path / "x.json", split="all", size=8, on_error="skip", workers=2)
    assert not lost


PROGRAM = """
import itertools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are begun without it
from pixseq.data import images, processes, records
from pixseq.data.preparation import Preparation
begin, pids = processes._begin, []
def beginning(socket):
    process = begin(socket)
    pids.append(process.pid)
    return process
processes._begin = beginning
def read(start, stop):
    return (records.ImageFile("x", sys.argv[1]) for _ in itertools.count())
source = records.Source("paths", "x", "all", None, None, False, read)
images.WORTH, images.usable_cores = 1, lambda: 2
try:
    for batch in images.Reader(source, Preparation(size=8), workers=2):
        print(*pids, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_none_outlives_us(pictures, number):
    """Ctrl-C comes to all of a terminal, and they say nothing of it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pixseq.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pictures / "a" / "00.jpg")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as program:
        pids = [int(word) for word in program.stdout.readline().split()]
        os.killpg(program.pid, number)
        program.stdout.read()
        assert program.stderr.read() == b"" and program.wait() == (130 if number == signal.SIGINT else -number)
    ends = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


NAMES = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from pixseq.data import images, sources
from pixseq.data.preparation import Preparation
images.WORTH, images.usable_cores = 1, lambda: 2
for workers in (0, 2):
    reader = images.Reader(sources.open_source(sys.argv[2]), Preparation(size=8, on_error="skip"), workers=workers)
    print([int(batch.images.sum()) for batch in reader], reader.counts)
"""


def test_their_interpreter_is_as_ours(pictures, tmp_path):
    """Names of files are of its encoding, and -I keeps out what is not installed."""
    (tmp_path / "sitecustomize.py").write_text("open(__file__ + '.ran', 'w')")
    (pictures / "a" / "00.jpg").rename(pictures / "a" / "00é.jpg")
    apart = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(tmp_path)}
    modules = f"{Path(pixseq.__file__).parents[1]}:{Path(np.__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-I", "-X", "utf8", "-c", NAMES, modules, pictures],
        env={**os.environ, **apart},
        capture_output=True,
        text=True,
        check=True,
    )
    alone, with_them = done.stdout.splitlines()
    assert alone == with_them and "'skipped': 1" in alone
    assert not (tmp_path / "sitecustomize.py.ran").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="threads are counted by Linux")
def test_they_begin_no_threads(pictures, monkeypatch, worth_it):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    batches = iter(Reader(open_source(str(pictures)), Preparation(size=8, on_error="skip"), batch_size=20, workers=2))
    next(batches)
    told = [Path(f"/proc/{process.pid}/status").read_text() for process in worth_it[0]]
    assert len(told) == 2 and all("\nThreads:\t1\n" in each for each in told)
    batches.close()
