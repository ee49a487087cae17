"""Augmentation of whole batches of pixels: random resized crops, flips and colour jitter, as AIM was trained with.

A batch is a pure function of its images, the seed and the step, whatever was drawn before, so that a resumed run sees
the same pictures. Each of the three has a random stream of its own: asking for one leaves what the others draw.
Numbers are drawn on the CPU; the images stay on their device, and none is touched alone.
Shapes: B images of H rows and W columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pixseq.engine.batches import WHOLE
from pixseq.runtime.cuda import to_device
from pixseq.streams import Stream

RATIO = (3 / 4, 4 / 3)  # width to height of a crop
TRIES = 10
JITTERED = 0.8  # the part of the images whose colours move
LUMA = (0.299, 0.587, 0.114)


def augment_pixels(
    images: Tensor,
    crop_scale: float,
    flip: bool,
    jitter: tuple[float, float, float, float] | None,
    seed: int,
    step: int,
    batch: int | None = None,
    share: slice = WHOLE,
) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3], on the device of `images`, which are left as they are.

    Images that are the `share` of a larger `batch` become what they become in it.

    crop_scale   in (0, 1]: a crop of between this part and all of the picture's area is resized to H x W; 1: no crop.
    flip         half of the images are mirrored.
    jitter       the largest changes of brightness, contrast, saturation (each at least 0) and hue (up to 0.5, half a
                 turn), made in this order, where torchvision draws one for every image; a fifth of the images has none.
    """
    count, h, w, _ = images.shape
    count = batch or count
    if crop_scale < 1:
        boxes = crop_boxes(np.random.default_rng([seed, step, Stream.CROP]), count, h, w, crop_scale)
        images = crop(images, boxes[:, share])
    if flip:
        mirrored = np.random.default_rng([seed, step, Stream.FLIP]).random(count)[share] < 0.5
        chosen = to_device(torch.from_numpy(mirrored), images.device)
        images = torch.where(chosen[:, None, None, None], images.flip(2), images)
    if jitter is not None:
        factors = jitter_factors(np.random.default_rng([seed, step, Stream.JITTER]), count, jitter)
        images = move_colours(images, tuple(factor[share] for factor in factors))
    return images


def drawn_boxes(
    seed: int,
    step: int,
    height: np.ndarray,
    width: np.ndarray,
    least: float,
    batch: int | None = None,
    share: slice = WHOLE,
) -> np.ndarray:
    """The boxes of a step in pictures of many sizes [B]; of one size, those that augment_pixels crops to."""
    batch = batch or len(height)
    heights, widths = np.ones((2, batch), np.int64)  # those of the pictures beside the share do not matter to it
    heights[share], widths[share] = height, width
    return crop_boxes(np.random.default_rng([seed, step, Stream.CROP]), batch, heights, widths, least)[:, share]


