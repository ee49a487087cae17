"""scaling fit: tables in, three fits a metric out, with intervals, reasons and refusals."""

import csv
import json

import numpy as np
import pytest

from pixseq.artifacts.fit import Constants, Fit, Growth
from pixseq.artifacts.metrics import read_metrics
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.replicates import seed_weights
from pixseq.studies import agreement, fit, points, run_table
from pixseq.studies.run_row import RunRow

PUBLISHED = (1.69, 406.4, 0.34, 410.7, 0.28)
TRUE = 0.34 / 0.62  # its tokens exponent
METHODS = ["isoflop", "direct", "varpro"]


def loss(N, D, constants=PUBLISHED):
    E, A, alpha, B, beta = constants
    return E + A * N**-alpha + B * D**-beta


def rows_of(budgets=(1e18, 1e20, 4), sizes=7, low=0.25, high=4.0, noise=0.0, seed=0, ratio=lambda N: 1.0):
    """Runs on grids around the best size of each budget under 6 N D."""
    rng = np.random.default_rng(seed)
    rows = []
    for C in np.geomspace(*budgets):
        for N in 0.6 * C**0.4516 * np.geomspace(low, high, sizes):
            D = C / (6 * N * ratio(N))
            rows.append({"params": N, "tokens": D, "flops": C, "loss": loss(N, D) * np.exp(noise * rng.normal())})
    return rows


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def fitted(tmp_path):
    def run(rows, **options):
        return fit.run(write(tmp_path / "runs.csv", rows), **{"resamples": 0, **options})

    return run


def by_method(numbers, metric="loss"):
    return {one["method"]: one for one in numbers["fits"] if one["metric"] == metric}


# ---- what a fit says


def test_a_table_of_a_known_surface_gives_its_constants_by_both_laws(tmp_path):
    rows = []
    for C in np.geomspace(1e18, 1e21, 5):
        for N in np.geomspace(0.05, 20, 9) * 0.1 * C**0.45:
            rows.append({"params": N, "tokens": C / (6 * N), "flops": C, "loss": loss(N, C / (6 * N))})
    numbers = fit.run(write(tmp_path / "runs.csv", rows), tmp_path / "fit.json", resamples=40)
    fits = by_method(numbers)
    assert list(fits) == METHODS and numbers["counting"] == "6nd" and numbers["params_counted"] is None
    for name in ("direct", "varpro"):
        found = fits[name]
        assert [found[key] for key in ("E", "A", "alpha", "B", "beta")] == pytest.approx(PUBLISHED, rel=1e-6)
        assert found["tokens_exponent"] == pytest.approx(TRUE) and found["params_exponent"] == pytest.approx(1 - TRUE)
        assert found["tokens_per_param_exponent"] == pytest.approx(2 * TRUE - 1)
        at = found["budgets"][2]
        assert at["params_opt"] == pytest.approx(found["params_coefficient"] * at["flops"] ** found["params_exponent"])
        assert at["value_opt"] == pytest.approx(loss(at["params_opt"], at["tokens_opt"]))
        assert at["tokens_per_param"] == pytest.approx(at["tokens_opt"] / at["params_opt"])
        assert found["residual"] < 1e-8 and set(found["draws"]) > {"alpha", "tokens_coefficient"}
    assert fits["isoflop"]["tokens_exponent"] == pytest.approx(TRUE, abs=1e-3) and fits["isoflop"]["alpha"] is None
    assert not numbers["disagreements"] and not any(one["refused"] or one["flags"] for one in numbers["fits"])

    record, read = read_metrics(tmp_path / "fit.json")
    assert read == numbers and record["stage"] == "scaling fit" and record["inputs"]["runs"]["id"].startswith("sha256:")
    json.dumps(numbers, allow_nan=False)


def test_intervals_hold_the_true_exponent_about_as_often_as_they_say(fitted):
    """Of 25 tables of 1 % of noise, nineteen times in twenty; fewer than 20 would come by chance once in 800."""
    held = dict.fromkeys(METHODS, 0)
    for seed in range(25):
        for name, found in by_method(fitted(rows_of(noise=0.01, seed=seed), resamples=100)).items():
            low, high = found["tokens_exponent_ci"]
            held[name] += low <= TRUE <= high
            assert low < found["tokens_exponent"] < high
            assert len(found["draws"]["tokens_exponent"]) <= 100
    assert min(held.values()) >= 20


