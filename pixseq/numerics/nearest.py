"""Which palette colours can be nearest to some colour of a small cube of RGB space: exact, pruned, vectorised.

RGB space is halved along all three axes again and again. A cube of edge e keeps palette colour c only if c can beat the
colour w nearest to the cube's centre somewhere inside. d(x, c) - d(x, w) is linear in x, so its least value over the
cube is its value at the centre less (e - 1) |c - w|_1: one comparison, no approximation. Cubes of edge 4 are left with
about two of 512 colours, and only those are compared colour by colour.

Shapes: K palette colours, n cubes, m candidates a cube, p (cube, candidate) pairs; 64 colours in a cube of edge 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

EDGE = 4  # of the smallest cubes: 64 x 64 x 64 of them
SIDE = 256 // EDGE
PAIRS_AT_ONCE = 1 << 16  # bounds memory to some 20 MB of temporaries whatever the palette, and keeps them in cache
SLACK = 1e-6  # in squared 0..255 units; rounding errors are below 1e-9
OCTANTS = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), axis=1)


def contested_cubes(palette: np.ndarray, occupied: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (cubes [n, 3], candidates [n, m]) until every cube of edge 4 was yielded once, m differing between yields.

    `palette` is float64 [K, 3] in [-1, 1] without repeated colours. `cubes` counts in cubes: cube (i, j, k) holds red
    4i..4i+3. The candidates of a cube ascend, and hold the nearest palette colour of each of its colours and all that
    could tie with it. `occupied`, bool [64, 64, 64], leaves out the other cubes.
    """
    colours = 127.5 * (palette + 1.0)
    occupancy = _pyramid(occupied)
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


def _by_count(cubes: np.ndarray, owner: np.ndarray, candidate: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ragged candidate lists as rectangles: the cubes with one candidate, with two, ..."""
    counts = np.bincount(owner, minlength=len(cubes))
    for m in np.unique(counts):
        yield cubes[counts == m], candidate[counts[owner] == m].reshape(-1, m)


def _pyramid(occupied: np.ndarray | None) -> dict[int, np.ndarray]:
    """Occupied cubes by edge: 4 as given, 8, 16, ... 128."""
    levels, edge = {}, EDGE
    while occupied is not None and edge < 256:
        levels[edge] = occupied
        side = len(occupied) // 2
        occupied = np.any(occupied.reshape(side, 2, side, 2, side, 2), axis=(1, 3, 5))
        edge *= 2
    return levels


class Distances:
    """Squared distances in [-1, 1] units from every colour of a cube to a palette, as sums of three table look-ups.

    Each is float64 (r - c_r)^2 + (g - c_g)^2 + (b - c_b)^2 with r = x / 127.5 - 1, added in that order: the expression
    that defines the nearest colour, so the comparison of two of them decides ties exactly as brute force would.
    """

    def __init__(self, palette: np.ndarray):
        levels = np.arange(256) / 127.5 - 1.0
        self.channels = [
            np.ascontiguousarray(((levels[:, None] - column) ** 2).T).reshape(-1, SIDE, EDGE) for column in palette.T
        ]

    def nearest(self, cubes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """The nearest candidate of each colour: [n, 64] in the order r, g, b; the lowest index where several tie."""
        chosen = np.repeat(candidates[:, :1], EDGE**3, axis=1)
        least = self._from(cubes, candidates[:, 0])
        for column in candidates.T[1:]:
            distance = self._from(cubes, column)
            closer = distance < least
            np.copyto(chosen, column[:, None], where=closer)
            np.copyto(least, distance, where=closer)
        return chosen

    def _from(self, cubes: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        r, g, b = (table[candidate, cubes[:, axis]] for axis, table in enumerate(self.channels))
        return (r[:, :, None, None] + g[:, None, :, None] + b[:, None, None, :]).reshape(-1, EDGE**3)
