"""Pixels to palette indices and back (Image GPT, section 3.2), through tables over all 2^24 colours.

A colour's code is red << 16 | green << 8 | blue. Palettes are float64 [K, 3] in [-1, 1]: value = byte / 127.5 - 1.
Shapes: images uint8 [..., 3]; tokens uint16 [...]; tables [2^24], indexed by code. N images of T tokens, T = H * W, or
3 * H * W in the rgb scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pixseq.numerics.nearest import Distances, contested_cubes

COLOURS = 1 << 24
GRAYS = np.repeat(np.arange(256)[:, None] / 127.5 - 1.0, 3, axis=1)  # what the gray scheme's tokens look like
PIXELS_AT_ONCE = 1 << 17  # codes are int64 while they index: 1 MB, so that they stay in cache


def empty_histogram() -> np.ndarray:
    """int64 [2^24], 128 MB: how often each colour was seen. Histograms of parts add up to that of the whole."""
    return np.zeros(COLOURS, np.int64)


def add_to_histogram(histogram: np.ndarray, images: np.ndarray) -> None:
    """Count the pixels of uint8 [..., 3] into `histogram`, in place."""
    for _, codes in _codes(images):
        np.add.at(histogram, codes, 1)  # 10 ns a pixel; bincount would fill a new 128 MB table for every batch


def nearest(rgb: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """uint8 [n, 3] -> int64 [n]: the nearest colour of float64 [K, 3], by definition. For a few colours.

    Nearest is argmin over k of the float64 sum (r - c_k0)^2 + (g - c_k1)^2 + (b - c_k2)^2 with r = byte / 127.5 - 1;
    the lowest index wins a tie.
    """
    return ((rgb[:, None, :] / 127.5 - 1.0 - palette) ** 2).sum(axis=2).argmin(axis=1)


def nearest_table(palette: np.ndarray) -> np.ndarray:
    """uint16 [2^24]: the `nearest` of each colour. `palette` has K <= 65535 colours; repeated ones are allowed."""
    firsts = _first_occurrences(palette)
    distinct = palette[firsts]
    distances = Distances(distinct)
    table = np.empty(COLOURS, np.uint16)
    for edge, cubes, candidates in contested_cubes(distinct):
        place, owners = tuple(cubes.T), firsts[candidates]
        if candidates.shape[1] == 1:
            by_cube(table, edge)[place] = owners[:, :, None, None]
        else:
            columns = distances.nearest(cubes, candidates)
            by_cube(table, edge)[place] = np.take_along_axis(owners, columns, axis=1).reshape(-1, edge, edge, edge)
    return table


def by_cube(table: np.ndarray, edge: int) -> np.ndarray:
    """A table [2^24] seen as the cubes of some edge, of edge^3 colours each: [side, side, side, edge, edge, edge]."""
    side = 256 // edge
    return table.reshape(side, edge, side, edge, side, edge).transpose(0, 2, 4, 1, 3, 5)


def quantize(images: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> tokens uint16 [...]: one look-up a pixel."""
    tokens = np.empty(images.shape[:-1], table.dtype)
    flat = tokens.reshape(-1)
    for start, codes in _codes(images):
        np.take(table, codes, out=flat[start : start + len(codes)], mode="clip")  # codes are in range: skip the check
    return tokens


