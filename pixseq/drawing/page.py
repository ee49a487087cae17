"""What all figures of scaling share: the page, its letters, round ticks on logarithmic axes, keys.

A page column is 3.5 inches wide. No letter is smaller than 7 points, whatever settings the user's matplotlib has.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq.drawing import grids as drawing
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

    Page = Figure | SubFigure

DPI = 300
COLUMN = 3.5  # inches
STYLE = {
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
    "text.parse_math": False,  # a metric's name may hold a dollar sign
}
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in drawing.COLORS)
INK, FAINT = "#262626", "#6e6e6e"


def require() -> None:
    """Raises PixseqError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PixseqError("figures need matplotlib, which is not installed", "pip install 'pixseq[plot]'") from None


def save(target: str | Path, image: np.ndarray, stage: str, config, inputs, overwrite: bool) -> None:
    from pixseq.artifacts.picture import save_png

    save_png(target, image, stage, config, inputs, {"dpi": DPI}, overwrite)


def flops_label(numbers: Mapping[str, Any]) -> str:
    """An axis' label: how they are counted, where that is known."""
    counting = numbers.get("counting")
    return f"training FLOPs ({counting})" if counting else "training FLOPs"


def picture(size: tuple[float, float], draw: Callable[[Page], None]) -> np.ndarray:
    """uint8 [H, W, 3] of a page of `size` inches, whatever settings the user's matplotlib has."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
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


def short(name: str, letters: int) -> str:
    name = drawing.plain(name)
    return name if len(name) <= letters else name[: letters - 1] + "…"


def say(axes: Axes, text: str, letters: int = 30) -> None:
    """In place of data."""
    text = textwrap.fill(textwrap.shorten(drawing.plain(text), 5 * letters, placeholder=" …"), letters)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=7)
    axes.grid(False)


def key(label: str, marker: str | None, color: str, style="none", hollow=False, width=1.1, size=4.0):
    from matplotlib.lines import Line2D

    face = "white" if hollow else color
    return Line2D(
        [],
        [],
        marker=marker,
        color=color,
        linestyle=style,
        linewidth=width,
        markerfacecolor=face,
        markersize=size,
        label=label,
    )


def legend(page: Page, keys: Sequence, columns: int) -> None:
    page.legend(handles=keys, loc="outside lower center", ncols=columns)
