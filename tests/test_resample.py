"""Pictures resized in C have Pillow's bytes, and where there is no such code Pillow makes them."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixseq import native
from pixseq.data import resample as resampling
from pixseq.data.resample import FILTERS, GIVEN, MOST_SIDE, resample
from pixseq.stages import encode

SOURCE = Path(resampling.__file__).with_suffix(".c")


@pytest.fixture(scope="module")
def code():
    made = native.library(SOURCE, GIVEN)
    if made is None:
        pytest.skip("there is no C compiler here")
    return made


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process that finds any resize worth compiling for."""
    monkeypatch.setattr(resampling, "WORTH", 1)
    made = resampling._Code()
    monkeypatch.setattr(resampling, "_code", made)
    return made


def pillow(picture, size, method, box):
    return np.asarray(picture.resize(size, method, box).convert("RGB"))


def drawn_box(rng, width, height, whole):
    if whole:
        return (0, 0, width, height)
    x, y = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
    if rng.random() < 0.5:
        x, y = x.round(), y.round()
    return tuple(float(v) for v in (x[0], y[0], x[1], y[1]))


@pytest.mark.parametrize("seed", range(4))
def test_code_makes_pillows_bytes(code, seed):
    rng = np.random.default_rng(seed)
    for _ in range(250):
        most = int(rng.choice([8, 70, 300]))
        (width, height), size = rng.integers(1, most, 2).tolist(), tuple(rng.integers(1, most, 2).tolist())
        pixels = rng.integers(0, 256, (height, width, 3) if rng.random() < 0.7 else (height, width), dtype=np.uint8)
        if rng.random() < 0.3:  # what overshoots
            pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
        box, method = drawn_box(rng, width, height, rng.random() < 0.3), FILTERS[rng.integers(5)]
        image = Image.fromarray(pixels).copy()
        expected = pillow(image, size, method, box)
        for pictures in (image, pixels[None]):
            made = resampling._in_c(code, pictures, size, method, box)
            assert np.array_equal(made[0], expected), (width, height, size, method, box, pixels.ndim)


@pytest.mark.parametrize(
    "sides",
    [
        ((4096, 3), (5, 3)),
        ((65536, 2), (1, 1)),
        ((2, 4096), (2, 7)),
        ((1, 1), (4096, 1)),
        ((3, 900), (40, 8)),
        ((1500, 700), (1, 1)),
    ],
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_code_makes_pillows_bytes_of_long_pictures(code, sides, channels):
    (width, height), size = sides
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    for method in FILTERS:
        made = resampling._in_c(code, pixels[None], size, method, (0, 0, width, height))
        assert np.array_equal(made[0], pillow(Image.fromarray(pixels), size, method, None))


def test_pillow_serves_for_lines_that_would_take_much_memory(code, fresh):
    fresh.ready = code
    for shape in ((2, MOST_SIDE + 1), (MOST_SIDE + 1, 2)):
        pixels = np.arange(2 * (MOST_SIDE + 1)).astype(np.uint8).reshape(shape)
        assert resampling._in_c(code, pixels[None], (4, 3), FILTERS[1], (0, 0, *shape[::-1])) is None
        made = resample(pixels[None], (4, 3), FILTERS[1])
        assert np.array_equal(made[0], pillow(Image.fromarray(pixels), (4, 3), FILTERS[1], None))


def test_pillow_serves_for_pictures_that_are_not_in_one_place(code, fresh):
    fresh.ready, block = code, Image.core.get_block_size()
    Image.core.set_block_size(1 << 16)
    try:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)).copy()
    finally:
        Image.core.set_block_size(block)
    assert resampling._in_c(code, image, (8, 9), FILTERS[1], (0, 0, 200, 300)) is None
    assert np.array_equal(resample(image, (8, 9), FILTERS[1])[0], pillow(image, (8, 9), FILTERS[1], None))


