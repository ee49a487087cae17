"""probe: one layer's features, every C, the last fit and its score, as the stage does it."""

from __future__ import annotations

from collections.abc import Callable

from pixseq.bench import drawn
from pixseq.bench.settings import US, Bench, Product, Task, Work
from pixseq.cores import usable_cores
from pixseq.numerics.labelled import Labelled, held_out_split, standardize
from pixseq.numerics.linear_probe import DEFAULT_CS, Solver, linear_probe, one_blas_thread

TEST = 0.2  # of the images, beside `count` to fit on and choose by
HELD_OUT = 0.1


def probe(bench: Bench) -> Task:
    s, width = bench.settings, bench.settings.shape().d_model

    def by(solver: Solver) -> Callable[[], Callable[[], str]]:
        def prepare() -> Callable[[], str]:
            X, y = drawn.features(s.count + max(int(TEST * s.count), s.classes), width, s.classes, s.seed)
            standardize(X[: s.count], X[s.count :])
            train, test = Labelled(X[: s.count], y[: s.count]), Labelled(X[s.count :], y[s.count :])
            split = held_out_split(train.y, HELD_OUT, s.seed)

            def call() -> str:
                with one_blas_thread():
                    found = linear_probe(train, test, split, seed=s.seed, solver=solver)
                return f"objective {found.objective:.6f} at C {found.c:g}"

            return call

        return prepare

    ways = {US: by(Solver("pixseq", str(bench.where.device), usable_cores()))}
    ways["scikit-learn"] = by(Solver("sklearn"))
    works = tuple(Work(name, None, prepare) for name, prepare in ways.items() if name in (US, *bench.peers))
    about = f"{s.count:,} rows of {width} features, {s.classes} classes, {len(DEFAULT_CS)} values of C"
    return Task(about, s.count, "images", Product(s.count, width, width), 2 * s.count * width**2, works)
