"""Our logistic regression against scikit-learn's, on sets of every shape; the objective is written out again here."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pixseq.numerics import blocks, curvature, logistic
from pixseq.numerics.labelled import Labelled, held_out_split, standardize
from pixseq.numerics.linear_probe import SOLVERS, Solver, linear_probe, one_blas_thread
from pixseq.numerics.logistic import LogisticPath

CS = (1e-3, 1e-1, 10.0)


def drawn(n, D, K, apart, seed=0, held=200):
    """Blobs of unequal width around K means, standardised; the last `held` rows are held out."""
    rng = np.random.default_rng(seed)
    y = np.arange(n + held) % K
    X = apart * rng.standard_normal((K, D))[y] + rng.standard_normal((n + held, D)) * rng.gamma(1, 1, D)
    X = (X @ (np.eye(D) + rng.standard_normal((D, D)) / D)).astype(np.float32)
    return split(X, y.astype(np.int32), n)


def split(X, y, n):
    train, test = X[:n].copy(), X[n:].copy()
    standardize(train, test)
    return train, y[:n], test, y[n:]


def digits(rows=1200):
    X, y = load_digits(return_X_y=True)  # three columns are constant
    return split(X.astype(np.float32), y, rows)


SETS = {
    "digits": digits,
    "few digits, wider than long": lambda: digits(50),
    "overlapping blobs": lambda: drawn(600, 20, 5, 0.5),
    "separable blobs": lambda: drawn(300, 15, 4, 4),
    "two classes": lambda: drawn(400, 12, 2, 0.5),
    "wide": lambda: drawn(60, 300, 3, 0.2),
    "a hundred and twenty classes of three rows": lambda: drawn(360, 30, 120, 1),
}


def objective(X, y, c, weights, intercept):
    """scikit-learn's, a row, in float64. Weights [D, K]; of two classes its own form, the difference."""
    logits = X.astype(np.float64) @ weights + intercept
    top = logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(y)), y]
    free = weights if weights.shape[1] > 2 else weights[:, 1:] - weights[:, :1]
    return losses.mean() + (free**2).sum() / (2 * c * len(y))


def theirs(X, y, c):
    model = LogisticRegression(C=c, max_iter=3000, tol=1e-6).fit(X.astype(np.float64), y)
    weights, intercept = model.coef_.T, model.intercept_
    if len(intercept) == 1:
        weights, intercept = np.hstack([-weights / 2, weights / 2]), np.array([-intercept[0], intercept[0]]) / 2
    return model, objective(X, y, c, weights, intercept)


@pytest.fixture(autouse=True)
def calm():
    with one_blas_thread():
        yield


@pytest.mark.parametrize("name", SETS)
def test_along_the_path_it_ends_no_higher_than_scikit_learn(name):
    X, y, held_X, held_y = SETS[name]()
    path = LogisticPath(X, y)
    for c in CS:
        found = path.fit(c)
        model, least = theirs(X, y, c)
        assert found.objective == pytest.approx(objective(X, y, c, found.weights, found.intercept), rel=1e-6)
        assert found.objective <= least * (1 + 1e-6) + 1e-6
        assert found.converged and found.gradient <= 1e-4
        apart = (found.predict(held_X) == held_y).mean() - model.score(held_X, held_y)
        assert abs(apart) <= max(1e-3, 1.1 / len(held_y))
        right = model.predict_log_proba(held_X)[np.arange(len(held_y)), held_y].sum()
        assert found.log_loss(held_X, held_y) == pytest.approx(-right, rel=0.01)


def test_large_sets_are_fitted_in_float32_and_blocks_as_well(monkeypatch):
    X, y, *_ = digits()
    exact = [LogisticPath(X, y).fit(c).objective for c in CS]
    monkeypatch.setattr(blocks, "EXACT_CELLS", 0)
    for rows in (2048, 100):
        monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
        assert [LogisticPath(X, y).fit(c).objective for c in CS] == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_the_curvature_is_the_change_of_the_gradient():
    X, y, *_ = digits(300)
    rows, rng = blocks.Rows(X, y, 10), np.random.default_rng(0)
    at, way = (logistic.torch.from_numpy(rng.standard_normal((X.shape[1] + 1, 10)) / 20) for _ in range(2))
    beyond, before = (logistic.evaluate(rows, at + side * 1e-5 * way).gradient for side in (1, -1))
    assert logistic.curve(rows, at, way).numpy() == pytest.approx(((beyond - before) / 2e-5).numpy(), abs=1e-8)