def test_a_stack_is_made_as_each_of_its_pictures(code):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)[:, ::-1]
    box = (1.5, 2, 28, 19.25)
    made = resampling._in_c(code, pixels, (8, 9), FILTERS[3], box)
    assert np.array_equal(made, [pillow(Image.fromarray(each), (8, 9), FILTERS[3], box) for each in pixels])


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("height", [1, 2, 5, 33])
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_read_beyond_a_picture(code, channels, height, at_end):
    """It lies between pages that may not be read."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    space = mmap.mmap(-1, 6 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(space))
    for edge in (first, first + 5 * page):
        assert libc.mprotect(ctypes.c_void_p(edge), page, 0) == 0
    for width in (1, 2, 3, 5, 17, 39):
        size = height * width * (3 if channels else 1)
        pixels = np.frombuffer(space, np.uint8, size, 5 * page - size if at_end else page)
        pixels = pixels.reshape(height, width, *channels)
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape)
        for made in ((7, 5), (40, 1)):
            for box in ((0, 0, width, height), (width - 0.5, height - 0.5, width, height)):
                resized = resampling._in_c(code, pixels[None], made, FILTERS[4], box)
                assert np.array_equal(resized[0], pillow(Image.fromarray(pixels.copy()), made, FILTERS[4], box))


@pytest.mark.parametrize("channels", [(), (3,)])
def test_pillow_copies_a_large_picture_by_and_by(channels, monkeypatch):
    rng, given, real = np.random.default_rng(0), [], Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda pixels: given.append(pixels.shape) or real(pixels))
    monkeypatch.setattr(resampling, "BAND", 400)
    for n in range(200):
        (width, height), size = rng.integers(21, 70, 2).tolist(), tuple(rng.integers(1, 70, 2).tolist())
        pixels = rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)
        box = drawn_box(rng, width, height, n % 2)
        given.clear()
        made = resampling._in_pillow(pixels[None], size, FILTERS[n % 5], box)
        if not resampling._is_down_first((width, height), size):
            assert all(h * w <= 400 for h, w, *_ in given[:-1])
        assert np.array_equal(made[0], np.asarray(real(pixels).resize(size, FILTERS[n % 5], box))), (
            width,
            height,
            size,
        )


def test_pillow_serves_until_there_is_code(code, fresh):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).copy()
    expected = pillow(image, (8, 8), FILTERS[1], (5, 0, 45, 40))
    ends = time.monotonic() + 60
    while fresh.ready is None and time.monotonic() < ends:
        assert np.array_equal(resample(image, (8, 8), FILTERS[1], (5, 0, 45, 40))[0], expected)
    assert fresh.ready is not None
    assert np.array_equal(resample(image, (8, 8), FILTERS[1], (5, 0, 45, 40))[0], expected)
    with pytest.raises(ValueError, match="box"):  # Pillow says what is wrong
        resample(image, (8, 8), FILTERS[1], (5, 0, 51, 40))


@pytest.mark.parametrize(
    "of",
    [
        lambda pictures, method: method == FILTERS[4],
        lambda pictures, method: getattr(pictures, "mode", "") == "L",
        lambda pictures, method: np.shape(pictures)[3:] == (3,),
    ],
)
def test_code_that_makes_other_bytes_is_not_used(of, code, monkeypatch):
    assert resampling._is_right(code)
    real = resampling._in_c
    monkeypatch.setattr(resampling, "_in_c", lambda *given: real(*given) ^ np.uint8(of(given[1], given[3])))
    assert not resampling._is_right(code)


def test_a_store_is_the_same_with_and_without_a_compiler(code, fresh, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "x").mkdir()
    for i, (width, height) in enumerate(rng.integers(8, 90, (12, 2)).tolist()):
        pixels = rng.integers(0, 256, (height, width, 3) if i % 3 else (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "x" / f"{i}.{('jpg', 'png')[i % 2]}")
    records = []
    monkeypatch.setenv("CC", "")
    for ready in (None, code):
        fresh.ready = ready
        for name, options in {"crop": {}, "whole": {"resize": "whole"}, "views": {"views": 2}}.items():
            out = tmp_path / f"{name}{len(records)}.zarr"
            records.append(encode.run(str(tmp_path / "x"), out, size=8, scheme="pixels", **options)["id"])
        assert fresh.ready is ready
    assert records[:3] == records[3:]


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """One that says where it is, and does not end by itself."""
    script = tmp_path / "cc"
    script.write_text(
        f'#!/bin/sh\ntouch "$TMPDIR/x.s"\necho $$ > {tmp_path}/x\nmv {tmp_path}/x {tmp_path}/pid\nsleep 1000\n'
    )
    script.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.parametrize("threads", [False, True])
def test_a_compiler_at_work_ends_with_the_program_and_leaves_nothing(slow_compiler, threads):
    """With threads that still compute, which are not waited for, too."""
    program = (
        "import sys, threading, time, os; from pathlib import Path; from pixseq import native, signals\n"
        f"threading.Thread(target=time.sleep, args=[{99 * threads}], daemon=True).start()\n"
        "held = native.Compiler(Path('x.c'), [])\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "signals.leave(3)"
    )
    pid = slow_compiler / "pid"
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", program, str(pid)], env=environment, timeout=60)
    assert ended.returncode == 3 and not list((slow_compiler / "tmp").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
