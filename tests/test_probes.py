"""Probes against scikit-learn called directly and against slow, obvious references, on the digits."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pixseq.engine.probing import concat_window
from pixseq.numerics.knn import knn_predict
from pixseq.numerics.labelled import Labelled, held_out_split, standardize
from pixseq.numerics.linear_probe import (
    Solver,
    _search,
    cross_validated_c,
    linear_probe,
    low_data_probe,
    one_blas_thread,
)
from pixseq.numerics.voting import vote
from pixseq.streams import Stream


@pytest.fixture(scope="module")
def digits():
    """Standardised train [1200, 64] and test [597, 64]."""
    X, y = load_digits(return_X_y=True)
    train, test = X[:1200].astype(np.float32), X[1200:].astype(np.float32)
    standardize(train, test)
    return Labelled(train, y[:1200]), Labelled(test, y[1200:])


@pytest.fixture(autouse=True)
def calm():
    with one_blas_thread():
        yield


# ---- scaling and splitting


def test_standardize_uses_the_statistics_of_train_and_zeroes_constants():
    rng = np.random.default_rng(0)
    train = rng.normal(3, [5, 0.1, 1e-3], (5000, 3)).astype(np.float32)
    train = np.concatenate([train, np.full((5000, 1), 0.1, np.float32), np.zeros((5000, 1), np.float32)], axis=1)
    test = train[:10] + np.float32(1)
    expected = (test - train.mean(axis=0, dtype=np.float64)) / train.std(axis=0, dtype=np.float64).clip(1e-9)
    standardize(train, test)
    assert np.allclose(train[:, :3].mean(axis=0), 0, atol=1e-3) and np.allclose(train[:, :3].std(axis=0), 1, atol=1e-3)
    assert np.allclose(test[:, :3], expected[:, :3], rtol=1e-3, atol=1e-2)
    assert (train[:, 3:] == 0).all() and (test[:, 3:] == 0).all()


def test_the_held_out_part_is_stratified_seeded_and_disjoint():
    y = np.repeat([0, 1, 2], [100, 50, 2])
    fit, held = held_out_split(y, 0.1, seed=0)
    assert sorted([*fit, *held]) == list(range(152))
    assert np.bincount(y[held]).tolist() == [10, 5, 1]
    again, other = held_out_split(y, 0.1, seed=0), held_out_split(y, 0.1, seed=1)
    assert (again[1] == held).all() and (other[1] != held).any()


def test_a_class_is_never_held_out_whole():
    fit, held = held_out_split(np.array([0, 0, 1]), 0.9, seed=0)
    assert held.tolist() in ([0], [1]) and 2 in fit
    with pytest.raises(ValueError, match="one image"):
        held_out_split(np.arange(5), 0.1, seed=0)


# ---- logistic regression


def test_the_probe_equals_scikit_learn_called_directly(digits):
    train, test = digits
    cs = [1e-3, 1e-2, 1e-1]
    split = fit, held = held_out_split(train.y, 0.1, seed=0)
    found = linear_probe(train, test, split, cs, solver=Solver(tol=1e-6))

    scores = []
    for c in cs:
        direct = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(train.X[fit], train.y[fit])
        scores.append(direct.score(train.X[held], train.y[held]))
    best = cs[int(np.argmax(scores))]
    direct = LogisticRegression(C=best, max_iter=1000, tol=1e-6).fit(train.X, train.y)
    assert [tried.val_accuracy for tried in found.tried] == pytest.approx(scores[: len(found.tried)])
    assert (found.c, found.val_accuracy) == (best, pytest.approx(max(scores)))
    assert found.test_accuracy == pytest.approx(direct.score(test.X, test.y), abs=1.1 / len(test.y))
    assert found.converged and 0 < found.n_iter < 1000


def test_a_warm_started_path_ends_at_scikit_learns_coefficients(digits):
    train = Labelled(digits[0].X.astype(np.float64), digits[0].y)
    split = held_out_split(train.y, 0.1, seed=0)
    fit, held = (train.take(part) for part in split)
    _, best, found = _search(Solver(tol=1e-7).path(fit), held, [1e-3, 1e-2], 0)
    direct = LogisticRegression(C=best.c, max_iter=1000, tol=1e-7).fit(train.X[split[0]], train.y[split[0]])
    assert np.allclose(found.weights.T, direct.coef_, atol=1e-5)
    # Only the differences of intercepts are determined.
    assert np.allclose(found.intercept - found.intercept[0], direct.intercept_ - direct.intercept_[0], atol=1e-4)


def test_small_cs_that_tell_nothing_yet_do_not_end_the_search():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [12, 8]).astype(np.int32)
    data = Labelled((rng.normal(size=(20, 3)) + 3 * y[:, None]).astype(np.float32), y)
    found = linear_probe(data, data, (np.arange(0, 20, 2), np.arange(1, 20, 2)), [1e-7, 1e-6, 1e-5, 1])
    assert [tried.val_accuracy for tried in found.tried[:3]] == [0.6] * 3 and found.test_accuracy > 0.9


def test_two_classes_work_along_the_warm_started_path(digits):
    train, test = (side.take(np.flatnonzero(side.y < 2)) for side in digits)
    found = linear_probe(train, test, held_out_split(train.y, 0.1, 0), [1e-3, 1e-2, 1e-1])
    assert found.test_accuracy > 0.95


def test_class_numbers_need_not_be_consecutive(digits):
    train, test = digits
    split = held_out_split(train.y, 0.1, 0)
    plain = linear_probe(train, test, split, [0.01])
    spread = linear_probe(Labelled(train.X, 3 * train.y + 5), Labelled(test.X, 3 * test.y + 5), split, [0.01])
    assert plain == spread  # bit for bit, the gradient too


def test_larger_cs_are_left_out_once_accuracy_falls():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 600)
    X = rng.normal(size=(600, 300)).astype(np.float32)
    X[:, 0] += 2 * y  # one telling feature among 299 of noise: weak regularisation overfits
    data = Labelled(X, y)
    found = linear_probe(data, data, held_out_split(y, 0.3, 0), [1e-3, 1e-2, 1e-1, 1, 10, 100])
    assert [tried.c for tried in found.tried] == [1e-3, 1e-2, 1e-1, 1, 10, 100][: len(found.tried)]
    assert len(found.tried) < 6 and found.c < found.tried[-1].c


def test_equal_accuracy_goes_to_the_smaller_c():
    X = np.repeat(np.float32([[-1], [1]]), 20, axis=0)
    data = Labelled(X, np.repeat([0, 1], 20))
    found = linear_probe(data, data, held_out_split(data.y, 0.2, 0), [1, 10, 0.1])
    assert found.c == 0.1 and [tried.c for tried in found.tried] == [0.1, 1, 10]


def test_an_unfinished_fit_is_reported_not_warned_of(digits):
    train, test = digits
    with warnings.catch_warnings(record=True) as seen:
        found = linear_probe(train, test, held_out_split(train.y, 0.1, 0), [0.1], solver=Solver(max_iter=3))
    assert not found.converged and found.n_iter == 3 and not seen


# ---- low data and neighbouring layers


def test_low_data_fits_exactly_the_labels_asked_for(digits, monkeypatch):
    train, test = digits
    seen = []
    choose = cross_validated_c
    monkeypatch.setattr(
        "pixseq.numerics.linear_probe.cross_validated_c",
        lambda subset, *rest: (seen.append(subset), choose(subset, *rest))[1],
    )
    found = low_data_probe(train, test, labels_per_class=4, trials=3)
    for subset, c, accuracy in zip(seen, found.cs, found.test_accuracies, strict=True):
        assert np.bincount(subset.y).tolist() == [4] * 10
        direct = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(subset.X.astype(np.float64), subset.y)
        assert accuracy == pytest.approx(direct.score(test.X, test.y), abs=1.1 / len(test.y))


def test_low_data_chooses_c_by_the_loss_of_left_out_labels(digits):
    train, _ = digits
    order = np.argsort(train.y, kind="stable").reshape(-1)
    subset = train.take(np.concatenate([order[train.y[order] == label][:4] for label in range(10)]))
    cs, losses = [1e-3, 1e-2, 1e-1, 1.0], []
    for c in cs:
        losses.append(0)
        for left_out in range(4):
            held = np.arange(40) % 4 == left_out
            direct = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(subset.X[~held], subset.y[~held])
            losses[-1] -= np.log(direct.predict_proba(subset.X[held])[np.arange(10), subset.y[held]]).sum()
    assert cross_validated_c(subset, 4, cs, Solver(tol=1e-6))[0] == cs[int(np.argmin(losses))]


def test_low_data_mean_and_std_are_over_different_seeded_subsets(digits):
    train, test = digits
    found = low_data_probe(train, test, 4, trials=3, seed=1)
    assert found == low_data_probe(train, test, 4, trials=3, seed=1)
    assert found.test_accuracies[:2] == low_data_probe(train, test, 4, trials=2, seed=1).test_accuracies
    assert len(set(found.test_accuracies)) > 1
    assert found.mean == pytest.approx(sum(found.test_accuracies) / 3)
    assert found.std == pytest.approx((sum((a - found.mean) ** 2 for a in found.test_accuracies) / 2) ** 0.5)
    assert low_data_probe(train, test, 4, trials=1, cs=[0.1]).std is None
    assert 0.5 < found.mean < 0.95


def test_low_data_refuses_what_it_cannot_do(digits):
    train, test = digits
    with pytest.raises(ValueError, match="one class has"):
        low_data_probe(train, test, 1000, 1)
    with pytest.raises(ValueError, match="none to choose C"):
        low_data_probe(train, test, 1, 1)
    assert low_data_probe(train, test, 1, 1, cs=[0.1]).mean > 0.2


@pytest.mark.parametrize(
    ("best", "count", "window"),
    [(4, 5, [2, 3, 4, 5, 6]), (0, 5, [0, 1, 2, 3, 4]), (8, 5, [4, 5, 6, 7, 8]), (4, 99, list(range(9))), (3, 1, [3])],
)
def test_concatenated_layers_are_centred_and_clipped(best, count, window):
    assert list(concat_window(best, count, 9)) == window


# ---- votes over masks


def test_the_modal_class_wins_and_ties_fall_at_random_but_seeded():
    votes = np.tile([3, 3, 1, 2, 2], 2000)  # 3 and 2 tie, 1 never wins
    winners = vote(votes, 5, np.random.default_rng(0))
    assert set(winners) == {2, 3} and 900 < (winners == 3).sum() < 1100
    assert (winners == vote(votes, 5, np.random.default_rng(0))).all()
    assert vote(np.array([0, 0, 4, 4, 4, 1]), 3, np.random.default_rng(0)).tolist() == [0, 4]
    assert vote(np.array([5, 6]), 1, np.random.default_rng(0)).tolist() == [5, 6]


def test_masks_are_split_by_image_fitted_by_row_and_scored_by_vote(digits):
    train, test = digits
    rng = np.random.default_rng(0)

    def masked(data, M=3):
        X = np.repeat(data.X, M, axis=0)
        return Labelled(X * (rng.random(X.shape) > 0.3), data.y, M)

    train, test = masked(train).take(np.arange(300)), masked(test)
    assert train.X.shape == (900, 64) and train.row_labels[:6].tolist() == np.repeat(train.y[:2], 3).tolist()
    split = held_out_split(train.y, 0.2, 0)
    found = linear_probe(train, test, split, [0.01], solver=Solver(tol=1e-6))
    direct = LogisticRegression(C=0.01, max_iter=1000, tol=1e-6).fit(train.X, train.row_labels)
    by_row = direct.predict(test.X)
    voted = vote(by_row, 3, np.random.default_rng([0, Stream.PROBE_TIE]))
    assert found.test_accuracy == pytest.approx((voted == test.y).mean(), abs=1.1 / len(test.y))
    assert found.test_accuracy > (by_row == test.row_labels).mean()


# ---- nearest neighbours


def slow_knn(X, y, queries, k, temperature):
    unit = lambda v: v / np.sqrt((v * v).sum())  # noqa: E731
    found = []
    for query in queries.astype(np.float64):
        cosines = np.array([unit(row) @ unit(query) for row in X.astype(np.float64)])
        votes = np.zeros(10)
        for i in np.argsort(-cosines)[:k]:
            votes[y[i]] += np.exp(cosines[i] / temperature)
        found.append(votes.argmax())
    return np.array(found)


def test_knn_equals_a_slow_reference_whatever_the_block(digits, monkeypatch):
    train, test = digits
    train, queries = train.take(np.arange(200)), test.X[:40]
    slow = slow_knn(train.X, train.y, queries, 20, 0.07)
    assert (knn_predict(train, queries) == slow).all()
    monkeypatch.setattr("pixseq.numerics.knn.CELLS_AT_ONCE", 1)
    assert (knn_predict(train, queries) == slow).all()
    monkeypatch.setattr("pixseq.numerics.knn.CELLS_AT_ONCE", 70 * 8)  # three blocks of rows
    assert (knn_predict(train, queries) == slow).all()
    assert (slow == test.y[:40]).mean() > 0.8


def test_labels_may_be_any_numbers_and_cost_no_memory(digits, monkeypatch):
    """Labels of hashes: a table up to the largest would take terabytes."""
    train, test = digits
    ids = np.random.default_rng(0).choice(2**31 - 1, 10, replace=False).astype(np.int32)
    ids[3] = 2**31 - 1
    hashed = Labelled(train.X, ids[train.y])
    plain = knn_predict(train, test.X)
    assert (knn_predict(hashed, test.X) == ids[plain]).all()
    votes = np.random.default_rng(1).integers(0, 10, 3000)
    voted = vote(votes, 3, np.random.default_rng(0))
    order = np.sort(ids)  # ties fall alike where the classes stand in one order
    assert (vote(order[votes], 3, np.random.default_rng(0)) == order[voted]).all()
    monkeypatch.setattr("pixseq.numerics.voting.CELLS_AT_ONCE", 70)
    assert (vote(votes, 3, np.random.default_rng(0)) == voted).all()


def test_knn_weights_near_neighbours_more():
    train = Labelled(np.float32([[1, 0], [1, 1], [1, 1.01]]), np.array([7, 2, 2]))
    assert knn_predict(train, np.float32([[1, 0.01]]), k=3).tolist() == [7]
    assert knn_predict(train, np.float32([[1, 0.01]]), k=3, temperature=100).tolist() == [2]


def test_knn_refuses_more_neighbours_than_rows():
    with pytest.raises(ValueError, match="k is 20, but there are only 3"):
        knn_predict(Labelled(np.ones((3, 2), np.float32), np.arange(3)), np.ones((1, 2), np.float32))
