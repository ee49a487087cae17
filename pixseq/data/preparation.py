"""How a picture is cut and resized to rows, square or whole: all that decides its pixels.

Shapes: S the side, n pictures of one size. A row is a picture of S x S, of which views make several an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor

from pixseq.data.decode import MIN_SIDE
from pixseq.data.pictures import centre, resized
from pixseq.data.records import MAX_PIXELS
from pixseq.errors import UsageError
from pixseq.streams import Stream
from pixseq.text import shown

MOST_PIXELS = 2**31 - 1  # Pillow counts no further
MOST_SIDE = 4096  # pixels
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP, SHORTER = 224, (256.0, 384.0)  # pixels: the paper's crop, and the shorter side it is drawn from (3.1)


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the pixels. Raises UsageError for values that make no sense.

    resize   crop: shorter side to S, centre crop S, in one resize of the centre square (the paper's evaluation passes
             through a 224 crop, which is the same square); squash: both sides straight to S, as Hugging Face does;
             whole: nothing is cut off, the shorter side becomes S, and a picture that is smaller stays as it is.
    resized_side   of crop: the shorter side to this many pixels first, then the centre S of them, as torchvision's
             Resize and CenterCrop do.
    filter   The paper names none. Pillow's antialiased bilinear is Hugging Face's, so that squash gives its tokens.
    bit_depth   Of 16-bit pictures: how many bits hold values; None: all 16.
    views    N > 0: N rows an image, each a random crop as in the paper's training (3.1): shorter side drawn from
             256..384, a 224 crop anywhere, then to S. A view is a function of (seed, image number, view number).
    """

    size: int = 32
    resize: str = "crop"
    filter: str = "bilinear"
    background: str = "white"
    views: int = 0
    seed: int = 0
    on_error: str = "fail"
    max_pixels: int = MAX_PIXELS
    bit_depth: int | None = None
    resized_side: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("resize", self.resize, ("crop", "squash", "whole")),
            ("filter", self.filter, tuple(FILTERS)),
            ("on-error", self.on_error, ("fail", "skip")),
        ):
            if value not in choices:
                raise UsageError(f"--{name} {value} is not one of {', '.join(choices)}")
        for name, number, low, high in (
            ("size", self.size, 1, MOST_SIDE),
            ("views", self.views, 0, 1_000_000),
            ("seed", self.seed, 0, 2**63 - 1),
            ("max-pixels", self.max_pixels, 1, MOST_PIXELS),
            ("bit-depth", self.bit_depth or 16, 1, 16),
        ):
            if not low <= number <= high:
                raise UsageError(f"--{name} {number} is not between {low} and {high}")
        if self.views and self.resize != "crop":
            raise UsageError(
                f"--views draws square crops, so it cannot go with --resize {self.resize}", "leave one of them out"
            )
        self._check_resized_side()
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise UsageError(
                f"--background {shown(self.background)} is no colour", "e.g. white, black or #808080"
            ) from None

    def _check_resized_side(self) -> None:
        if self.resized_side is None:
            return
        if self.resize != "crop" or self.views:
            other = "--views" if self.views else f"--resize {self.resize}"
            raise UsageError(f"--resized-side is of the centre crop, not of {other}", "leave one of them out")
        if not self.size <= self.resized_side <= MOST_SIDE:
            raise UsageError(
                f"--resized-side {self.resized_side} is not between --size, {self.size}, and {MOST_SIDE}",
                "the centre --size is cut from pictures of that shorter side",
            )

    @property
    def backdrop(self) -> tuple[int, int, int]:
        return ImageColor.getrgb(self.background)[:3]

    def boxes(self, width: int, height: int, index: int) -> list[tuple[float, float, float, float]]:
        """The regions (left, upper, right, lower) of picture number `index` that become its rows."""
        if self.resize == "squash":
            return [(0, 0, width, height)]
        side = min(width, height)
        if not self.views:  # whole pixels, so that a picture whose shorter side is S is copied, not blurred
            left, upper = (width - side) // 2, (height - side) // 2
            return [(left, upper, left + side, upper + side)]
        boxes: list[tuple[float, float, float, float]] = []
        for view in range(self.views):
            rng = np.random.default_rng([self.seed, index, view, Stream.VIEWS])
            crop = side * CROP / rng.uniform(*SHORTER)
            x, y = rng.uniform(0, width - crop), rng.uniform(0, height - crop)
            boxes.append((x, y, min(x + crop, width), min(y + crop, height)))
        return boxes

    def is_ready(self, images: np.ndarray) -> bool:
        """Whether pictures of one size, [n, h, w] or [n, h, w, 3], become rows as they are."""
        if self.resize == "whole":
            return MIN_SIDE <= min(images.shape[1:3]) <= self.size
        return self.is_one_resize and images.shape[1:3] == (self.size, self.size)

    @property
    def is_one_resize(self) -> bool:
        """Whether a square becomes a row in one resize of all of it."""
        return not self.views and self.resized_side is None

    def rows(self, image: Image.Image, number: int) -> list[Image.Image]:
        """The rows of one picture (mode L or RGB), of its mode: max(views, 1) squares, or one that stays whole."""
        size, method = self.size, FILTERS[self.filter]
        if self.resize == "whole":
            return [resized(image, min(size, *image.size), method)]
        if self.resized_side is not None:
            return [centre(resized(image, self.resized_side, method), size)]
        return [image.resize((size, size), method, box) for box in self.boxes(*image.size, int(number))]

    def squares(self, images: np.ndarray) -> np.ndarray:
        """Squares [n, h, h] or [n, h, h, 3] of which each becomes one row (`is_one_resize`): uint8 [n, S, S, 3]."""
        return three_channels(_resize_squares(images, self.size, FILTERS[self.filter]))


def _resize_squares(images: np.ndarray, size: int, method: Image.Resampling) -> np.ndarray:
    """[n, h, h(, 3)] to [n, S, S(, 3)] in two calls, with the very bytes of n calls.

    A square Pillow too resizes across first, rounds to 8 bits, then down. Stacked on each other, all pictures go across
    in one call; turned on their sides, they go down in another.
    """

    def across(stack: np.ndarray) -> np.ndarray:
        n, height, width, *channels = stack.shape
        tall = Image.fromarray(np.ascontiguousarray(stack).reshape(n * height, width, *channels))
        return np.asarray(tall.resize((size, n * height), method)).reshape(n, height, size, *channels)

    return across(across(images).swapaxes(1, 2)).swapaxes(1, 2)


def stacked(squares: list[Image.Image], size: int) -> np.ndarray:
    """uint8 [N, S, S, 3], grey in all three channels. Pasted into one picture, each costs less than as an array."""
    tall = Image.new("RGB", (size, size * len(squares)))
    for i, square in enumerate(squares):
        tall.paste(square, (0, size * i))
    return np.asarray(tall).reshape(-1, size, size, 3)


def as_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3], grey in all three channels."""
    return three_channels(np.asarray(image)[None])[0]


def three_channels(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S, 3], contiguous, of grey or colour."""
    if images.ndim == 3:
        images = np.broadcast_to(images[..., None], (*images.shape, 3))
    if images.flags.c_contiguous:
        return images
    made = np.empty(images.shape, images.dtype)
    for channel in range(3):  # of planes in a third of ascontiguousarray's time
        made[..., channel] = images[..., channel]
    return made
