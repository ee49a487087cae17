"""k-means over every pixel (Image GPT, section 3.2: 512 clusters of RGB values), from a histogram of colours.

A plain one starts it, on cells of RGB space that stand for their colours by their mean and count. Lloyd steps over all
distinct colours go on from there: each assigns every colour to its exactly nearest centre, and pushes the centres
towards the means, with momentum. All sums are integers below 2^53, so the order of addition, hence the number of
threads, changes no bit.

Why so: on a million CIFAR-10 pixels scikit-learn needs 92 s to a mean squared error of 66.2; the cells alone stop at
67.6 after one. The steps cost 0.1 s each, and 16 of them reach 66.4.

Shapes: K clusters; a histogram is int64 [2^24] (see numerics/quantize.py). Positions are on the 0..255 scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixseq.cores import threads, usable_cores
from pixseq.numerics.nearest import EDGE, LINEAR, SIDE, Distances, contested_cubes
from pixseq.numerics.quantize import by_cube, nearest_table, psnr_db, unpack
from pixseq.numerics.weighted_kmeans import weighted_kmeans

REFINE_STEPS = 16
START_POINTS = 1 << 15  # the start takes less than a second at 512 clusters
PUSH, MOMENTUM = 1.5, 0.7  # 16 steps of these go as far as some 50 plain ones (1, 0)


@dataclass(frozen=True)
class PaletteFit:
    """`colors` float64 [K, 3] in [-1, 1] of float32 values, ordered by luma, then red, green, blue.

    `mse` is the squared distance to the nearest colour, summed over channels on the 0..255 scale, mean over all pixels.
    """

    colors: np.ndarray
    mse: float
    psnr_db: float | None
    distinct: int
    pixels: int


def fit_palette(histogram: np.ndarray, colors: int, seed: int = 0, refine_steps: int = REFINE_STEPS) -> PaletteFit:
    """Cluster the pixels counted in `histogram` into at most `colors`; fewer where there are fewer distinct colours."""
    from threadpoolctl import threadpool_limits

    distinct = int(np.count_nonzero(histogram))
    cells = Cells(histogram)
    with threadpool_limits(1):  # the threads of BLAS are in the way of ours
        if distinct <= colors:
            centres = unpack(np.flatnonzero(histogram)) * 1.0
        else:
            centres = _refine(cells, _start(cells, distinct, colors, seed), refine_steps)
        palette = _in_order(centres)
        mse = max(round(cells.mse(_positions(palette), *cells.assign(_positions(palette))), 6), 0.0)
    return PaletteFit(palette, mse, psnr_db(mse), distinct, cells.pixels)


class Cells:
    """A histogram by cubes of 4 x 4 x 4 colours, with the sums that move centres.

    Only occupied cubes are kept: `counts` float64 [n, 64] has a row for each, and `rows` [64, 64, 64] says which.
    `moments` are as of cell_moments, of all; `parts` those of a part of the cubes each, by edge from 4 to 256.
    """

    def __init__(self, histogram: np.ndarray):
        self.histogram = histogram
        slabs = by_cube(histogram, EDGE)
        with threads(usable_cores()) as pool:
            self.occupied = np.stack(pool.map(_occupied, slabs))
            self.rows = (np.cumsum(self.occupied) - 1).reshape(self.occupied.shape)
            self.counts = np.empty((self.occupied.sum(), EDGE**3))
            ends = np.cumsum(self.occupied.sum(axis=(1, 2)))[:-1]
            pool.starmap(_copy_counts, zip(slabs, self.occupied, np.split(self.counts, ends)))
        sums = np.zeros((*self.occupied.shape, 4))
        sums[self.occupied] = self.counts @ LINEAR
        for axis, place in enumerate(np.ogrid[:SIDE, :SIDE, :SIDE], 1):
            sums[..., axis] += EDGE * place * sums[..., 0]
        self.moments = sums
        self.parts = self._parts(usable_cores())
        self.pixels = int(histogram.sum())
        level = np.arange(256.0) ** 2
        cube = histogram.reshape(256, 256, 256)
        self.square = sum(float(cube.sum(axis=axes) @ level) for axes in ((1, 2), (0, 2), (0, 1)))

    def _parts(self, count: int) -> list[dict[int, np.ndarray]]:
        """Slabs along red with about as many occupied cubes each."""
        numbers = np.cumsum(self.occupied.sum(axis=(1, 2)))
        slab = (numbers - 1) * count // numbers[-1]
        return [_by_edge(self.moments * (slab == i)[:, None, None, None]) for i in range(count)]

    def assign(self, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels nearest to each centre: their number [K] and the sum of their values [K, 3]."""
        with threads(len(self.parts)) as pool:
            totals = np.sum(pool.map(lambda part: self._assign(centres, part), self.parts), axis=0)
        return totals[0], totals[1:].T

    def _assign(self, centres: np.ndarray, part: dict[int, np.ndarray]) -> np.ndarray:
        """[4, K]: number and sums of the pixels of some cubes that are nearest to each centre."""
        palette = centres / 127.5 - 1.0
        distances = Distances(palette)
        totals = np.zeros((4, len(centres)))
        occupied = {edge: moments[..., 0] > 0 for edge, moments in part.items()}
        for edge, cubes, candidates in contested_cubes(palette, occupied):
            left = part[edge][tuple(cubes.T)]
            if candidates.shape[1] > 1:
                columns = distances.nearest(cubes, candidates)
                counts = self.counts[self.rows[tuple(cubes.T)]]
            for column in range(1, candidates.shape[1]):
                won = (counts * (columns == column)) @ LINEAR
                won[:, 1:] += EDGE * cubes * won[:, :1]
                left -= won
                _add(totals, candidates[:, column], won)
            _add(totals, candidates[:, 0], left)  # what no other colour won
        return totals

    def mse(self, centres: np.ndarray, count: np.ndarray, sums: np.ndarray) -> float:
        """Mean squared distance of all pixels to `centres`, given the pixels that belong to each."""
        at_centres = (count * (centres**2).sum(axis=1)).sum()
        return float((self.square - 2 * (centres * sums).sum() + at_centres) / self.pixels)


