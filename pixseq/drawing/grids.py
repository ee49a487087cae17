"""Pictures of results: image grids, line charts and palette swatches, drawn with Pillow.

Arrays and numbers in, uint8 [H, W, 3] out; nothing here touches a file. Lines are drawn SUPERSAMPLE times too large and
averaged down, which makes them smooth; text is set afterwards, at its final size, where the font's hinting works.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLE = 4
INK, FAINT, GRID, PAPER = (38, 38, 38), (110, 110, 110), (230, 230, 230), (255, 255, 255)
# Okabe and Ito's colours, told apart under every common colour blindness; without their yellow (too pale)
# and their black, which named heights use.
COLORS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)]
MARKERS = ["circle", "square", "triangle", "diamond"]
MARKERS_UP_TO = 40  # points in a series; more of them would hide the line
TILE_PIXELS = 96  # an image of a grid is enlarged to about this side

Series = tuple  # (name, xs, ys); y may hold NaN, where the line breaks


def font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def plain(text: str) -> str:
    """One line of printable text, whatever a file or class name holds."""
    return "".join(c if c.isprintable() else " " for c in text)


# ---- image grids and swatches


def grid(
    images: np.ndarray,
    columns: int,
    scale: int | None = None,
    gap: int = 2,
    column_labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Images uint8 [N, h, w, 3], row by row in `columns` columns, each pixel a crisp square of `scale` pixels.

    `scale` None enlarges small images to about TILE_PIXELS. `gap` is in output pixels. Labels stand above the
    columns. Raises ValueError where there are no images or a label is missing.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"grid draws images [N, h, w, 3] with N > 0, not {images.shape}")
    N, h, w, _ = images.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"{columns} labels are needed, {len(column_labels)} given")
    scale = scale or max(1, round(TILE_PIXELS / max(h, w)))
    high, wide = h * scale, w * scale
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)

    letters = font(min(15, max(10, high // 3)))
    top = letters.size + 8 if column_labels else 0
    out = np.full((top + rows * (high + gap) + gap, columns * (wide + gap) + gap, 3), PAPER, np.uint8)
    corners = [(top + gap + r * (high + gap), gap + c * (wide + gap)) for r in range(rows) for c in range(columns)]
    for tile, (y, x) in zip(tiles, corners):
        out[y : y + high, x : x + wide] = tile
    if not column_labels:
        return out
    page = Image.fromarray(out)
    pen = ImageDraw.Draw(page)
    for (_, x), label in zip(corners, column_labels):
        pen.text((x + wide / 2, top - 2), shortened(label, letters, wide + gap), INK, letters, anchor="md")
    return np.asarray(page)


def swatch(colors: np.ndarray, columns: int = 32, cell: int = 24) -> np.ndarray:
    """Colours uint8 [K, 3] as squares of `cell` pixels, in order, row by row; cells past the last stay white."""
    colors = np.asarray(colors, np.uint8)
    K = len(colors)
    columns = min(columns, K)
    cells = np.full((-(-K // columns) * columns, 3), PAPER, np.uint8)
    cells[:K] = colors
    return cells.reshape(-1, columns, 3).repeat(cell, axis=0).repeat(cell, axis=1)


# ---- line charts


class Axis(NamedTuple):
    """A range of values and the places of its ticks."""

    low: float
    high: float
    ticks: list[float]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """All ticks in one notation: as many decimals as the step needs, four digits where numbers get long."""
        ticks = np.array(self.ticks)
        steps = np.diff(ticks)
        step = steps[0] if len(steps) else 1.0
        if np.abs(ticks).max(initial=0) >= 1e7 or step < 1e-5:
            return [f"{t:.4g}" for t in ticks]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{t:,.{decimals}f}" for t in ticks]


def linear_axis(values: np.ndarray, most_ticks: int, whole: bool = False, pad: float = 0.05) -> Axis:
    """An axis around `values` with at most `most_ticks` ticks at steps of 1, 2 or 5 times a power of ten.

    `whole`: only integers get a tick (layers, steps).
    """
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low == high:
        spread = 0.5 if whole else abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    margin = pad * (high - low)
    low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= most_ticks)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, [k * step for k in range(first, last + 1)])


@dataclass
class Line:
    """One series ready to draw."""

    name: str
    points: np.ndarray  # [n, 2]
    color: tuple[int, int, int]
    marker: str


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (1000, 640),
    h_lines: Sequence[tuple[str, float]] = (),
) -> np.ndarray:
    """Lines with markers over common axes; uint8 [H, W, 3] with (W, H) = `size`.

    `h_lines` are named heights (a baseline), drawn dashed. The legend stands above the plot, so it never covers data.
    Points that are not finite are left out and break their line.
    """
    lines = [
        Line(
            plain(name),
            np.stack([np.asarray(xs, float), np.asarray(ys, float)], axis=1).reshape(-1, 2),
            COLORS[i % len(COLORS)],
            MARKERS[i % len(MARKERS)],
        )
        for i, (name, xs, ys) in enumerate(series)
    ]
    for line in lines:
        line.points[~np.isfinite(line.points).all(axis=1)] = np.nan
    levels = [(plain(name), float(y)) for name, y in h_lines if math.isfinite(y)]

    chart = Chart(size, title, x_label, y_label)
    chart.legend(lines, levels)
    xs = np.concatenate([line.points[:, 0] for line in lines] or [np.empty(0)])
    ys = np.concatenate([*(line.points[:, 1] for line in lines), np.array([y for _, y in levels])])
    xs, ys = xs[np.isfinite(xs)], ys[np.isfinite(ys)]
    whole = bool((xs == np.round(xs)).all())
    chart.set_axes(lambda most: linear_axis(xs, most, whole, 0.025), linear_axis(ys, 8))
    for i, (_, y) in enumerate(levels):
        chart.level(y, *level_style(i))
    for line in lines:
        chart.line(line)
    return chart.finish()


def level_style(i: int) -> tuple[tuple[int, int, int], float]:
    """Colour and dash length of the i-th named height."""
    return (INK, FAINT)[i % 2], (9, 3.5, 1.5)[i % 3]


class Chart:
    """The page: shapes on a large canvas, text kept aside until the canvas has its final size."""

    def __init__(self, size: tuple[int, int], title: str, x_label: str, y_label: str):
        self.size = size
        self.canvas = Image.new("RGB", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), PAPER)
        self.pen = ImageDraw.Draw(self.canvas)
        self.texts: list[tuple] = []  # (x, y, text, anchor, color, font, upright)
        self.unit = unit = max(0.75, min(size[0] / 1000, size[1] / 640))  # below that, letters cannot be read
        self.heading, self.name, self.small = (font(round(points * unit)) for points in (21, 16, 14))
        self.title, self.x_label, self.y_label = plain(title), plain(x_label), plain(y_label)
        self.top = 18 * unit
        if title:
            self.write(size[0] / 2, self.top, shortened(title, self.heading, size[0] * 0.96), "ma", font=self.heading)
            self.top += self.heading.size + 12 * unit

    # -- strokes; all coordinates are output pixels

    def write(self, x, y, text, anchor, color=INK, font=None, upright=False) -> None:
        self.texts.append((x, y, text, anchor, color, font or self.small, upright))

    def stroke(self, points, color, width) -> None:
        scaled = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
        self.pen.line(scaled, color, round(width * self.unit * SUPERSAMPLE), joint="curve")

    def rule(self, x0, y0, x1, y1, color) -> None:
        """A straight line one pixel wide, snapped to whole pixels so that it stays sharp."""
        (x0, y0), (x1, y1) = (math.floor(x0), math.floor(y0)), (math.floor(x1), math.floor(y1))
        corners = (x0 * SUPERSAMPLE, y0 * SUPERSAMPLE, (x1 + 1) * SUPERSAMPLE - 1, (y1 + 1) * SUPERSAMPLE - 1)
        self.pen.rectangle(corners, fill=color)

    def dash(self, x0, x1, y, color, length) -> None:
        length *= self.unit
        x = x0
        while x < x1:
            self.stroke([(x, y), (min(x + length, x1), y)], color, 2)
            x += length + max(length * 0.6, 3 * self.unit)

    def mark(self, x, y, marker, color) -> None:
        """A filled shape with a thin white rim, so that it stands out on a line that crosses it."""
        for grow, ink in ((1.3 * self.unit, PAPER), (0, color)):
            r = 5 * self.unit + grow
            if marker == "circle":
                shape = [(x + r * math.cos(a), y + r * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40)]
            elif marker == "square":
                shape = [(x - r * 0.88, y - r * 0.88), (x + r * 0.88, y - r * 0.88)]
                shape += [(x + r * 0.88, y + r * 0.88), (x - r * 0.88, y + r * 0.88)]
            elif marker == "triangle":
                shape = [(x, y - r * 1.15), (x + r * 1.1, y + r * 0.85), (x - r * 1.1, y + r * 0.85)]
            else:
                shape = [(x, y - r * 1.25), (x + r * 1.25, y), (x, y + r * 1.25), (x - r * 1.25, y)]
            self.pen.polygon([(a * SUPERSAMPLE, b * SUPERSAMPLE) for a, b in shape], fill=ink)

    # -- parts

    def legend(self, lines: Sequence[Line], levels: Sequence[tuple[str, float]]) -> None:
        """Keys in centred rows under the title; as many rows as they need."""
        sample, space, widest = 34 * self.unit, 26 * self.unit, self.size[0] * 0.94
        keys = [(line.name, line, None) for line in lines if line.name]
        keys += [(name, None, level_style(i)) for i, (name, _) in enumerate(levels)]
        if len(keys) == 1 and not levels:
            return  # one line needs no key: the title and the axis say what it is
        rows, used = [[]], 0.0
        for text, line, style in keys:
            text = shortened(text, self.name, widest - sample)
            width = sample + self.name.getlength(text)
            if rows[-1] and used + space + width > widest:
                rows.append([])
                used = 0.0
            used += width + (space if rows[-1] else 0)
            rows[-1].append((text, width, line, style))
        for row in filter(None, rows):
            x = (self.size[0] - sum(width for _, width, _, _ in row) - space * (len(row) - 1)) / 2
            y = self.top + self.name.size / 2
            for text, width, line, style in row:
                if line is not None:
                    self.stroke([(x, y), (x + sample * 0.76, y)], line.color, 2.5)
                    if len(line.points) <= MARKERS_UP_TO:
                        self.mark(x + sample * 0.38, y, line.marker, line.color)
                else:
                    self.dash(x, x + sample * 0.76, y, *style)
                self.write(x + sample, y, text, "lm", font=self.name)
                x += width + space
            self.top += self.name.size + 9 * self.unit
        self.top += 4 * self.unit

    def set_axes(self, make_x, y_axis: Axis) -> None:
        """Margins from the widest tick label, then grid, frame, ticks and axis names."""
        u, small = self.unit, self.small
        y_labels = y_axis.labels()
        self.left = max((small.getlength(t) for t in y_labels), default=0) + 20 * u
        self.left += self.name.size + 10 * u if self.y_label else 0
        self.right = self.size[0] - 28 * u
        self.bottom = self.size[1] - small.size - 20 * u - (self.name.size + 8 * u if self.x_label else 0)
        self.y_axis = y_axis
        for most in range(12, 1, -1):
            self.x_axis = make_x(most)
            if self.x_labels_clear():
                break
        for tick, text in zip(y_axis.ticks, y_labels):
            y = self.y(tick)
            self.rule(self.left, y, self.right, y, GRID)
            self.write(self.left - 9 * u, y, text, "rm", FAINT)
        for tick, text in zip(self.x_axis.ticks, self.x_axis.labels()):
            x = self.x(tick)
            self.rule(x, self.bottom, x, self.bottom + 5 * u, FAINT)
            self.write(x, self.bottom + 9 * u, text, "ma", FAINT)
        self.rule(self.left, self.bottom, self.right, self.bottom, FAINT)
        middle = (self.left + self.right) / 2
        if self.x_label:
            self.write(middle, self.size[1] - 11 * u, self.x_label, "md", font=self.name)
        if self.y_label:
            self.write(12 * u, (self.top + self.bottom) / 2, self.y_label, "lm", font=self.name, upright=True)

    def x_labels_clear(self) -> bool:
        """Whether no tick label comes near the next one."""
        widths = [self.small.getlength(text) for text in self.x_axis.labels()]
        spans = [(self.x(tick) - w / 2, self.x(tick) + w / 2) for tick, w in zip(self.x_axis.ticks, widths)]
        return all(start - end > 10 * self.unit for (_, end), (start, _) in itertools.pairwise(spans))

    def x(self, value: float) -> float:
        return self.left + self.x_axis.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.place(value) * (self.bottom - self.top)

    def level(self, value: float, color, length) -> None:
        self.dash(self.left, self.right, self.y(value), color, length)

    def line(self, line: Line) -> None:
        known = np.isfinite(line.points[:, 0])
        at = [(self.x(x), self.y(y)) if ok else None for (x, y), ok in zip(line.points.tolist(), known)]
        few = len(at) <= MARKERS_UP_TO
        run: list[tuple[float, float]] = []
        for point in [*at, None]:
            if point is not None:
                run.append(point)
                continue
            if len(run) > 1:
                self.stroke(run, line.color, 2.5 if few else 2)
            elif len(run) == 1 and not few:
                self.mark(*run[0], line.marker, line.color)
            run = []
        if few:
            for point in filter(None, at):
                self.mark(*point, line.marker, line.color)

    def finish(self) -> np.ndarray:
        page = self.canvas.reduce(SUPERSAMPLE)
        pen = ImageDraw.Draw(page)
        for x, y, text, anchor, color, letters, upright in self.texts:
            if not upright:
                pen.text((x, y), text, color, letters, anchor=anchor)
                continue
            text = shortened(text, letters, self.size[1] * 0.9)
            strip = Image.new("RGB", (math.ceil(letters.getlength(text)) + 2, round(letters.size * 1.4)), PAPER)
            ImageDraw.Draw(strip).text((1, strip.height / 2), text, color, letters, anchor="lm")
            strip = strip.rotate(90, expand=True)
            page.paste(strip, (round(x), round(y - strip.height / 2)))
        return np.asarray(page)


def shortened(text: str, letters: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line of at most `width` pixels, its end replaced by dots where it is too long."""
    text = plain(text)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
