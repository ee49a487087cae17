"""Random numbers: every purpose has a stream of its own, named in one place, and no two streams meet."""

import ast
from pathlib import Path

import numpy as np
import pytest

from pixseq.data.preparation import CROP, SHORTER, Preparation
from pixseq.engine import batches
from pixseq.numerics.orders import order_of
from pixseq.streams import Stream

PACKAGE = Path(__file__).parent.parent / "pixseq"
FILES = sorted(PACKAGE.rglob("*.py"))
SEEDING = ("default_rng", "generator", "SeedSequence", "RandomState", "manual_seed", "seed")
MADE_IN = PACKAGE / "runtime" / "__init__.py"  # where a generator is made of the numbers that it is given
AFTER_THE_SEED = {
    *("PROBE_SPLIT", "PROBE_TIE", "PROBE_SUBSET", "CURVATURE_SKETCH"),
    *("ATTENTIVE_ORDER", "FRECHET_FLOOR", "FRECHET_KID"),
    *("BENCH_PICTURES", "BENCH_TOKENS", "BENCH_FEATURES", "BENCH_PALETTE", "BENCH_SIDES"),
}


def seedings(path: Path):
    """(call, what it is seeded with) wherever a file seeds a random generator."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in SEEDING:
            parts = node.args
            if len(parts) == 1 and isinstance(parts[0], ast.List | ast.Tuple):
                parts = parts[0].elts
            yield ast.unparse(node), [ast.unparse(part) for part in parts]


def test_no_two_streams_have_one_number():
    numbers = [int(stream) for stream in Stream.__members__.values()]
    assert len(set(numbers)) == len(numbers) > 20


@pytest.mark.parametrize("path", [p for p in FILES if p != MADE_IN], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_generator_is_seeded_with_one_stream_behind_what_tells_its_draws_apart(path):
    for call, parts in seedings(path):
        if call == "np.random.RandomState(seed)":  # of another kind, as scikit-learn seeds it: none of these streams
            assert path.name == "weighted_kmeans.py"
            continue
        streams = [part.removeprefix("Stream.") for part in parts if part.startswith("Stream.")]
        assert len(streams) == 1 and streams[0] in Stream.__members__, call
        behind = parts.index(f"Stream.{streams[0]}") >= 2
        assert behind or "default_rng" not in call or streams[0] in AFTER_THE_SEED, call


def test_every_stream_is_drawn_from():
    drawn = {part.removeprefix("Stream.") for path in FILES for _, parts in seedings(path) for part in parts}
    assert set(Stream.__members__) <= drawn


def test_runs_see_the_batches_that_they_always_saw():
    expected = [np.random.default_rng([3, epoch]).permutation(10) for epoch in range(2)]
    assert np.array_equal(batches.batch_indices(3, 0, 20, 10), np.concatenate(expected))


def test_a_random_order_is_no_order_of_an_epoch():
    order = order_of("random", 5, 4, seed=3)
    assert not any(np.array_equal(order, batches.batch_indices(3, epoch, 20, 20)) for epoch in range(50))


def test_random_views_draw_what_no_training_draws():
    """View 0 of picture 0 was once what shuffles epoch 0."""
    (left, _, right, _), *_ = Preparation(size=8, resize="crop", views=2).boxes(100, 100, 0)
    drawn = 100 * CROP / (right - left)  # the shorter side of the picture that the crop was drawn from
    for other in ([0, 0], [0, 0, 1]):
        assert abs(drawn - np.random.default_rng(other).uniform(*SHORTER)) > 1e-3
