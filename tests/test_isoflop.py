"""IsoFLOP parabolas: exact where theory says so, biased by the published amounts where it does not."""

import numpy as np
import pytest

from pixseq.numerics import isoflop

CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
THREEFOLD = {**CHINCHILLA, "alpha": 0.465, "beta": 0.155}  # alpha / beta = 3, the same sum
BALANCED = {**CHINCHILLA, "alpha": 0.31, "beta": 0.31}
BUDGETS = np.geomspace(1e17, 1e21, 5)


def best_size(surface, C):
    """N of the least loss under C = 6 N D."""
    alpha, beta = surface["alpha"], surface["beta"]
    gain = alpha * surface["A"] / (beta * surface["B"])
    return gain ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))


def loss(surface, N, D):
    return surface["E"] + surface["A"] * N ** -surface["alpha"] + surface["B"] * D ** -surface["beta"]


def grid(surface, width, sizes=15, off_centre=1.0, drift=1.0):
    """log N, loss, budget index: sizes from 1/width to width times the best one (times `off_centre`, drifting)."""
    centres = best_size(surface, BUDGETS) * off_centre * np.geomspace(1, drift, len(BUDGETS))
    N = (centres[:, None] * np.geomspace(1 / width, width, sizes)).ravel()
    D = np.repeat(BUDGETS, sizes) / (6 * N)
    return np.log(N), loss(surface, N, D), np.repeat(np.arange(len(BUDGETS)), sizes)


SIX_ND = isoflop.Ratio(0.0, 60.0, np.zeros(1))


def profile(*points):
    return isoflop.profile(*points, np.log(BUDGETS), SIX_ND)


def tokens_error(surface, found, C=1e24):
    """Relative error of the extrapolated D_opt."""
    exponent, coefficient = found.tokens_law
    return np.exp(coefficient + exponent * np.log(C)) / (C / 6 / best_size(surface, C)) - 1


# ---- the pieces


def test_budgets_are_groups_of_like_flops():
    flops = np.array([2.1e11, 1e11, 4e11, 2e11, 1.05e11, 4.1e11, 1.099e11])
    budgets, index = isoflop.group_budgets(flops)
    assert budgets.tolist() == [1.05e11, 2.05e11, 4.05e11]
    assert index.tolist() == [1, 0, 2, 1, 0, 2, 0]
    assert len(isoflop.group_budgets(np.array([1e11, 1.11e11]))[0]) == 2


def test_a_parabola_gives_back_its_vertex_singly_and_in_a_batch():
    x = np.log(np.geomspace(1e5, 3e6, 6))
    rows = np.stack([2 + 0.3 * (x - 13) ** 2, 1 - 0.1 * (x - 12) ** 2])
    both = isoflop.parabola(x, rows)
    assert both.vertex == pytest.approx([13, 12]) and both.value == pytest.approx([2, 1])
    assert both.curvature == pytest.approx([0.3, -0.1]) and np.allclose(both.fitted, rows)
    single = isoflop.parabola(x, rows[0])
    assert float(single.vertex) == pytest.approx(13) and single.fitted.shape == (6,)
    assert np.isnan(isoflop.parabola(x, np.ones(6)).vertex)


def test_a_power_law_is_a_line_in_logs_over_the_budgets_used():
    log_c, log_v = np.log(BUDGETS), np.array([3.0, 4, np.nan, 7, 7.5])
    used = np.isfinite(log_v)
    exponent, intercept = isoflop.power_law(log_c, log_v, used)
    assert [exponent, intercept] == pytest.approx(np.polyfit(log_c[used], log_v[used], 1))