def test_a_seed_gives_one_result_and_metrics_share_their_resamples(fitted):
    rows = [{**row, "other": row["loss"]} for row in rows_of(noise=0.01)]
    one, again, another = (fitted(rows, resamples=30, seed=seed) for seed in (0, 0, 1))
    assert one == again and one["fits"] != another["fits"]
    for name in METHODS:
        assert by_method(one)[name]["draws"] == by_method(one, "other")[name]["draws"]
    assert by_method(fitted(rows))["direct"]["tokens_exponent_ci"] is None


def test_what_is_to_be_large_is_turned_and_its_optimum_given_in_its_own_units(fitted):
    rows = rows_of()
    for row in rows:
        share = 1 - row["loss"] / 5
        row |= {"accuracy": share, "top1": 100 * share, "score": share}
    numbers = fitted(rows)
    assert [one["metric"] for one in numbers["fits"]] == [
        m for m in ("loss", "accuracy", "top1", "score") for _ in "123"
    ]
    accuracy, top1 = by_method(numbers, "accuracy"), by_method(numbers, "top1")
    assert accuracy["direct"]["direction"] == "maximize" and accuracy["direct"]["transform"] == "1 - accuracy"
    assert top1["direct"]["transform"] == "100 - top1"
    assert by_method(numbers)["direct"]["direction"] == "minimize" and by_method(numbers)["direct"]["transform"] is None
    for name in METHODS:
        here = accuracy[name]["budgets"][0]
        assert here["params_opt"] == pytest.approx(by_method(numbers)[name]["budgets"][0]["params_opt"], rel=1e-5)
        assert here["value_opt"] == pytest.approx(1 - by_method(numbers)[name]["budgets"][0]["value_opt"] / 5)
        assert top1[name]["budgets"][0]["value_opt"] == pytest.approx(100 * here["value_opt"])
    assert by_method(numbers, "score")["isoflop"]["refused"]  # small is its worst
    forced = fitted(rows, metrics=["score"], maximize=True)
    assert by_method(forced, "score")["varpro"]["alpha"] == pytest.approx(0.34, abs=1e-6)


def test_resolutions_are_fitted_apart(fitted):
    rows = [{**row, "resolution": 16} for row in rows_of()]
    rows += [{**row, "resolution": 32, "loss": row["loss"] + 0.5} for row in rows_of()]
    numbers = fitted(rows, resamples=20)
    assert [(one["resolution"], one["method"]) for one in numbers["fits"]] == [
        (r, m) for r in (16, 32) for m in METHODS
    ]
    assert [one["E"] for one in numbers["fits"] if one["method"] == "varpro"] == pytest.approx([1.69, 2.19])
    assert all(type(run["resolution"]) is int for run in numbers["runs"])


def test_counted_attention_moves_the_exponents_to_those_of_brute_force(fitted):
    """6 N D (1 + T / (6 d)), d the cube root of size: 1.9 to 4.6 times 6 N D at these sizes."""
    ratio = lambda N: 1 + 2e5 / (6 * np.cbrt(N) * 12)  # noqa: E731
    numbers = fitted(rows_of(low=0.1, high=10, ratio=ratio), metrics=["loss"])
    log_c, N = np.log(np.geomspace(1e18, 1e20, 4)), np.geomspace(1e5, 1e12, 400_001)
    best = np.array([N[loss(N, np.exp(c) / (6 * N * ratio(N))).argmin()] for c in log_c])
    exponent = np.polyfit(log_c, np.log(best), 1)[0]
    assert abs(exponent - (1 - TRUE)) > 0.03
    for name in ("direct", "varpro"):
        found = by_method(numbers)[name]
        assert found["alpha"] == pytest.approx(0.34, abs=1e-6)  # the surface itself knows no FLOPs
        assert found["params_exponent"] == pytest.approx(exponent, abs=2e-3)
        assert [row["params_opt"] for row in found["budgets"]] == pytest.approx(best, rel=0.02)
        assert any("times 6 params tokens" in flag for flag in found["flags"])
    assert by_method(numbers)["isoflop"]["params_exponent"] == pytest.approx(exponent, abs=0.02)
    assert numbers["counting"] is None


# ---- what is left out is said


