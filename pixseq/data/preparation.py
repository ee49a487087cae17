"""How a picture is cut and resized to rows, square or whole: all that decides its pixels.

Shapes: S the side, n pictures of one size. A row is a picture of S x S, of which views make several an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor

from pixseq.data.decode import MIN_SIDE
from pixseq.data.pictures import centre, resized
from pixseq.data.records import MAX_PIXELS
from pixseq.data.resample import resample, sides
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
        return not self.views and self.resized_side is None and images.shape[1:3] == (self.size, self.size)

    def rows(self, pictures: Image.Image | np.ndarray, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of a picture of mode L or RGB, or of each of uint8 [n, h, w] or [n, h, w, 3], of those `numbers`.

        uint8 [n max(views, 1), S, S, 3], or [n, h', w', 3] of those that stay whole; grey in all three channels.
        """
        size, method = self.size, FILTERS[self.filter]
        width, height = sides(pictures)
        if self.resize == "whole":
            return resized(pictures, min(size, width, height), method)
        if self.resized_side is not None:
            return centre(resized(pictures, self.resized_side, method), size)
        if not self.views:
            return resample(pictures, (size, size), method, *self.boxes(width, height, 0))
        views = []
        for i, number in enumerate(numbers):
            picture = pictures if isinstance(pictures, Image.Image) else pictures[i : i + 1]
            views += [resample(picture, (size, size), method, box) for box in self.boxes(width, height, int(number))]
        return np.concatenate(views)
