"""scaling forecast: compute needed by the closed forms, years, intervals, and what has no answer."""

import json
import math

import numpy as np
import pytest
from scaling_fits import CHINCHILLA, flops_for, numbers_of, one_fit, optimum, value_at, write

from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import forecast as arithmetic
from pixseq.numerics.laws import Law
from pixseq.studies import forecast

ACCURACY = (0.1, 14, 0.26, 30, 0.23)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "fit.json", {("loss", 32): CHINCHILLA, ("accuracy", 32): ACCURACY})


def line(law, **changed):
    (a, kn), (b, kd) = optimum(law)
    values = dict(zip(("E", "A", "alpha", "B", "beta"), law), params_coefficient=kn, params_exponent=a)
    values |= {"tokens_coefficient": kd, "tokens_exponent": b} | changed
    of = {key: np.atleast_1d(value) for key, value in values.items()}
    params, tokens = (
        arithmetic.PowerLaw(of[f"{what}_exponent"], of[f"{what}_coefficient"]) for what in ("params", "tokens")
    )
    return arithmetic.Frontier(params, tokens, Law(*(of[name] for name in ("E", "A", "alpha", "B", "beta"))))


# ---- arithmetic


def test_compute_is_that_of_the_closed_form():
    for target in (1.7, 2.0, 3.5):
        found = np.exp(line(CHINCHILLA).log_compute(target)[0])
        assert found == pytest.approx(flops_for(CHINCHILLA, target), rel=1e-9)
        assert value_at(CHINCHILLA, found) == pytest.approx(target)


def test_terms_that_fall_at_different_speeds_meet_the_target_too():
    """Where attention is counted, the optimum line is not the closed form's, and no formula inverts the law."""
    E, A, alpha, B, beta = CHINCHILLA
    for exponent in (0.2, 0.6, 0.9):
        curve = line(CHINCHILLA, params_exponent=exponent)
        log_c = curve.log_compute(2.0)
        got = E + A * np.exp(-alpha * curve.params.log(log_c)) + B * np.exp(-beta * curve.tokens.log(log_c))
        assert got[0] == pytest.approx(2.0)


def test_out_of_reach_is_infinite():
    assert line(CHINCHILLA).log_compute(1.69)[0] == np.inf
    assert line(CHINCHILLA).log_compute(1.0)[0] == np.inf
    assert line(CHINCHILLA, params_exponent=-0.1).log_compute(2.0)[0] == np.inf
    without = line(CHINCHILLA, A=0.0)  # a term that is nothing asks for nothing
    assert without.log_compute(2.0)[0] < line(CHINCHILLA).log_compute(2.0)[0]
    assert without.log_compute(2.0)[0] == pytest.approx(_of_data_alone(without, 2.0))


def _of_data_alone(curve, target):
    E, B, beta = (float(values[0]) for values in (curve.law.E, curve.law.B, curve.law.beta))
    log_d = (math.log(B) - math.log(target - E)) / beta
    return (log_d - math.log(curve.tokens.coefficient[0])) / curve.tokens.exponent[0]


def test_an_interval_counts_infinite_draws_as_beyond_any_number():
    assert arithmetic.interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))
    assert arithmetic.interval(np.arange(19.0), 0.9) is None
    low, high = arithmetic.interval(np.append(np.arange(90.0), [np.inf] * 10), 0.95)
    assert low == pytest.approx(2.475) and high == np.inf
    low, high = arithmetic.interval(np.append(np.arange(1000.0), np.inf), 0.95)
    assert high == pytest.approx(975)


def test_a_line_through_values():
    x = np.log([16, 32, 64])
    assert arithmetic.through(x, 3 + 2 * x, math.log(256)) == pytest.approx(3 + 2 * math.log(256))
    rows = arithmetic.through(x, np.stack([5 - x, [1, 2, np.inf]]), 0.0)
    assert rows[0] == pytest.approx(5) and rows[1] == np.inf


# ---- the stage