def test_fits_that_are_sure_of_their_rows_need_few_steps():
    """Where curvature changes under way, Newton's; L-BFGS alone takes some hundred."""
    X, y, *_ = digits()
    path = LogisticPath(X, y)
    fits = [path.fit(c) for c in (1.0, 10.0, 100.0)]
    assert all(found.converged and found.n_iter < 40 for found in fits)


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    X, y, *_ = digits()
    monkeypatch.setattr(blocks, "EXACT_CELLS", 0)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 64)
    monkeypatch.setattr(blocks, "SHARED_PRODUCTS", 0)
    one, many = (LogisticPath(X, y, threads=threads).fit(0.1) for threads in (1, 5))
    assert (one.weights == many.weights).all() and one.objective == many.objective


def test_a_sketch_of_the_curvature_serves_where_both_sides_are_long(monkeypatch):
    X, y, *_ = drawn(400, 100, 3, 0.3)
    exact = [LogisticPath(X, y).fit(c) for c in CS]
    monkeypatch.setattr(curvature, "FULL_SIDE", 50)
    monkeypatch.setattr(blocks, "EXACT_CELLS", 0)
    monkeypatch.setattr(curvature, "SKETCHED", 20)
    for c, expected in zip(CS, exact):
        found = LogisticPath(X, y).fit(c)
        assert found.objective == pytest.approx(expected.objective, rel=1e-6, abs=1e-6) and found.converged


@pytest.mark.parametrize("fault", ["offset", "duplicates", "one row a class", "equal rows", "imbalance"])
def test_degenerate_rows_are_fitted(fault):
    X, y, *_ = drawn(200, 10, 4, 0.5)
    if fault == "offset":  # not standardised
        X = X + np.float32(30)
    elif fault == "duplicates":
        X, y = np.repeat(X[:20], 10, axis=0), np.repeat(y[:20], 10)
        X = np.concatenate([X, X[:, :3]], axis=1)
    elif fault == "one row a class":
        X, y = X[:4], y[:4]
    elif fault == "equal rows":
        X = np.zeros_like(X)
    else:
        y = np.where(np.arange(200) < 199, 0, 1)
    for c in (0.01, 1.0):
        found = LogisticPath(X, y).fit(c)
        assert np.isfinite(found.weights).all() and found.converged
        assert found.objective <= theirs(X, y, c)[1] * (1 + 1e-6) + 1e-6


def test_an_unfinished_fit_says_so():
    X, y, *_ = digits()
    found = LogisticPath(X, y, max_iter=2).fit(1.0)
    assert found.n_iter == 2 and not found.converged and found.gradient > 1e-4


def test_a_path_goes_on_from_another_and_needs_few_steps():
    """As the last fit on all of train does."""
    X, y, *_ = digits()
    path = LogisticPath(X[:1000], y[:1000])
    begun = path.fit(0.01)
    plain, after = LogisticPath(X, y).fit(0.01), LogisticPath(X, y, after=(path, begun)).fit(0.01)
    assert after.objective == pytest.approx(plain.objective, rel=1e-6) and after.n_iter < plain.n_iter


def test_memory_of_l_bfgs_is_bounded_where_classes_are_many(monkeypatch):
    X, y, *_ = drawn(360, 30, 120, 1)
    monkeypatch.setattr(logistic, "PAIR_BYTES", 5 * 24 * 31 * 120)
    path = LogisticPath(X, y)
    path.fit(1.0)
    assert len(path.pairs) == 5


def test_both_solvers_choose_the_same_and_measure_alike():
    X, y, test_X, test_y = digits()
    train, test = Labelled(X, y), Labelled(test_X, test_y)
    halves = held_out_split(y, 0.1, 0)
    ours, other = (linear_probe(train, test, halves, [1e-3, 1e-2], solver=Solver(name, tol=1e-6)) for name in SOLVERS)
    assert ours.c == other.c and ours.test_accuracy == pytest.approx(other.test_accuracy, abs=1.1 / len(test_y))
    assert ours.objective <= other.objective * (1 + 1e-6) and ours.gradient < 1e-5 and other.gradient < 1e-4