def test_an_optimum_at_the_edge_is_refused_by_name_and_the_laws_stand(fitted):
    numbers = fitted(rows_of(low=0.02, high=0.5, noise=1e-4), resamples=20)
    fits = by_method(numbers)
    assert fits["isoflop"]["params_exponent"] is None and fits["isoflop"]["draws"] == {}
    assert "three are needed" in fits["isoflop"]["refused"] and "1e+18 (edge)" in fits["isoflop"]["refused"]
    assert "at a budget of 1e+18 the optimum lies at the edge, above the largest model" in fits["isoflop"]["flags"][0]
    assert {row["status"] for row in fits["isoflop"]["budgets"]} == {"edge"}
    assert fits["isoflop"]["budgets"][0]["params_opt"] is None and fits["isoflop"]["budgets"][0]["runs"] == 7
    assert fits["varpro"]["tokens_exponent"] == pytest.approx(TRUE, abs=0.02)
    assert {row["status"] for row in fits["varpro"]["budgets"]} == {"outside"}
    assert "outside the sizes run at 1e+18" in fits["varpro"]["flags"][0]


def test_a_budget_of_three_sizes_gives_no_parabola(fitted):
    rows = rows_of(sizes=7)
    del rows[3:7]
    isoflop = by_method(fitted(rows))["isoflop"]
    assert [row["status"] for row in isoflop["budgets"]] == ["too few runs", "ok", "ok", "ok"]
    assert isoflop["refused"] is None and "fewer than 4 sizes" in isoflop["flags"][0]


def test_runs_that_are_not_done_and_metrics_that_are_missing_are_listed():
    rows = [{**row, "id": f"b{i}", "status": "done", "budget": row["flops"]} for i, row in enumerate(rows_of())]
    rows[0] |= {"status": "diverged", "reason": "loss is nan at step 7", "loss": None}
    rows[1] |= {"status": "waiting", "params": None}
    rows[2] |= {"loss": None, "frechet_distance": 3.0}
    table = run_table.checked([RunRow.of(row) for row in rows], "plan")
    assert table.metrics == ["loss", "frechet_distance"] and len(table.runs) == 26
    reasons = {(one.id, one.reason) for one in table.excluded}
    assert {("b0", "diverged: loss is nan at step 7"), ("b1", "waiting"), ("b2", "has no loss")} < reasons
    assert table.runs[0].values == {"loss": None, "frechet_distance": 3.0}

    found = points.Resampled.of(table.runs, None, 20, 0).points(points.Direction("loss", None))
    assert len(found.y) == 25 and found.counts.shape == (20, 25)


def fit_of(method, what, value, interval):
    grown = what == "tokens_exponent"
    return Fit(
        "loss",
        "minimize",
        16,
        None,
        method,
        tokens=Growth(value, interval) if grown else Growth(),
        constants=Constants() if grown else Constants(**{what: value, f"{what}_ci": interval}),
    )


def test_approaches_that_differ_by_more_than_chance_are_named():
    made = [
        fit_of(name, "tokens_exponent", at, [low, high])
        for name, at, low, high in (
            ("isoflop", 0.6, 0.58, 0.62),
            ("direct", 0.5, 0.49, 0.51),
            ("varpro", 0.505, 0.4, 0.6),
        )
    ]
    (row,) = agreement.disagreements(made)
    assert row.methods == {"isoflop": 0.6, "direct": 0.5, "varpro": 0.505} and row.what == "tokens_exponent"
    assert "isoflop 0.600 (0.580 to 0.620) against direct 0.500 (0.490 to 0.510)" in row.text
    assert row.pairs in ((("isoflop", "direct"), ("isoflop", "varpro")), (("isoflop", "direct"),))
    assert agreement.disagreements(made[1:]) == []
    assert agreement.disagreements([made[1], fit_of("varpro", "tokens_exponent", 0.505, None)]) == []


@pytest.mark.parametrize("what", ["E", "alpha", "beta"])
def test_the_laws_constants_are_compared_too(what):
    direct, near, far = (
        fit_of("direct", what, 0.30, [0.29, 0.31]),
        fit_of("varpro", what, 0.304, [0.30, 0.32]),
        fit_of("varpro", what, 0.40, [0.38, 0.42]),
    )
    assert agreement.disagreements([direct, near]) == []
    (row,) = agreement.disagreements([direct, far])
    assert row.what == what and "direct 0.300 (0.290 to 0.310) against varpro 0.400" in row.text
    far = fit_of("varpro", what, 0.40, None)  # without an interval, by the distance alone
    (row,) = agreement.disagreements([direct, far])
    assert "(no interval)" in row.text