def test_compute_sizes_and_years_of_a_named_target(path):
    numbers = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0, "accuracy": 0.8})
    loss, accuracy = numbers["rows"]
    for row, law, value in ((loss, CHINCHILLA, 2.0), (accuracy, ACCURACY, 1 - 0.8)):
        flops = flops_for(law, value)
        (a, kn), (b, kd) = optimum(law)
        assert row["flops"] == pytest.approx(flops) and row["status"] == "ok"
        assert row["params"] == pytest.approx(kn * flops**a) and row["tokens"] == pytest.approx(kd * flops**b)
        assert row["images"] == pytest.approx(row["tokens"] / 32**2)
        assert row["years"] == pytest.approx(math.log(flops / 1e20) / math.log(4.5))
        assert row["flops_ci"][0] < flops < row["flops_ci"][1]
        assert row["years_ci"][0] < row["years"] < row["years_ci"][1]
        assert row["beyond"] == pytest.approx(flops / 1e19)
    assert numbers["growth_per_year"] == 4.5 and numbers["start_flops"] == 1e20
    json.dumps(numbers, allow_nan=False)


def test_what_can_be_paid_for_now_needs_no_years(path):
    (row,) = forecast.run(path, 4.5, 1e30, [32], targets={"loss": 2.0})["rows"]
    assert row["status"] == "now" and row["years"] == 0 and row["years_ci"] == [0, 0]


def test_the_irreducible_is_out_of_reach_in_the_metrics_own_direction(path):
    loss, accuracy = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.6, "accuracy": 0.95})["rows"]
    assert loss["status"] == "unreachable: at or below the irreducible 1.69"
    assert accuracy["status"] == "unreachable: at or below the irreducible 0.1 of 1 - accuracy"
    assert loss["flops"] is None and loss["years"] is None and loss["target"] == 1.6
    (far,) = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.69 + 1e-14})["rows"]
    assert far["status"].startswith("unreachable: it takes more than 1e100")


def test_a_target_near_the_irreducible_has_no_upper_bound(path):
    (row,) = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.70})["rows"]
    assert row["flops"] == pytest.approx(flops_for(CHINCHILLA, 1.70))
    assert row["flops_ci"][0] < row["flops"] and row["flops_ci"][1] is None and row["years_ci"][1] is None


def test_the_default_target_leaves_a_twentieth_of_the_irreducible(path):
    numbers = forecast.run(path, 4.5, 1e20, [32])
    loss, accuracy = numbers["rows"]
    assert loss["target"] == pytest.approx(1.05 * 1.69) and accuracy["target"] == pytest.approx(1 - 1.05 * 0.1)
    assert loss["flops"] == pytest.approx(flops_for(CHINCHILLA, 1.05 * 1.69))
    assert any("5% of E" in line for line in numbers["assumptions"])
    named = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0}, metrics=["accuracy", "loss"])
    assert [row["metric"] for row in named["rows"]] == ["accuracy", "loss"] and named["rows"][1]["target"] == 2.0


def with_tokens(path, tokens_per_image, laws):
    numbers = numbers_of(laws) | {"tokens_per_image": tokens_per_image}
    write_metrics(path, "scaling fit", {}, {}, numbers)
    return path


@pytest.mark.parametrize(
    ("per_image", "at_64"), [(3072, 12288), (1024, 4096), (64, 256)], ids=["rgb", "palette", "patch"]
)
def test_images_are_counted_as_the_study_cuts_them(tmp_path, per_image, at_64):
    laws = {("loss", side): (1.69, 406.4 * side / 16, 0.34, 410.7, 0.28) for side in (16, 32)}
    path = with_tokens(tmp_path / "fit.json", {"16": per_image / 4, "32": per_image}, laws)
    numbers = forecast.run(path, 4.5, 1e20, [32, 64], targets={"loss": 2.0})
    here, beyond = numbers["rows"]
    assert here["images"] == pytest.approx(here["tokens"] / per_image)
    assert beyond["images"] == pytest.approx(beyond["tokens"] / at_64)
    (line,) = (line for line in numbers["assumptions"] if "images are" in line)
    assert f"{per_image} at 32x32, {at_64} at 64x64" in line


def test_images_of_a_table_are_of_one_token_a_pixel_or_of_as_many_as_given(path):
    (row,), assumed = (
        forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0})[key] for key in ("rows", "assumptions")
    )
    assert row["images"] == pytest.approx(row["tokens"] / 1024)
    assert any("one token a pixel, since the fit does not say" in line for line in assumed)
    given = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0}, tokens_per_pixel=3)
    assert given["rows"][0]["images"] == pytest.approx(row["images"] / 3)
    assert any("tokens / (3 resolution^2), as given" in line for line in given["assumptions"])
    with pytest.raises(UsageError, match="--tokens-per-pixel"):
        forecast.run(path, 4.5, 1e20, [32], tokens_per_pixel=0)


