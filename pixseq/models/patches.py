"""Pictures as grids of patches, and the fixed positions of a grid.

Shapes: B images, K patches, P values a patch (size^2 * 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_2d(height: int, width: int, channels: int) -> Tensor:
    """Fixed positions of a grid in raster order, float32 [height * width, channels].

    The first half of the channels tells the column, the second the row; each half is sines, then cosines, of
    frequencies 10000^(-i / (channels / 4)).
    """
    omega = 10000.0 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = []
    for axis in (columns, rows):
        angle = axis.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def patchify(images: Tensor, size: int) -> Tensor:
    """[B, H, W, 3] -> [B, K, P]: patches in raster order, each by rows, columns, channels."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of patchify."""
    b, _, values = patches.shape
    size = math.isqrt(values // 3)
    x = patches.reshape(b, height // size, width // size, size, size, 3)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, 3)


def normalised(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches by their own mean and unbiased deviation, [B, K, P], and these two, [B, K, 1]."""
    mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation
