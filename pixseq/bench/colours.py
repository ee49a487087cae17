"""palette and encode, whole: from a file of pictures to an artifact; peers work on pixels in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.bench import drawn
from pixseq.bench.settings import US, Bench, Copy, Task, Work
from pixseq.numerics.quantize import COLOURS, unpack
from pixseq.stages import encode as encoding
from pixseq.stages import palette as fitting
from pixseq.streams import Stream

MINIBATCH = 16384  # pixels: faster, and better, than scikit-learn's 1024 for so many centres
FAISS_ITERATIONS = 25  # its default


def palette(bench: Bench) -> Task:
    s = bench.settings

    def ours() -> Callable[[], str]:
        source, out = _saved(bench), bench.scratch / "fitted.json"

        def call() -> str:
            fitted = fitting.run_fit(str(source), out, colors=s.colors, size=s.size, seed=s.seed, overwrite=True)
            return f"mse {fitted['summary']['mse']:.2f}"

        return call

    def scikit() -> Callable[[], str]:
        from sklearn.cluster import MiniBatchKMeans

        pixels = _pixels(bench)

        def call() -> str:
            fit = MiniBatchKMeans(s.colors, batch_size=MINIBATCH, n_init=1, random_state=s.seed).fit(pixels)
            return f"mse {fit.inertia_ / len(pixels):.2f}"

        return call

    def faiss() -> Callable[[], str]:
        import faiss

        pixels = _pixels(bench)

        def call() -> str:
            fit = faiss.Kmeans(
                3, s.colors, niter=FAISS_ITERATIONS, seed=s.seed, max_points_per_centroid=len(pixels), verbose=False
            )
            fit.train(pixels)
            return f"mse {fit.obj[-1] / len(pixels):.2f}"

        return call

    return _task(bench, "to a palette", 3, {US: ours, "scikit-learn": scikit, "faiss": faiss})


def encode(bench: Bench) -> Task:
    s = bench.settings

    def ours() -> Callable[[], None]:
        source, out, colors = _saved(bench), bench.scratch / "tokens.zarr", bench.scratch / "palette.json"
        _save_palette(colors, _centres(bench))

        def call() -> None:
            encoding.run(str(source), out, palette=colors, size=s.size, overwrite=True)

        return call

    def scikit() -> Callable[[], None]:
        from sklearn.cluster import KMeans

        pixels, centres = _pixels(bench), _centres(bench)
        fit = KMeans(len(centres), init=centres, n_init=1, max_iter=1).fit(centres)

        def call() -> None:
            fit.predict(pixels)

        return call

    def faiss() -> Callable[[], None]:
        import faiss

        pixels, index = _pixels(bench), faiss.IndexFlatL2(3)
        index.add(_centres(bench))

        def call() -> None:
            index.search(pixels, 1)

        return call

    return _task(bench, "to tokens", 5, {US: ours, "scikit-learn": scikit, "faiss": faiss})


def _task(bench: Bench, about: str, bytes_a_pixel: int, ways: dict[str, Callable[[], Callable[[], Any]]]) -> Task:
    """At least the pixels are read, and in encoding tokens of two bytes written."""
    s = bench.settings
    works = tuple(Work(by, None, prepare) for by, prepare in ways.items() if by in (US, *bench.peers))
    pixels = s.count * s.size**2
    about = f"{s.count:,} pictures of {s.size}x{s.size} {about} of {s.colors} colours"
    return Task(about, s.count, "images", Copy(), bytes_a_pixel * pixels, works)


def _saved(bench: Bench) -> Path:
    """The pictures as a source of images."""
    path = bench.scratch / "pictures.npy"
    if not path.exists():
        np.save(path, drawn.pictures(bench.settings.count, bench.settings.size, bench.settings.seed))
    return path


def _pixels(bench: Bench) -> np.ndarray:
    """Of the same pictures, float32 [n, 3]."""
    return np.load(_saved(bench)).reshape(-1, 3).astype(np.float32)


def _centres(bench: Bench) -> np.ndarray:
    """Colours to encode by, all different: float32 [K, 3] of 0 .. 255."""
    rng = np.random.default_rng([bench.settings.seed, Stream.BENCH_PALETTE])
    codes = rng.choice(COLOURS, bench.settings.colors, replace=False)
    return unpack(codes).astype(np.float32)


def _save_palette(path: Path, centres: np.ndarray) -> None:
    from pixseq.artifacts.palette import save_palette

    save_palette(path, centres.astype(np.float64) / 127.5 - 1, "bench", {}, {}, {}, overwrite=True)