def test_a_forecast_on_which_the_laws_disagree_is_marked_with_both_numbers(tmp_path):
    other = (1.4, 406.4, 0.34, 410.7, 0.28)
    fits = [one_fit("loss", 32, CHINCHILLA, "varpro"), one_fit("loss", 32, other, "direct")]
    path = write(tmp_path / "fit.json", {("loss", 32): CHINCHILLA}, fits)
    numbers = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.75})
    (row,) = numbers["rows"]
    assert row["status"] == "disputed" and row["flops"] == pytest.approx(flops_for(CHINCHILLA, 1.75))
    assert row["other"] == {"method": "direct", "flops": pytest.approx(flops_for(other, 1.75))}
    assert any("by direct" in line and "disputed" in line for line in numbers["assumptions"])
    (row,) = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.5})["rows"]
    assert row["status"].startswith("unreachable: at or below the irreducible 1.69 (disputed: by direct it takes")
    (row,) = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.75}, method="direct")["rows"]
    assert row["status"] == "disputed" and row["other"]["method"] == "varpro"


def test_a_forecast_by_a_fit_with_which_another_disagrees_is_marked(tmp_path):
    fits = [one_fit("loss", 32, CHINCHILLA, method) for method in ("isoflop", "direct", "varpro")]
    numbers = numbers_of({("loss", 32): CHINCHILLA}, fits)
    row = {
        "metric": "loss",
        "resolution": 32,
        "what": "tokens_exponent",
        "methods": {},
        "text": "isoflop against direct",
    }
    for pairs, status in (([["isoflop", "direct"]], "ok"), ([["isoflop", "varpro"]], "disputed")):
        path = tmp_path / f"{status}.json"
        write_metrics(path, "scaling fit", {}, {}, numbers | {"disagreements": [{**row, "pairs": pairs}]})
        found = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0})
        assert found["rows"][0]["status"] == status
        assert ("disputed: isoflop against direct" in found["assumptions"]) == (status == "disputed")


def test_without_a_floor_a_target_must_be_named(tmp_path):
    floorless = (0.0, 3000, 0.42, 9e4, 0.30)
    path = write(tmp_path / "fit.json", {("frechet_distance", 32): floorless, ("loss", 32): CHINCHILLA})
    first, second = forecast.run(path, 4.5, 1e20, [32])["rows"]
    assert first["status"].startswith("none: the law tells no floor") and second["status"] == "ok"
    with pytest.raises(PixseqError, match="no floor") as caught:
        forecast.run(path, 4.5, 1e20, [32], metrics=["frechet_distance"])
    assert "--target" in caught.value.hint
    (row,) = forecast.run(path, 4.5, 1e20, [32], targets={"frechet_distance": 2.0})["rows"]
    assert row["flops"] == pytest.approx(flops_for(floorless, 2.0))


def test_other_resolutions_lie_on_a_line_through_the_studied_ones(tmp_path):
    laws = {("loss", side): (1.69, 406.4 * growth, 0.34, 410.7, 0.28) for side, growth in ((16, 1), (32, 1.5))}
    path = write(tmp_path / "fit.json", laws)
    numbers = forecast.run(path, 4.5, 1e20, "16,64", targets={"loss": 2.0})
    studied, beyond = numbers["rows"]
    small, large = (flops_for(law, 2.0) for law in laws.values())
    assert studied["flops"] == pytest.approx(small) and studied["status"] == "ok"
    assert beyond["flops"] == pytest.approx(large * large / small) and beyond["status"] == "extrapolated"
    assert beyond["flops"] == pytest.approx(6 * beyond["params"] * beyond["tokens"])
    assert beyond["flops_ci"][0] < beyond["flops"] < beyond["flops_ci"][1] and beyond["target"] == 2.0
    assert any("at resolution 64 nothing was run" in line for line in numbers["assumptions"])


def test_one_studied_resolution_says_nothing_of_another(path):
    with pytest.raises(PixseqError, match="two studied resolutions are needed"):
        forecast.run(path, 4.5, 1e20, [64], targets={"loss": 2.0})
    here, there = forecast.run(path, 4.5, 1e20, [32, 64], targets={"loss": 2.0})["rows"]
    assert here["status"] == "ok" and there["status"].startswith("none: ") and there["flops"] is None


