"""read: JPEG files to rows of pixels, as palette and encode take them; Pillow decodes them in as many processes, and
makes nothing of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image

from pixseq.bench import drawn
from pixseq.bench.settings import US, Bench, Copy, Task, Work
from pixseq.cores import usable_cores
from pixseq.data.folders import open_paths
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.streams import Stream

# Pixels. Of one size all would be decoded fast, or all slowly: libjpeg-turbo writes rows past the cache where Pillow's
# memory for one begins at a multiple of 32 bytes, which it does for half of the widths.
SIDES = (320, 481)
MEAN = sum(SIDES) // 2
QUALITY = 90  # a fifth of a byte a pixel, as of photographs
DIFFERENT = 64  # files, which are read again and again


def read(bench: Bench) -> Task:
    s, cores = bench.settings, usable_cores()

    def ours() -> Callable[[], None]:
        source = open_paths("drawn", _saved(bench), "all")

        def call() -> None:
            for _ in Reader(source, Preparation(size=s.size), workers=cores):
                pass

        return call

    def pillow() -> Callable[[], None]:
        ways = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
        pool, paths = ProcessPoolExecutor(cores, mp_context=context), _saved(bench)

        def call() -> None:
            list(pool.map(decode, [paths[first::cores] for first in range(cores)]))

        return call

    ways = {US: ours, "pillow": pillow}
    works = tuple(Work(by, None, prepare) for by, prepare in ways.items() if by in (US, *bench.peers))
    about = f"{s.count:,} JPEGs of some {MEAN}x{MEAN} to {s.size}x{s.size}, {cores} at once"
    return Task(about, s.count, "images", Copy(), 3 * s.count * (MEAN**2 + s.size**2), works)


def decode(paths: Sequence[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.load()


def _saved(bench: Bench) -> list[str]:
    """A path for each picture."""
    paths = [bench.scratch / f"{i}.jpg" for i in range(min(DIFFERENT, bench.settings.count))]
    if not paths[0].exists():
        seed = bench.settings.seed
        sides = np.random.default_rng([seed, Stream.BENCH_SIDES]).integers(*SIDES, (len(paths), 2))
        for path, picture, (height, width) in zip(paths, drawn.pictures(len(paths), SIDES[1], seed), sides):
            Image.fromarray(picture[:height, :width]).save(path, quality=QUALITY)
    return [str(paths[i % len(paths)]) for i in range(bench.settings.count)]
