"""What all charts share, drawn by matplotlib: the page, its letters and colours, round ticks on logarithmic axes, keys.

A page column is 3.5 inches wide. No letter is smaller than 7 points, whatever settings the user's matplotlib has, which
are not changed. Names of strangers are shown as they are: on one line, without markup, cut to their place.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pixseq.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    Page = Figure | SubFigure
    Key = Line2D | Patch

DPI = 300
COLUMN = 3.5  # inches
STYLE: dict[str, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # a metric's name may hold a dollar sign
}
# Okabe and Ito's colours, told apart under every common colour blindness; without their yellow (too pale)
# and their black, which named heights use.
COLORS = BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
INK, FAINT = "#262626", "#6e6e6e"
MOST_KEY_ROWS = 6  # more would leave the chart no room


def save(
    target: str | Path,
    image: np.ndarray,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    overwrite: bool,
) -> None:
    from pixseq.artifacts.picture import save_png

    save_png(target, image, stage, config, inputs, {"dpi": DPI}, overwrite)


def flops_label(counting: str | None) -> str:
    """An axis' label: how they are counted, where that is known."""
    return f"training FLOPs ({counting})" if counting else "training FLOPs"


def picture(size: tuple[float, float], draw: Callable[[Page], None]) -> np.ndarray:
    """uint8 [H, W, 3] of a page of `size` inches, whatever settings the user's matplotlib has."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, STYLE))  # its stub takes its own names alone
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a metric's name in letters the font lacks
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def log_axis(axes: Axes, which: str, most: int = 4, spell: Callable[[float], str] | None = None) -> None:
    """A logarithmic axis over its present limits, with at most `most` labelled ticks, each spelt out."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

    axis: Axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    ticks = log_ticks(low, high, most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([(spell or count)(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within the limits, as many as may be: 1 2 5, 1 3, or powers of ten at even steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [(1, (1, 1.5, 2, 3, 4, 5, 6, 8)), (1, (1, 2, 5)), (1, (1, 3)), *((step, (1,)) for step in range(1, 60))]
    for step, digits in steps:
        start = first + (-first) % step
        ticks = [digit * 10.0**power for power in range(start, last + 1, step) for digit in digits]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) <= most:
            break
    return inside or [math.sqrt(low * high)]


def few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def count(value: float) -> str:
    """20M, 1.5k, 10¹⁶; small numbers as they are."""
    if value >= 1e15 or value < 1e-3:
        return power(value)
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """10¹⁸, 3·10¹⁸; without the font's mathematics, whose dollar signs are off."""
    digits, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = digits.removesuffix(".0")
    return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"


def short(text: str, inches: float, points: float = STYLE["font.size"]) -> str:
    """`text` on one printable line of at most that width, its end replaced by dots where it is too long."""
    text = one_line(text, " ")
    if _width(text, points) <= inches:
        return text
    low, high = 0, len(text)  # letters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _width(text[:middle] + "…", points) <= inches else (low, middle)
    return text[:low] + "…"


def _width(text: str, points: float) -> float:
    """Inches of a line in the font of charts."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=points), False)[0] / 72


def wrapped(text: str, inches: float, rows: int) -> str:
    """`text` on printable lines of about that width, its end replaced by dots where it takes more than `rows`."""
    letters = max(round(inches * 72 / (0.54 * STYLE["legend.fontsize"])), 8)
    return textwrap.fill(textwrap.shorten(one_line(text, " "), rows * letters, placeholder=" …"), letters)


def say(axes: Axes, text: str, inches: float) -> None:
    """In place of data."""
    text = wrapped(text, inches, 5)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=7)
    axes.grid(False)


def key(
    label: str,
    marker: str | None,
    color: str,
    style: Any = "none",
    hollow: bool = False,
    width: float = 1.1,
    size: float = 4.0,
) -> Line2D:
    from matplotlib.lines import Line2D

    face = "white" if hollow else color
    how: dict[str, Any] = {"linestyle": style, "linewidth": width, "markerfacecolor": face, "markersize": size}
    return Line2D([], [], marker=marker, color=color, label=one_line(label, " "), **how)


def key_rows(keys: Sequence[Key], inches: float) -> tuple[Sequence[Key], int]:
    """The keys that a page of that width has room for, each cut to its place, and in how many columns they stand."""
    room = 0.42  # of a key: its sample and what is free beside it
    widest = max(_width(str(one.get_label()), STYLE["legend.fontsize"]) for one in keys) + room
    columns = max(min(int(0.96 * inches / widest), len(keys)), 1)
    if columns * MOST_KEY_ROWS < len(keys):
        shown = columns * MOST_KEY_ROWS - 1
        keys = [*keys[:shown], key(f"and {len(keys) - shown} more", None, INK)]
    for one in keys:
        one.set_label(short(str(one.get_label()), 0.96 * inches / columns - room, STYLE["legend.fontsize"]))
    return keys, columns


def legend(page: Page, keys: Sequence[Key], columns: int) -> None:
    page.legend(handles=keys, loc="outside lower center", ncols=columns)
