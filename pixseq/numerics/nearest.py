"""Which palette colours can be nearest to some colour of a small cube of RGB space: exact, pruned, vectorised.

RGB space is halved along all three axes again and again. A cube of edge e keeps palette colour c only if c can beat the
colour w nearest to the cube's centre somewhere inside. d(x, c) - d(x, w) is linear in x, so its least value over the
cube is its value at the centre less (e - 1) |c - w|_1: one comparison, no approximation. A cube that is left with one
colour is done. Of 512 colours most cubes of edge 4 are, and the others have two or three, compared colour by colour.

Shapes: K palette colours, n cubes, m candidates a cube, p (cube, candidate) pairs; 64 colours in a cube of edge 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

EDGE = 4  # of the smallest cubes: 64 x 64 x 64 of them
SIDE = 256 // EDGE
PAIRS_AT_ONCE = 1 << 17  # bounds memory to some 40 MB of temporaries whatever the palette, and keeps them in cache
CUBES_AT_ONCE = 1 << 11  # compared colour by colour: a megabyte of distances, which stays in cache
SLACK = 1e-6  # in squared 0..255 units; rounding errors are below 1e-9
OCTANTS = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), axis=1)
OFFSETS = np.stack(np.unravel_index(np.arange(EDGE**3), (EDGE, EDGE, EDGE)), axis=1)  # of the colours of a cube
LINEAR = np.concatenate([np.ones((EDGE**3, 1)), OFFSETS], axis=1)  # [64, 4]: a linear function of them is f @ LINEAR.T


def contested_cubes(
    palette: np.ndarray, occupied: dict[int, np.ndarray] | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (edge, cubes [n, 3], candidates [n, m]) until every colour was in one cube; m is 1, or the edge 4.

    `palette` is float64 [K, 3] in [-1, 1] without repeated colours. `cubes` counts in cubes: cube (i, j, k) of edge e
    holds red ei..ei+e-1. The candidates of a cube ascend, and hold the nearest palette colour of each of its colours
    and all that could tie with it. `occupied`, bool [256/edge] * 3 of the edges 4, 8, ... 128, leaves out other cubes.
    """
    colours = 127.5 * (palette + 1.0)
    occupancy = occupied or {}
    everything = np.zeros((1, 3), np.intp), np.zeros(len(palette), np.intp), np.arange(len(palette))
    work = [(256, *everything)]
    while work:
        edge, cubes, owner, candidate = work.pop()
        if len(owner) > PAIRS_AT_ONCE and len(cubes) > 1:
            half = len(cubes) // 2
            cut = np.searchsorted(owner, half)
            work.append((edge, cubes[half:], owner[cut:] - half, candidate[cut:]))
            work.append((edge, cubes[:half], owner[:cut], candidate[:cut]))
            continue
        keep = _can_win(edge, cubes, owner, colours[candidate])
        owner, candidate = owner[keep], candidate[keep]
        alone = np.bincount(owner, minlength=len(cubes)) == 1
        done = alone[owner]
        yield edge, cubes[alone], candidate[done][:, None]
        cubes, owner, candidate = cubes[~alone], (np.cumsum(~alone) - 1)[owner[~done]], candidate[~done]
        if edge == EDGE:
            yield from _by_count(cubes, owner, candidate)
        else:
            work.append((edge // 2, *_halve(cubes, owner, candidate, occupancy.get(edge // 2))))


def _can_win(edge: int, cubes: np.ndarray, owner: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """bool [p]: may this pair's colour be nearest anywhere in its cube? `owner` ascends and names every cube."""
    centres = cubes * float(edge) + (edge - 1) / 2
    distance = sum((colours[:, axis] - centres[owner, axis]) ** 2 for axis in range(3))
    starts = np.searchsorted(owner, np.arange(len(cubes)))
    least = np.minimum.reduceat(distance, starts)[owner]
    at_least = np.flatnonzero(distance == least)
    winner = np.empty(len(cubes), np.intp)
    winner[owner[at_least]] = at_least
    reach = sum(np.abs(colours[:, axis] - colours[winner[owner], axis]) for axis in range(3)) * (edge - 1)
    return distance - least <= reach + SLACK


def _halve(
    cubes: np.ndarray, owner: np.ndarray, candidate: np.ndarray, occupied: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The occupied cubes of half the edge, each with the candidates of the cube it lies in."""
    children = (2 * cubes[:, None, :] + OCTANTS).reshape(-1, 3)
    parent = np.repeat(np.arange(len(cubes)), 8)
    if occupied is not None:
        alive = occupied[tuple(children.T)]
        children, parent = children[alive], parent[alive]
    starts = np.searchsorted(owner, np.arange(len(cubes) + 1))
    counts = np.diff(starts)[parent]
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return children, np.repeat(np.arange(len(children)), counts), candidate[np.repeat(starts[parent], counts) + offset]


def _by_count(
    cubes: np.ndarray, owner: np.ndarray, candidate: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Ragged candidate lists as rectangles: the cubes with two candidates, with three, ..."""
    counts = np.bincount(owner, minlength=len(cubes))
    for m in np.unique(counts):
        alike, candidates = cubes[counts == m], candidate[counts[owner] == m].reshape(-1, m)
        for start in range(0, len(alike), CUBES_AT_ONCE):
            block = slice(start, start + CUBES_AT_ONCE)
            yield EDGE, alike[block], candidates[block]


class Distances:
    """Compares the candidates of cubes of edge 4 at each of their colours.

    The nearest is by definition that of the least float64 (r - c_r)^2 + (g - c_g)^2 + (b - c_b)^2 with r = x / 127.5 -
    1, added in that order; the lowest index where several tie. The difference of two distances is linear in the colour,
    so a product of matrices tells who is nearer; where it comes too near to zero to tell, the definition does.
    """

    def __init__(self, palette: np.ndarray):
        self.colours = 127.5 * (palette + 1.0)
        self.squares = (self.colours**2).sum(axis=1)
        levels = np.arange(256) / 127.5 - 1.0
        self.channels = [
            np.ascontiguousarray(((levels[:, None] - column) ** 2).T).reshape(-1, SIDE, EDGE) for column in palette.T
        ]

    def nearest(self, cubes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which of the candidates [n, m] is the nearest to each colour: its column, uint16 [n, 64]."""
        first, *others = candidates.T
        chosen = np.zeros((len(cubes), EDGE**3), np.uint16)
        least = np.zeros((len(cubes), EDGE**3))  # beyond the first one's distance
        for column, other in enumerate(others, 1):
            distance = self._beyond(cubes, first, other)
            gap = distance - least
            if np.abs(gap).min() <= SLACK:
                return self._by_definition(cubes, candidates)
            np.copyto(chosen, column, where=gap < 0)
            np.minimum(least, distance, out=least)
        return chosen

    def _beyond(self, cubes: np.ndarray, first: np.ndarray, other: np.ndarray) -> np.ndarray:
        """How much larger the squared distance to `other` is than that to `first`, on the 0..255 scale: [n, 64]."""
        slope = -2 * (self.colours[other] - self.colours[first])
        at_corner = self.squares[other] - self.squares[first] + (slope * (EDGE * cubes)).sum(axis=1)
        return np.concatenate([at_corner[:, None], slope], axis=1) @ LINEAR.T

    def _by_definition(self, cubes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        chosen = np.zeros((len(cubes), EDGE**3), np.uint16)
        least = self._from(cubes, candidates[:, 0])
        for column, candidate in enumerate(candidates.T[1:], 1):
            distance = self._from(cubes, candidate)
            closer = distance < least
            np.copyto(chosen, column, where=closer)
            np.copyto(least, distance, where=closer)
        return chosen

    def _from(self, cubes: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        r, g, b = (table[candidate, cubes[:, axis]] for axis, table in enumerate(self.channels))
        return (r[:, :, None, None] + g[:, None, :, None] + b[:, None, None, :]).reshape(-1, EDGE**3)
