"""Warm-up, cosine to zero, constant."""

from pixseq.numerics.schedule import learning_rate, warmup_steps


def test_cosine_rises_to_the_peak_and_falls_to_zero():
    rates = [learning_rate(step, 1000, 2.0, 100, "cosine") for step in range(1001)]
    assert rates[0] > 0 and rates[:100] == sorted(rates[:100])
    assert max(rates) == rates[100] == 2.0
    assert rates[100:] == sorted(rates[100:], reverse=True) and rates[1000] < 1e-12
    assert abs(rates[550] - 1.0) < 1e-9


def test_constant_stays():
    assert {learning_rate(step, 1000, 2.0, 10, "constant") for step in range(10, 1000)} == {2.0}


def test_warm_up_is_an_epoch_but_not_the_whole_of_a_short_run():
    assert warmup_steps(1_000_000, 9609, 1.0, 0.1) == 9609
    assert warmup_steps(60, 56, 1.0, 0.1) == 6
    assert learning_rate(0, 1, 1.0, 0, "cosine") == 1.0
