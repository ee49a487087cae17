"""Grids, swatches and charts: every pixel of an image survives, ticks are round, odd input still draws."""

import matplotlib
import numpy as np
import pytest

from pixseq.drawing import grids as drawing
from pixseq.drawing.charts import MARKERS_UP_TO, SIZE, line_chart
from pixseq.drawing.page import COLORS, DPI, INK, picture, short


def pictures(count, h=4, w=6):
    return np.random.default_rng(0).integers(0, 256, (count, h, w, 3), dtype=np.uint8)


def count_color(image, color):
    """Pixels of a colour written as #rrggbb."""
    return int((image == np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])).all(axis=2).sum())


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


def axes_of(series, levels=()):
    """What the chart of these series puts on its page: its axes, and the labels of its keys."""
    import pixseq.drawing.charts as charts

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            charts, "picture", lambda size, draw: picture(size, lambda page: (draw(page), found.append(page)))
        )
        line_chart(series, "title", "layer", "accuracy", levels)
    page = found[0]
    return page.axes[0], [text.get_text() for legend in page.legends for text in legend.get_texts()], page


def test_chart_draws_every_series_and_level_and_is_the_same_each_time():
    series = [("a", [0, 1, 2], [0.1, 0.5, 0.3]), ("b", [0, 1, 2], [0.2, 0.1, 0.4])]
    draw = lambda: line_chart(series, "title", "layer", "accuracy", [("raw pixels", 0.25)])  # noqa: E731
    chart = draw()
    assert chart.shape == (SIZE[1] * DPI, SIZE[0] * DPI, 3) and chart.dtype == np.uint8
    for color in [*COLORS[:2], INK]:
        assert count_color(chart, color)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "text.usetex": True}):
        assert (draw() == chart).all()
        assert matplotlib.rcParams["font.size"] == 30


def test_layers_and_steps_get_whole_ticks_only():
    for last in (1, 2, 48, 96, 20_000):
        axes, _, _ = axes_of([("a", [0, last], [0.1, 0.2])])
        ticks = axes.get_xticks()
        assert (ticks == np.round(ticks)).all() and 2 <= len(ticks) <= 11
    assert axes.xaxis.get_major_formatter()(20_000) == "20,000"
    axes, _, _ = axes_of([("one", [3], [0.2])])
    assert axes.get_xlim() == (2.5, 3.5)


def test_names_are_shown_as_they_are_and_keys_stand_off_the_data():
    hostile = ["cost $x^2$", "[bold]a\n\u202eb", "W" * 200, "\\frac{1}{2}"]
    axes, keys, page = axes_of([(name, [0, 1, 2], [0, i, 2]) for i, name in enumerate(hostile)], [("_level", 0.5)])
    assert keys[:2] == ["cost $x^2$", "[bold]a  b"] and keys[3:] == ["\\frac{1}{2}", "_level"]
    assert keys[2].startswith("WWW") and keys[2].endswith("…")
    box = page.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= page.bbox.x1 and box.y0 >= 0 and box.y1 < axes.get_window_extent().y0


def test_one_line_has_no_key_and_too_many_are_counted():
    assert axes_of([("a", [0, 1], [0, 1])])[1] == []
    keys = axes_of([(f"layer {i} of a long name", range(3), [i, i, i + 1]) for i in range(100)])[1]
    assert len(keys) < 40 and keys[-1] == f"and {100 - len(keys) + 1} more"


def test_a_text_is_cut_to_its_width():
    assert short("W" * 30, 1.0) != "W" * 30 and len(short("i" * 300, 1.0)) > 2 * len(short("W" * 300, 1.0))
    assert short("a name", 1.0) == "a name"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "series",
    [
        [],
        [("none", [], [])],
        [("one", [3], [0.2])],
        [("gap", [1, 2, 3, 4], [1, float("nan"), 3, float("inf")])],
        [("nothing known", [1, 2], [float("nan")] * 2)],
        [("not positive", [-1, 0, 1], [0, -2, 3])],
        [("tiny", [0, 1], [2.7834, 2.7836]), ("huge", [0, 1], [1e30, -1e30])],
        [(f"series {i} \u202e\n[red]$" * 9, range(100), np.linspace(1, i + 2, 100)) for i in range(9)],
    ],
)
def test_any_series_draws(series):
    chart = line_chart(series, "a title far too long $\\alpha " * 9, "x" * 99, "y" * 99, [("none", float("nan"))])
    assert chart.shape[1] == SIZE[0] * DPI and (chart < 200).any()
    edges = np.concatenate([chart[:3].reshape(-1, 3), chart[:, :3].reshape(-1, 3), chart[:, -3:].reshape(-1, 3)])
    assert (edges == 255).all()  # nothing is cut off at the border


def test_a_missing_point_breaks_the_line_and_a_lone_one_shows():
    xs, gap, alone = np.arange(100), np.ones(100), np.full(100, np.nan)
    gap[40:60] = np.nan
    alone[50] = 1
    whole, broken, lone = (
        count_color(line_chart([("a", xs, ys)], "", "", ""), COLORS[0]) for ys in (np.ones(100), gap, alone)
    )
    assert len(xs) > MARKERS_UP_TO and 0 < lone < broken < 0.85 * whole