def dequantize(tokens: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Tokens [...] -> uint8 [..., 3], as OpenAI's sampler draws them: rint(127.5 * (c + 1))."""
    return palette_bytes(palette)[tokens]


def to_tokens(images: np.ndarray, scheme: str, table: np.ndarray | None = None) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint16 [N, T] in raster order.

    palette: the nearest colour, by `table` (see nearest_table). rgb: red, green, blue of each pixel. gray: luma.
    """
    if scheme == "palette":
        if table is None:
            raise ValueError("colours of a palette are looked up in its table")
        tokens = quantize(images, table)
    else:
        tokens = (images if scheme == "rgb" else luma(images)).astype(np.uint16)
    return tokens.reshape(len(images), -1)


def to_images(tokens: np.ndarray, height: int, width: int, colors: np.ndarray | None) -> np.ndarray:
    """uint16 [N, T], or pixels uint8 [N, H, W, 3] -> uint8 [N, H, W, 3]: what encoding kept of the images.

    `colors` float64 [K, 3] are those of the tokens; None: they are the bytes themselves.
    """
    if colors is None:
        return tokens.astype(np.uint8).reshape(-1, height, width, 3)
    return dequantize(tokens.reshape(-1, height, width), colors)


def luma(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> uint8 [...]: 0.299 r + 0.587 g + 0.114 b in Pillow's fixed point; grey stays as it is."""
    r, g, b = (images[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).astype(np.uint8)


def palette_bytes(palette: np.ndarray) -> np.ndarray:
    """uint8 [K, 3]: the palette as it is seen."""
    return np.clip(np.rint(127.5 * (palette + 1.0)), 0, 255).astype(np.uint8)


def unpack(codes: np.ndarray) -> np.ndarray:
    """Codes [...] -> uint8 [..., 3]."""
    return np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)


def squared_error(images: np.ndarray, tokens: np.ndarray, palette: np.ndarray) -> float:
    """Sum over pixels and channels of (byte - palette colour)^2, on the 0..255 scale."""
    colours = (127.5 * (palette + 1.0)).astype(np.float32)
    pixels, indices = images.reshape(-1, 3), tokens.reshape(-1)
    total = 0.0
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        block = slice(start, start + PIXELS_AT_ONCE)
        off = np.take(colours, indices[block], axis=0, mode="clip")
        off -= pixels[block]
        off *= off
        total += float(off.sum(dtype=np.float64))
    return total


def psnr_db(mse: float) -> float | None:
    """Peak signal to noise of an error summed over three channels on the 0..255 scale; None where there is no error."""
    return float(10 * np.log10(3 * 255.0**2 / mse)) if mse > 0 else None


def unigram_entropy(counts: np.ndarray) -> float:
    """Nats per token of a model that knows only how often each token occurs."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def token_counts(tokens: np.ndarray, n_vocab: int) -> np.ndarray:
    """Tokens [...] -> int64 [n_vocab, or more where they reach higher]: how often each occurs."""
    flat = tokens.reshape(-1)
    counts = np.zeros(max(n_vocab, int(flat.max()) + 1), np.int64)
    for start in range(0, len(flat), PIXELS_AT_ONCE):
        counts += np.bincount(flat[start : start + PIXELS_AT_ONCE], minlength=len(counts))
    return counts


def byte_counts(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> int64 [3 * 256]: how often each byte occurs in red, then in green, then in blue."""
    counts, pixels = np.zeros((3, 256), np.int64), images.reshape(-1, 3)
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        block = pixels[start : start + PIXELS_AT_ONCE]
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel], minlength=256)
    return counts.reshape(-1)


def channel_statistics(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of byte / 255 in red, green and blue, by their `byte_counts`: exact until the end."""
    means, deviations = [], []
    for channel in counts.reshape(3, 256).tolist():  # Python's integers do not overflow
        n = sum(channel)
        total = sum(count * byte for byte, count in enumerate(channel))
        squares = sum(count * byte**2 for byte, count in enumerate(channel))
        means.append(total / (255 * n))
        deviations.append(math.sqrt(n * squares - total**2) / (255 * n))
    return means, deviations


def _codes(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first pixel, codes int64 of a block of pixels) over uint8 [..., 3]."""
    pixels = images.reshape(-1, 3)
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        block = pixels[start : start + PIXELS_AT_ONCE]
        codes = block[:, 0].astype(np.intp)
        for channel in (1, 2):
            codes <<= 8
            codes |= block[:, channel]
        yield start, codes


def _first_occurrences(palette: np.ndarray) -> np.ndarray:
    """uint16 [distinct], ascending: the lowest index of every distinct colour. No other can be the nearest."""
    return np.sort(np.unique(palette, axis=0, return_index=True)[1]).astype(np.uint16)