def test_one_diverged_run_moves_no_fit_and_is_named_by_all_three(fitted):
    rows = rows_of(budgets=(1e18, 1e21, 6), noise=0.004, seed=3)
    clean = by_method(fitted(rows))
    rows[17]["loss"] = 11.5
    spoilt = by_method(fitted(rows))
    for name in METHODS:
        assert [row["id"] for row in spoilt[name]["outliers"]] == ["line 19"] and clean[name]["outliers"] == []
        assert any("line 19 (" in flag and "times what it says" in flag for flag in spoilt[name]["flags"])
        assert spoilt[name]["tokens_exponent"] == pytest.approx(clean[name]["tokens_exponent"], abs=0.01)
        assert [row["status"] for row in spoilt[name]["budgets"]] == ["ok"] * 6
        assert spoilt[name]["residual"] < 0.006
    assert spoilt["varpro"]["E"] == pytest.approx(clean["varpro"]["E"], abs=0.02)
    assert spoilt["varpro"]["beta"] == pytest.approx(clean["varpro"]["beta"], abs=0.01)


def test_biased_parabolas_of_exact_runs_are_a_disagreement(fitted):
    """Narrow grids that drift across the optimum of a lopsided surface: no noise, and the approaches still differ."""
    surface, best = (1.69, 3e4, 0.6, 60, 0.2), lambda C: (1.8e4 / 12) ** 1.25 * (C / 6) ** 0.25
    rows = []
    for C, drift in zip(np.geomspace(1e18, 1e20, 5), np.geomspace(0.5, 2, 5)):
        for N in best(C) * drift * np.geomspace(0.5, 2, 9):
            rows.append({"params": N, "tokens": C / 6 / N, "flops": C, "loss": loss(N, C / 6 / N, surface)})
    numbers = fitted(rows, resamples=60)
    (row,) = numbers["disagreements"]
    assert row["metric"] == "loss" and row["methods"]["direct"] == pytest.approx(0.75)
    assert row["methods"]["isoflop"] < 0.74 and "against varpro" in row["text"]


def test_a_metric_that_does_not_fall_with_data_has_its_term_refused(fitted):
    rows = rows_of()
    for row in rows:
        row["loss"] = 1 + 400 * row["params"] ** -0.3
    fits = by_method(fitted(rows))
    assert all("B D^-beta is not identified" in fits[name]["refused"] for name in ("direct", "varpro"))
    assert fits["direct"]["tokens_exponent"] is None and fits["direct"]["budgets"] == []


def test_one_constant_metric_among_others_is_refused_alone(fitted):
    numbers = fitted([{**row, "accuracy": 0.1, "offset": row["loss"] - 3} for row in rows_of()])
    assert {one["refused"] for one in by_method(numbers, "accuracy").values()} == {"accuracy is 0.1 in every run"}
    assert "<= 0" in by_method(numbers, "offset")["direct"]["refused"]
    assert by_method(numbers, "offset")["isoflop"]["refused"] is None
    assert by_method(numbers)["varpro"]["refused"] is None


# ---- refusals