def _occupied(slab: np.ndarray) -> np.ndarray:
    """Which of the cubes [64, 64, 4, 4, 4] of one red hold pixels."""
    return np.asarray(slab.any(axis=(2, 3, 4)))


def _copy_counts(slab: np.ndarray, occupied: np.ndarray, counts: np.ndarray) -> None:
    """Those of the occupied cubes of one red, into their place."""
    counts[:] = slab[occupied].reshape(-1, EDGE**3)


def _by_edge(moments: np.ndarray) -> dict[int, np.ndarray]:
    """Moments of cubes of edge 4, and summed up of 8, 16, ... 256."""
    edges = {EDGE: moments}
    while (side := len(moments) // 2) > 0:
        moments = moments.reshape(side, 2, side, 2, side, 2, 4).sum(axis=(1, 3, 5))
        edges[256 // side] = moments
    return edges


def _add(totals: np.ndarray, owners: np.ndarray, moments: np.ndarray) -> None:
    """Add the moments [n, 4] of cubes to those of their owners, in place."""
    for total, moment in zip(totals, moments.T):
        total += np.bincount(owners, moment, minlength=len(total))


def cell_moments(histogram: np.ndarray, edge: int) -> np.ndarray:
    """float64 [256/edge, 256/edge, 256/edge, 4]: count, sum of red, of green, of blue of the pixels in each cube."""
    side = 256 // edge
    blocks = histogram.reshape(side, edge, side, edge, side, edge)
    levels = np.arange(256).reshape(side, edge)
    moments = np.empty((side, side, side, 4))
    moments[..., 0] = blocks.sum(axis=(1, 3, 5))
    moments[..., 1] = np.einsum("iajbkc,ia->ijk", blocks, levels)
    moments[..., 2] = np.einsum("iajbkc,jb->ijk", blocks, levels)
    moments[..., 3] = np.einsum("iajbkc,kc->ijk", blocks, levels)
    return moments


def _start(cells: Cells, distinct: int, colors: int, seed: int) -> np.ndarray:
    """Centres [K, 3] by weighted k-means of at most START_POINTS points.

    The points are the colours themselves if they are few, else means of the finest cells that are few enough. An eighth
    of the limit is always exceeded, since cells split in eight: hence more points than centres.
    """
    limit = max(START_POINTS, 8 * colors)
    if distinct <= limit:
        codes = np.flatnonzero(cells.histogram)
        points, weights = unpack(codes).astype(np.float64), cells.histogram[codes].astype(np.float64)
    else:
        by_edge = _by_edge(cells.moments)
        edges = (8,) if len(cells.counts) > limit else (2, EDGE)
        for edge in edges:
            moments = cell_moments(cells.histogram, edge) if edge < EDGE else by_edge[edge]
            moments = moments[moments[..., 0] > 0]
            if len(moments) <= limit:
                break
        points, weights = moments[:, 1:] / moments[:, :1], moments[:, 0]
    return weighted_kmeans(points, weights, colors, seed)


def _refine(cells: Cells, centres: np.ndarray, steps: int) -> np.ndarray:
    """The best centres met in `steps` Lloyd steps with momentum; a step that made things worse ends the momentum."""
    best, least = centres, np.inf
    velocity = np.zeros_like(centres)
    for _ in range(steps):
        count, sums = cells.assign(centres)
        filled = count > 0
        means = np.where(filled[:, None], sums / np.maximum(count, 1)[:, None], centres)
        error = cells.mse(means, count, sums)
        if filled.all() and error < least:
            best, least = means, error
        elif filled.all():
            velocity[:] = 0
        if np.array_equal(means, centres) and filled.all():
            break
        velocity = MOMENTUM * velocity + PUSH * (means - centres)
        centres = centres + velocity
        empty = np.flatnonzero(~filled)
        if len(empty):
            relocated = _worst_colours(cells.histogram, means, len(empty))
            centres[empty[: len(relocated)]] = relocated
            velocity[empty] = 0
    return best


def _worst_colours(histogram: np.ndarray, centres: np.ndarray, wanted: int) -> np.ndarray:
    """Up to `wanted` colours [n, 3], of different red, that add most to the error: where empty clusters start again."""
    table = nearest_table(centres / 127.5 - 1.0)
    worst = []
    for plane in range(0, len(histogram), 1 << 16):
        codes = plane + np.flatnonzero(histogram[plane : plane + (1 << 16)])
        if len(codes):
            error = histogram[codes] * ((unpack(codes) - centres[table[codes]]) ** 2).sum(axis=1)
            worst.append((-error.max(), codes[error.argmax()]))
    return unpack(np.array([code for _, code in sorted(worst)[:wanted]])).astype(np.float64)


def _positions(palette: np.ndarray) -> np.ndarray:
    return 127.5 * (palette + 1.0)


def _in_order(centres: np.ndarray) -> np.ndarray:
    """A palette in [-1, 1], dark to light, so that near indices mean near brightness.

    Values are rounded to float32, the precision in which palettes travel elsewhere (.npy, Hugging Face), so that the
    same palette keeps its id in every form.
    """
    palette = (centres / 127.5 - 1.0).astype(np.float32).astype(np.float64)
    luma = palette @ np.array([0.299, 0.587, 0.114])
    return palette[np.lexsort((palette[:, 2], palette[:, 1], palette[:, 0], luma))]
