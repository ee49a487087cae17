"""Grids, swatches and charts: every pixel of an image survives, ticks are round, odd input still draws."""

import numpy as np
import pytest

from pixseq.drawing import grids as drawing


def pictures(count, h=4, w=6):
    return np.random.default_rng(0).integers(0, 256, (count, h, w, 3), dtype=np.uint8)


def has_color(image, color):
    return bool((image == np.array(color, np.uint8)).all(axis=2).any())


def test_grid_keeps_every_pixel_as_a_crisp_square_in_row_order():
    images = pictures(5)
    out = drawing.grid(images, columns=3, scale=2, gap=1)
    assert out.dtype == np.uint8 and out.shape == (2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3)
    for i, image in enumerate(images):
        y, x = 1 + i // 3 * 9, 1 + i % 3 * 13
        for dy in (0, 1):
            for dx in (0, 1):
                assert (out[y + dy : y + 8 : 2, x + dx : x + 12 : 2] == image).all()
    assert (out[10:18, 27:39] == 255).all()  # the place of a sixth image stays white


def test_labels_leave_the_pictures_untouched():
    images = pictures(4, 16, 16)
    labelled = drawing.grid(images, 2, scale=3, column_labels=["[bold]prompt\n", "x" * 200])
    bare = drawing.grid(images, 2, scale=3)
    assert labelled.shape[0] > bare.shape[0] and labelled.shape[1] == bare.shape[1]
    assert (labelled[-bare.shape[0] :] == bare).all()
    assert (labelled[: -bare.shape[0]] < 100).any()


def test_small_images_are_enlarged_and_large_ones_are_not():
    assert drawing.grid(pictures(1, 16, 16), 1, gap=0).shape == (96, 96, 3)
    assert drawing.grid(pictures(1, 200, 200), 1, gap=0).shape == (200, 200, 3)


@pytest.mark.parametrize("images", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)])
def test_a_grid_of_nothing_is_refused(images):
    with pytest.raises(ValueError, match="N > 0"):
        drawing.grid(images, 4)


def test_a_missing_label_is_refused():
    with pytest.raises(ValueError, match="2 labels are needed, 1 given"):
        drawing.grid(pictures(4), 2, column_labels=["one"])


def test_swatch_shows_the_colours_in_order():
    colors = pictures(1, 1, 5)[0, 0]
    out = drawing.swatch(colors, columns=3, cell=4)
    assert out.shape == (8, 12, 3)
    assert (out[::4, ::4].reshape(-1, 3)[:5] == colors).all() and (out[4:, 8:] == 255).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 8), (0.1, 0.435), (2.7834, 2.7836), (0, 20_000), (-3e-7, 2e-7), (1e9, 5e9), (5, 5), (0, 0)]
)
def test_linear_ticks_are_round_evenly_spaced_and_few(low, high):
    axis = drawing.linear_axis(np.array([low, high], float), 8)
    steps = np.diff(axis.ticks)
    assert 2 <= len(axis.ticks) <= 9 and np.allclose(steps, steps[0])
    mantissa = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert np.isclose(mantissa, [1, 2, 5], atol=1e-6).any()
    assert axis.low <= low <= high <= axis.high
    assert len(set(axis.labels())) == len(axis.ticks)


def test_layers_and_steps_get_whole_ticks_only():
    assert drawing.linear_axis(np.array([0.0, 1.0]), 12, whole=True).labels() == ["0", "1"]
    assert drawing.linear_axis(np.arange(49.0), 12, whole=True).labels()[:3] == ["0", "5", "10"]


def test_chart_draws_every_series_and_level_and_is_the_same_each_time():
    series = [("a", [0, 1, 2], [0.1, 0.5, 0.3]), ("b", [0, 1, 2], [0.2, 0.1, 0.4])]
    draw = lambda: drawing.line_chart(series, "title", "layer", "accuracy", (500, 320), h_lines=[("raw pixels", 0.25)])  # noqa: E731
    chart = draw()
    assert chart.shape == (320, 500, 3) and chart.dtype == np.uint8
    for color in [*drawing.COLORS[:2], drawing.INK]:
        assert has_color(chart, color)
    assert (draw() == chart).all()


def test_the_legend_stands_above_the_data():
    top = drawing.line_chart([("a", [0, 1], [1, 1]), ("b", [0, 1], [1, 0])], "", "x", "y", (400, 300))
    plot = [y for y in range(300) if (top[y] == 230).all(axis=1).sum() > 200]  # the grid lines
    key = np.argwhere((top == np.array(drawing.COLORS[1])).all(axis=2))[:, 0].min()
    assert key < plot[0] - 10


@pytest.mark.parametrize(
    "series",
    [
        [],
        [("none", [], [])],
        [("one", [3], [0.2])],
        [("gap", [1, 2, 3, 4], [1, float("nan"), 3, float("inf")])],
        [("not positive", [-1, 0, 1], [0, -2, 3])],
        [(f"series {i} \u202e\n[red]" * 9, range(100), np.linspace(1, i + 2, 100)) for i in range(9)],
    ],
)
def test_any_series_draws(series):
    chart = drawing.line_chart(series, "a title far too long " * 9, "x" * 99, "y" * 99, (240, 180))
    assert chart.shape == (180, 240, 3)


def test_a_missing_point_breaks_the_line():
    xs, gap = np.arange(100), np.ones(100)
    gap[40:60] = np.nan
    whole = drawing.line_chart([("a", xs, np.ones(100))], "", "", "", (400, 200))
    broken = drawing.line_chart([("a", xs, gap)], "", "", "", (400, 200))
    counts = [(image == np.array(drawing.COLORS[0])).all(axis=2).sum() for image in (whole, broken)]
    assert counts[1] < 0.85 * counts[0]