def changed(**values):
    rows = rows_of()
    rows[5] |= values
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(tokens=""), "line 7 has no tokens"),
        (changed(loss="nan"), "line 7: loss is nan"),
        (changed(params="inf"), "line 7: params is inf"),
        (changed(params="12M"), "line 7: params is '12M', no number"),
        (changed(params=-1), "line 7 has params = -1"),
        (changed(flops=1e25), r"flops 1e\+25, but 6 params tokens is 1e\+18"),
        (
            [{k: v for k, v in row.items() if k not in ("flops", "tokens")} for row in rows_of()],
            "column tokens or flops",
        ),
        ([{k: v for k, v in row.items() if k != "loss"} for row in rows_of()], "no metric beside"),
        (rows_of(budgets=(1e18, 1e19, 2)), r"at 2 compute budgets \(1e\+18, 1e\+19\), a fit needs three"),
        ([{**row, "loss": 2.5} for row in rows_of()], "loss is 2.5 in every run"),
        ([{**row, "status": "waiting"} for row in rows_of()], "none of 28 runs is done"),
        (changed(resolution=16), "line 2 has no resolution, others have"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_refused(fitted, rows, message):
    with pytest.raises(PixseqError, match=message) as caught:
        fitted(rows)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("params,tokens,flops,loss\n", "holds names, but no run"),
        ("1,2,12,3\n", "no column params or tokens or flops"),
        ("params,tokens,flops,loss,loss\n1,2,12,3,3\n", "two columns loss"),
        ("params,tokens,flops,loss\n1,2,12\n", "line 2 has 3 cells"),
        ('params,tokens,flops,loss\n1,2,12,"3\n', "is no CSV"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(PixseqError, match=message):
        fit.run(tmp_path / "runs.csv")


def test_other_refusals(tmp_path, fitted):
    rows = [{**row, "note": i if i else "a"} for i, row in enumerate(rows_of())]
    with pytest.raises(PixseqError, match="note is 'a', no number") as caught:
        fitted(rows)
    assert "--metric" in caught.value.hint
    assert len(fitted(rows, metrics=["loss"])["fits"]) == 3
    with pytest.raises(UsageError, match="--metric los: ") as caught:
        fitted(rows_of(), metrics=["los"])
    assert caught.value.hint == "did you mean loss?"
    with pytest.raises(UsageError, match="size, cost or shape"):
        fitted(rows_of(), metrics=["flops"])
    with pytest.raises(UsageError, match="lies between"):
        fitted([{**row, "loss": -row["loss"]} for row in rows_of()], metrics=["loss"], maximize=True)
    with pytest.raises(UsageError, match="--maximize says nothing"):
        fitted(rows_of(), maximize=True)
    with pytest.raises(UsageError, match="--bootstrap is 5"):
        fitted(rows_of(), resamples=5)
    with pytest.raises(PixseqError, match="does not exist"):
        fit.run(tmp_path / "none.csv")
    with pytest.raises(PixseqError, match="no scaling plan"):
        fit.run(tmp_path)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xd8\x00\x81")
    with pytest.raises(PixseqError, match="is not text"):
        fit.run(tmp_path / "bytes.csv")
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(PixseqError, match="already exists"):
        fit.run(tmp_path / "none.csv", out=tmp_path / "there.json")


def test_a_budget_column_and_a_byte_order_mark_are_read(tmp_path):
    rows = [{**row, "budget": row["flops"], "flops": row["flops"] * 1.04, "n_layer": 4, "id": "x"} for row in rows_of()]
    path = write(tmp_path / "runs.csv", rows)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    table = run_table.read(path)
    assert table.metrics == ["loss"] and len({run.budget for run in table.runs}) == 4
    assert table.runs[0].budget == 1e18 and table.runs[0].id == "x"


# ---- seeds


def with_seeds(rows, seeds, noise, seed=0):
    """Each run `seeds` times; `noise` is a deviation, or one for each run."""
    rng = np.random.default_rng(seed)
    noise = np.broadcast_to(noise, len(rows))
    return [
        {**row, "loss": row["loss"] * np.exp(dev * rng.normal()), "seed": k}
        for row, dev in zip(rows, noise)
        for k in range(seeds)
    ]


def test_seeds_of_one_size_are_one_point_their_mean(fitted):
    rows = with_seeds(rows_of(), 3, 0.01)
    numbers = fitted(rows, resamples=40)
    means = [{**rows[i], "loss": np.mean([row["loss"] for row in rows[i : i + 3]])} for i in range(0, len(rows), 3)]
    found, plain = by_method(numbers), by_method(fitted(means, resamples=40))
    assert len(numbers["runs"]) == 84 and {run["seed"] for run in numbers["runs"]} == {0, 1, 2}
    for name in METHODS:
        assert found[name]["budgets"][0]["runs"] == 7
        assert found[name]["seed_spread"] == pytest.approx(0.01, rel=0.3) and plain[name]["seed_spread"] is None
        assert found[name]["tokens_exponent"] == pytest.approx(plain[name]["tokens_exponent"], abs=0.02)
        (low, high), (plain_low, plain_high) = (each[name]["tokens_exponent_ci"] for each in (found, plain))
        assert (high - low) / (plain_high - plain_low) == pytest.approx(1, abs=0.5)


def test_a_size_whose_seeds_scatter_counts_for_less():
    values = [np.array([2.0, 2.01, 1.99])] * 6 + [np.array([2.0, 2.4, 1.6])]
    weight, spread = seed_weights(values)
    assert weight[0] == pytest.approx(1) and weight[-1] < 0.01 and 0.005 < spread < 0.01
    weight, _ = seed_weights([*values[:6], np.array([2.0])])
    assert weight[-1] == pytest.approx(1 / 3, rel=0.15)  # one seed where the others have three
    assert seed_weights([np.array([2.0]), np.array([3.0])])[0].tolist() == [1, 1]


def test_weights_of_seeds_bring_the_fit_nearer_to_the_truth(fitted):
    """Half of the sizes ten times as noisy: over ten tables, the error is well below that of unweighted means."""
    errors = {"weighed": [], "plain": []}
    for seed in range(10):
        base = rows_of(budgets=(1e18, 1e21, 4))
        rows = with_seeds(base, 4, np.where(np.arange(len(base)) % 2, 0.02, 0.002), seed)
        means = [{**rows[i], "loss": np.mean([r["loss"] for r in rows[i : i + 4]])} for i in range(0, len(rows), 4)]
        for name, table in (("weighed", rows), ("plain", means)):
            errors[name].append(by_method(fitted(table))["isoflop"]["tokens_exponent"] - TRUE)
    assert np.sqrt(np.mean(np.square(errors["weighed"]))) < 0.6 * np.sqrt(np.mean(np.square(errors["plain"])))


def test_runs_of_one_size_without_seeds_stay_runs(fitted):
    rows = [{**row, "loss": row["loss"] + 0.01 * k} for row in rows_of() for k in range(2)]
    found = by_method(fitted(rows))
    assert found["isoflop"]["budgets"][0]["runs"] == 14 and found["varpro"]["seed_spread"] is None


def test_a_run_that_stands_twice_counts_once(fitted):
    rows = [{"id": f"run{i}", **row} for i, row in enumerate(rows_of(noise=0.01))]
    twice = fitted([*rows, {**rows[4], "id": "again"}])
    assert twice["fits"] == fitted(rows)["fits"]
    assert twice["excluded"] == [{"id": "again", "reason": "it is the run run4 once more, the same in every number"}]


# ---- the floor of a distance


def distances(floor=2.0, n=500, extractor="pixels", level=1.0):
    made = {"frechet_n": n, "frechet_floor": floor, "frechet_floor_n": n, "frechet_extractor": extractor}
    return [{**row, "frechet_distance": level * row["loss"], **made} for row in rows_of()]


def test_a_distance_within_its_floor_is_said_with_floor_n_and_extractor(fitted):
    rows = distances(floor=3.0)
    found = by_method(fitted(rows), "frechet_distance")
    values = np.array([row["frechet_distance"] for row in rows])
    floor = found["varpro"]["floor"]
    assert floor["floor"] == 3.0 and floor["n"] == [500] and floor["extractors"] == ["pixels"]
    assert (floor["within"], floor["near"], floor["runs"]) == ((values <= 3).sum(), (values < 4.5).sum(), 28)
    for name in METHODS:
        (flag,) = (flag for flag in found[name]["flags"] if "floor" in flag)
        assert f"{floor['within']} of 28 runs lie within the floor" in flag and "n 500, pixels" in flag
    far = by_method(fitted(distances(floor=0.1)), "frechet_distance")
    assert far["varpro"]["floor"]["near"] == 0 and not any("floor" in flag for flag in far["varpro"]["flags"])
    assert by_method(fitted(rows))["varpro"]["floor"] is None  # the loss has none
    assert by_method(fitted(rows_of()))["varpro"]["floor"] is None


def test_distances_of_several_extractors_are_not_fitted_together(fitted):
    rows = distances(floor=0.1)
    rows[3]["frechet_extractor"] = "model sha256:ab12"
    rows[4]["frechet_n"] = 400
    found = by_method(fitted(rows), "frechet_distance")
    assert all("several extractors" in found[name]["refused"] for name in METHODS)
    rows[3]["frechet_extractor"] = "pixels"
    found = by_method(fitted(rows), "frechet_distance")
    assert any("n from 400 to 500" in flag for flag in found["varpro"]["flags"])