def test_the_flops_ratio_is_smooth_over_shapes_and_constant_where_only_rounding_varies():
    rng = np.random.default_rng(0)
    d = np.arange(64, 1024, 48)
    N = 12 * 6 * d.astype(float) ** 2
    ratio = 1 + 1024 / (6 * d)
    tokens = rng.uniform(1e8, 1e9, len(N))
    curve = isoflop.flops_ratio(N, tokens, 6 * N * tokens * ratio)
    assert not curve.constant and not curve.plain
    assert np.exp(curve(np.log(N))) == pytest.approx(ratio, rel=0.03)
    assert curve(np.log(N[-1]) + 5) == curve(np.log(N[-1]))
    log_d = curve.log_tokens(np.log(6 * N * tokens * ratio), np.log(N))
    assert np.exp(log_d) == pytest.approx(tokens, rel=0.03)

    rounded = isoflop.flops_ratio(N, tokens, 6 * N * tokens * rng.uniform(0.995, 1.005, len(N)))
    assert rounded.constant and rounded.plain
    third = isoflop.flops_ratio(N, tokens, 2 * N * tokens)
    assert third.constant and not third.plain


# ---- where theory says there is no error, and how large it says the error is elsewhere


@pytest.mark.parametrize("width", [2, 16])
def test_equal_exponents_and_centred_grids_give_the_exact_laws(width):
    found = profile(*grid(BALANCED, width))
    assert found.status == ["ok"] * 5
    assert found.params_law[0] == pytest.approx(0.5, abs=1e-9) and found.tokens_law[0] == pytest.approx(0.5, abs=1e-9)
    assert tokens_error(BALANCED, found) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("surface", "narrow", "wide"), [(CHINCHILLA, 0.003, 0.051), (THREEFOLD, 0.017, 0.23)], ids=["0.34/0.28", "3"]
)
def test_the_bias_of_parabolas_is_the_published_one(surface, narrow, wide):
    """arXiv 2603.22339: without any noise, D_opt at 1e24 FLOPs is off by 0.3 % to 5.1 % on the Chinchilla surface and
    by 1.7 % to 23 % where alpha / beta is 3, for grids that reach 2 to 16 times from the optimum. It is too small; the
    exponents, whose slices are alike at every budget, are right. This is why the law is fitted directly beside it."""
    errors = [tokens_error(surface, profile(*grid(surface, width))) for width in (2, 4, 8, 16)]
    assert errors[0] == pytest.approx(-narrow, rel=0.12) and errors[-1] == pytest.approx(-wide, rel=0.02)
    assert (np.diff(errors) < 0).all()
    exponent = surface["alpha"] / (surface["alpha"] + surface["beta"])
    assert profile(*grid(surface, 16)).tokens_law[0] == pytest.approx(exponent, abs=1e-6)


def test_a_constant_offset_of_the_grid_keeps_the_exponent_and_a_drift_does_not():
    true = 0.34 / 0.62
    constant = profile(*grid(CHINCHILLA, 8, off_centre=3))
    drifting = profile(*grid(CHINCHILLA, 8, drift=3))
    assert constant.tokens_law[0] == pytest.approx(true, abs=1e-6)
    assert abs(tokens_error(CHINCHILLA, constant)) > 0.01
    assert abs(drifting.tokens_law[0] - true) > 1e-3


# ---- budgets that cannot be used


def test_budgets_without_an_inside_minimum_are_left_out_by_name():
    log_n, y, index = grid(BALANCED, 4, sizes=7)
    y = y.copy()
    y[index == 0] = 3 - 0.1 * (log_n[index == 0] - log_n[index == 0].mean()) ** 2
    keep = ~((index == 1) & (log_n > np.quantile(log_n[index == 1], 0.45)))
    found = profile(log_n[keep], y[keep], index[keep])
    assert found.status == ["not convex", "too few runs", "ok", "ok", "ok"] and found.parabolas[1] is None
    assert found.params_law[0] == pytest.approx(0.5, abs=1e-9)

    beyond = profile(*grid(BALANCED, 4, sizes=7, off_centre=6))
    assert beyond.status == ["edge"] * 5 and beyond.params_law is None and beyond.tokens_law is None


# ---- the bootstrap