def test_a_target_out_of_reach_at_one_resolution_is_not_extrapolated_from_the_others(tmp_path):
    laws = {("loss", side): (floor, *CHINCHILLA[1:]) for side, floor in ((8, 1.5), (16, 1.6), (32, 2.1))}
    numbers = forecast.run(write(tmp_path / "fit.json", laws), 4.5, 1e20, [64], targets={"loss": 3.0})
    assert numbers["rows"][0]["status"] == "extrapolated"
    with pytest.raises(PixseqError, match="unreachable at 32x32"):
        forecast.run(tmp_path / "fit.json", 4.5, 1e20, [64], targets={"loss": 2.0})


def test_a_fit_without_resolution_is_one_law_for_all_and_says_so(tmp_path):
    path = write(tmp_path / "fit.json", {("loss", None): CHINCHILLA})
    numbers = forecast.run(path, 4.5, 1e20, [32, 64], targets={"loss": 2.0})
    small, large = numbers["rows"]
    assert small["flops"] == large["flops"] and small["images"] == pytest.approx(4 * large["images"])
    assert any("the same law" in line for line in numbers["assumptions"])


def test_a_refused_fit_is_a_row_with_its_reason(tmp_path):
    laws = {("loss", 32): CHINCHILLA, ("accuracy", 32): ACCURACY}
    fits = [one_fit("loss", 32, CHINCHILLA, draws=0), one_fit("accuracy", 32, None, refused="only two budgets")]
    numbers = forecast.run(write(tmp_path / "fit.json", laws, fits), 4.5, 1e20, [32])
    loss, accuracy = numbers["rows"]
    assert accuracy["status"] == "none: no fit: only two budgets" and accuracy["flops"] is None
    assert loss["flops_ci"] is None and any("no intervals" in line for line in numbers["assumptions"])


def test_the_assumptions_name_growth_range_and_distance(path):
    text = " ".join(forecast.run(path, 4.5, 1e20, [32], targets={"loss": 1.8})["assumptions"])
    assert "grows 4.5 times a year" in text and "not measured" in text
    assert "runs at 1e+17 to 1e+19 FLOPs" in text and "times beyond the largest budget studied" in text
    assert "FLOPs as 6nd" in text


def test_the_forecast_is_written_as_metrics(path, tmp_path):
    numbers = forecast.run(path, 4.5, 1e20, [32], targets={"loss": 2.0}, out=tmp_path / "f.json")
    record, stored = read_metrics(tmp_path / "f.json")
    assert stored == numbers and record["config"]["resolutions"] == [32]
    with pytest.raises(PixseqError, match="already exists"):
        forecast.run(path, 4.5, 1e20, [32], out=tmp_path / "f.json")


@pytest.mark.parametrize(
    "options",
    [
        {"growth": 1.0},
        {"growth": math.inf},
        {"growth": math.nan},
        {"start_flops": 0.0},
        {"start_flops": math.inf},
        {"resolutions": []},
        {"resolutions": [32, 0]},
        {"resolutions": "32,big"},
        {"targets": {"lost": 2.0}},
        {"targets": {"loss": math.nan}},
        {"targets": {"accuracy": 90.0}},
        {"targets": {"loss": 2.0}, "metrics": ["accuracy"]},
        {"metrics": ["lost"]},
        {"method": "isoflop"},
        {"method": "magic"},
    ],
)
def test_options_that_cannot_be_used_are_refused(path, options):
    with pytest.raises(UsageError):
        forecast.run(path, **{"growth": 4.5, "start_flops": 1e20, "resolutions": [32], **options})


def test_a_target_below_what_real_pictures_score_is_said(tmp_path):
    law = (1.0, 3000, 0.42, 9e4, 0.30)
    fits = [one_fit("frechet_distance", 32, law) | {"floor": {"floor": 2.8}}]
    path = write(tmp_path / "fit.json", {("frechet_distance", 32): law}, fits)
    for target, said in ((2.0, True), (3.0, False)):
        lines = forecast.run(path, 4.5, 1e20, [32], targets={"frechet_distance": target})["assumptions"]
        assert any("below what real pictures score, 2.8" in line for line in lines) == said