def crop_boxes(
    rng: np.random.Generator, count: int, height: int | np.ndarray, width: int | np.ndarray, least: float
) -> np.ndarray:
    """int64 [4, count]: left, top, width and height of torchvision's RandomResizedCrop.

    Of ten draws of area (uniform) and ratio (uniform in its logarithm) the first that fits into the picture, anywhere;
    where none does, the largest centred crop whose ratio is allowed.
    """
    area = height * width * rng.uniform(least, 1.0, (TRIES, count))
    ratio = np.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1]), (TRIES, count)))
    sizes = np.rint(np.sqrt([area * ratio, area / ratio])).astype(np.int64)  # [2, TRIES, count]: widths, heights
    whole = np.stack([np.broadcast_to(width, count), np.broadcast_to(height, count)])  # [2, count]
    fits = ((sizes > 0) & (sizes <= whole[:, None])).all(axis=0)
    found = fits.any(axis=0)
    ratios = np.array([[RATIO[1]], [1 / RATIO[0]]])
    largest = np.minimum(whole, np.rint(whole[::-1] * ratios).astype(np.int64))
    size = np.where(found, sizes[:, fits.argmax(axis=0), np.arange(count)], largest)
    room = whole - size
    corner = np.where(found, (rng.random((2, count)) * (room + 1)).astype(np.int64), room // 2)
    return np.concatenate([corner, size])


def crop(images: Tensor, boxes: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] and boxes [4, B] inside them -> uint8 [B, H, W, 3]: the boxes resized to the whole picture.

    What Pillow's `resize((W, H), BICUBIC, box)` does, which looks past the edges of the box: first across, rounded to
    bytes, then down. A crop is never shrunk, so that its antialiasing has no part in this.
    """
    b, h, w, c = images.shape
    left, top, width, height = boxes
    across, down = _resampling(left, width, w, images.device), _resampling(top, height, h, images.device)
    x = images.transpose(2, 3).contiguous().float()  # [B, H, 3, W]: both products then read whole rows
    x = torch.bmm(x.view(b, h * c, w), across.mT).add_(0.5).clamp_(0, 255).floor_()
    x = torch.bmm(down, x.view(b, h, c * w)).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return x.view(b, h, c, w).transpose(2, 3).contiguous()


def _resampling(start: np.ndarray, length: np.ndarray, size: int, device: torch.device) -> Tensor:
    """float32 [B, size, size]: new pixels by old ones, when start .. start + length of an axis becomes all of it.

    Each new pixel is made of four old ones, weighted by the cubic with a = -0.5; those beyond the edge do not count.
    """
    centre = start[:, None] + (np.arange(size) + 0.5) * (length[:, None] / size) - 0.5  # in old pixels
    taps = np.floor(centre)[..., None] + np.arange(-1, 3)
    x = np.abs(taps - centre[..., None])
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weights[(taps < 0) | (taps >= size)] = 0
    weights /= weights.sum(axis=-1, keepdims=True)
    columns = to_device(torch.from_numpy(taps.clip(0, size - 1).astype(np.int64)), device)
    matrix = torch.zeros(len(start), size, size, device=device)
    return matrix.scatter_add_(2, columns, to_device(torch.from_numpy(weights.astype(np.float32)), device))


def jitter_factors(
    rng: np.random.Generator, count: int, jitter: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float64 [count] each: of brightness, contrast and saturation around 1, and a turn of the hue around 0.

    Images that keep their colours have 1, 1, 1 and 0.
    """
    moved = rng.random(count) < JITTERED
    brightness, contrast, saturation = (
        np.where(moved, rng.uniform(max(1 - most, 0), 1 + most, count), 1.0) for most in jitter[:3]
    )
    return brightness, contrast, saturation, np.where(moved, rng.uniform(-jitter[3], jitter[3], count), 0.0)


def move_colours(images: Tensor, factors: tuple[np.ndarray, ...]) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3], by the factors [B] of jitter_factors, in the order they come in.

    Brightness scales, contrast moves away from the picture's mean grey, saturation from each pixel's own grey; after
    each, values end at black and white. Hue turns in the HSV cone.
    """
    brightness, contrast, saturation, turn = (
        to_device(torch.from_numpy(factor.astype(np.float32)), images.device)[:, None, None] for factor in factors
    )
    x = images.permute(3, 0, 1, 2).contiguous().float()  # [3, B, H, W]: one plane a channel
    x.mul_(brightness).clamp_(max=255)
    grey = _grey(x).mean(dim=(1, 2), keepdim=True)
    x.mul_(contrast).add_((1 - contrast) * grey).clamp_(0, 255)
    grey = _grey(x)
    x.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 255)
    if factors[3].any():
        x = _turned(x, 6 * turn)
    return x.add_(0.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _grey(x: Tensor) -> Tensor:
    """[3, B, H, W] -> [B, H, W]."""
    return LUMA[0] * x[0] + LUMA[1] * x[1] + LUMA[2] * x[2]


def _turned(x: Tensor, sixths: Tensor) -> Tensor:
    """[3, B, H, W] with the hue moved by `sixths` [B, 1, 1] of the circle; HSV's value and saturation stay."""
    r, g, b = x
    value = x.amax(dim=0)
    chroma = value - x.amin(dim=0)
    safe = chroma.clamp(min=1e-6)  # a grey has no hue, and needs none
    of_green_or_blue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(value == r, (g - b) / safe, of_green_or_blue) + sixths  # red is 0, green 2, blue 4
    # How much of the chroma each channel lacks: none within one sixth of the circle from its colour, all from two on.
    away = [(hue + offset).remainder_(6).sub_(3).abs_() for offset in (0, 4, 2)]  # 3 at the colour, 0 opposite
    return torch.stack([value - chroma * (2 - distance).clamp_(0, 1) for distance in away])