def test_resampled_residuals_spread_as_fresh_noise_does():
    log_n, y, index = grid(BALANCED, 4, sizes=7)
    rng = np.random.default_rng(0)
    exponents, spreads = [], []
    for _ in range(40):
        noisy = y * np.exp(0.003 * rng.standard_normal(len(y)))
        found = profile(log_n, noisy, index)
        picks = rng.random((200, len(y)))
        params, tokens = isoflop.bootstrap(found, log_n, noisy, index, np.log(BUDGETS), SIX_ND, picks)
        assert np.isfinite(params).all() and params.shape == (200, 2)
        assert params[:, 0] + tokens[:, 0] == pytest.approx(np.ones(200))
        exponents.append(found.params_law[0])
        spreads.append(params[:, 0].std())
    assert np.mean(spreads) == pytest.approx(np.std(exponents), rel=0.3)  # 40 draws tell a deviation to 11 %


def test_a_resample_without_three_inside_minima_fails():
    log_n, y, index = grid(BALANCED, 4, sizes=7, off_centre=3.5)
    noisy = y * np.exp(0.02 * np.random.default_rng(3).standard_normal(len(y)))
    found = profile(log_n, noisy, index)
    assert found.params_law is not None
    picks = np.random.default_rng(0).random((300, len(y)))
    params, tokens = isoflop.bootstrap(found, log_n, noisy, index, np.log(BUDGETS), SIX_ND, picks)
    assert 0 < np.isnan(params[:, 0]).sum() < 300 and (np.isnan(params) == np.isnan(tokens)).all()


# ---- runs far off


@pytest.mark.parametrize("sizes", [5, 7, 9])
@pytest.mark.parametrize("surface", [CHINCHILLA, THREEFOLD, BALANCED])
def test_ordinary_runs_are_not_far_off(surface, sizes):
    """Neither by noise, nor by a bend that is no parabola's, on grids wide, narrow, or beside the optimum."""
    for width, off_centre, noise in ((4, 1, 0.005), (10, 1, 0.0), (3, 3, 0.0), (4, 0.3, 0.002)):
        log_n, y, index = grid(surface, width, sizes, off_centre)
        for seed in range(4):
            noisy = y * np.exp(noise * np.random.default_rng(seed).standard_normal(len(y)))
            far, scattered = isoflop.far_off(log_n, noisy, index, np.ones(len(y)))
            assert not far.any() and not scattered.any()


@pytest.mark.parametrize(
    "bad",
    [{9: 3.8}, {13: 1.2}, {7: 0.5}, {9: 2.0, 23: 1.5}, {10: 2.0, 11: 1.5}, {2: 1.3, 9: 1.3, 16: 1.3, 23: 1.3, 30: 1.3}],
    ids=["one", "largest", "too good", "two budgets", "two in one budget", "one in every budget"],
)
def test_runs_far_off_are_found_and_leave_the_laws_where_the_others_put_them(bad):
    log_n, y, index = grid(CHINCHILLA, 4, sizes=7)
    y = y * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(y)))
    spoilt = y.copy()
    for run, times in bad.items():
        spoilt[run] *= times
    found = profile(log_n, spoilt, index)
    assert np.flatnonzero(~found.used).tolist() == sorted(bad) and found.status == ["ok"] * 5
    assert found.tokens_law[0] == pytest.approx(profile(log_n, y, index).tokens_law[0], abs=0.02)


def test_four_sizes_do_not_tell_which_run_is_bad_so_the_budget_is_not_used():
    log_n, y, index = grid(CHINCHILLA, 4, sizes=4)
    y[5] *= 3
    found = profile(log_n, y, index)
    assert found.used.all() and found.status == ["ok", "scattered", "ok", "ok", "ok"]


def test_weights_are_those_of_repeated_runs():
    x = np.log(np.geomspace(1e5, 3e6, 6))
    y = 2 + 0.3 * (x - 13) ** 2 + 0.1 * np.random.default_rng(0).standard_normal(6)
    times = np.array([1, 3, 1, 2, 1, 1])
    # the place of a run is measured from the mean of the sizes, so the fit is compared, not its parts
    weighed, repeated = isoflop.parabola(x, y, times.astype(float)), isoflop.parabola(*np.repeat([x, y], times, axis=1))
    assert weighed.vertex == pytest.approx(repeated.vertex) and weighed.value == pytest.approx(repeated.value)
