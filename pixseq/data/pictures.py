"""Pictures larger than what a model sees of them: a random part each time in training, the same centre everywhere else.

They are squares uint8 [N, H, W, 3], or whole, each of a size of its own. They are resized one by one, in threads.
Shapes: P pixels of all pictures together, B pictures at once, S the model's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from pixseq.cores import usable_cores
from pixseq.data.resample import resample, sides
from pixseq.numerics.whole import starts

SHOWN = 0.875  # how much of the shorter side the centre crop shows: 224 of 256, as AIM is evaluated
BICUBIC = Image.Resampling.BICUBIC


class Pictures:
    """Whole pictures uint8 [h, w, 3], kept as `pixels` uint8 [P, 3], one after the other in raster order.

    `shapes` [N, 2] holds the height and width of each.
    """

    def __init__(self, pixels: np.ndarray, shapes: np.ndarray):
        self.pixels, self.shapes = pixels, shapes.astype(np.int64)
        self.starts = starts(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[self.starts[index] : self.starts[index + 1]].reshape(*self.shapes[index], 3)


def joined(pictures: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [h, w, 3] -> their pixels uint8 [P, 3] and shapes int32 [n, 2]."""
    pictures = list(pictures)
    pixels = np.concatenate([np.empty((0, 3), np.uint8), *(picture.reshape(-1, 3) for picture in pictures)])
    return pixels, np.array([picture.shape[:2] for picture in pictures], np.int32).reshape(-1, 2)


def resized(pictures: Image.Image | np.ndarray, shorter: int, method: Image.Resampling) -> np.ndarray:
    """A whole picture, or uint8 [n, h, w(, 3)], with a shorter side of `shorter` pixels: uint8 [n, h', w', 3].

    The longer side is rounded down, as by torchvision.
    """
    size = sides(pictures)
    width, height = (shorter if n == min(size) else shorter * n // min(size) for n in size)
    return resample(pictures, (width, height), method)


def centre(pictures: np.ndarray, side: int) -> np.ndarray:
    """The central squares of [n, h, w, 3]; where they cannot be in the middle they lie where torchvision takes them."""
    top, left = (round((n - side) / 2) for n in pictures.shape[1:3])
    return pictures[:, top : top + side, left : left + side]


def resized_side(side: int) -> int:
    """The shorter side that pictures are resized to before their centre of `side` pixels is taken."""
    return math.ceil(side / SHOWN)


def centres(pictures: Iterable[np.ndarray], side: int) -> np.ndarray:
    """What a model of that side sees in evaluation: uint8 [B, S, S, 3] of pictures of any sizes.

    The published transform: the shorter side to S / 0.875 (bicubic), then the centre.
    """

    def shown(picture: np.ndarray) -> np.ndarray:
        return centre(resized(picture[None], resized_side(side), BICUBIC), side)[0]

    return _each(shown, [(picture,) for picture in pictures], side)


def cropped(pictures: Sequence[np.ndarray], boxes: np.ndarray, side: int) -> np.ndarray:
    """The boxes int [4, B] (left, top, width, height), one in each picture, resized to uint8 [B, S, S, 3]: bicubic."""

    def crop(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
        left, top, width, height = box.tolist()
        return resample(picture[None], (side, side), BICUBIC, (left, top, left + width, top + height))[0]

    return _each(crop, list(zip(pictures, boxes.T)), side)


def as_seen(images: np.ndarray | Pictures, height: int, width: int) -> np.ndarray:
    """Pictures as a model of that size sees them in evaluation, uint8 [B, height, width, 3]: their centres.

    A block of pictures of one size, which is the model's, is as it is.
    """
    if isinstance(images, np.ndarray) and images.shape[1:3] == (height, width):
        return images
    return centres(images, height)


def _each(make: Callable[..., np.ndarray], given: Sequence[tuple], side: int) -> np.ndarray:
    """`make` of each, on all cores: resizing lets go of the interpreter."""
    out = np.empty((len(given), side, side, 3), np.uint8)

    def one(i: int) -> None:
        out[i] = make(*given[i])

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(one, range(len(given))))
    return out
