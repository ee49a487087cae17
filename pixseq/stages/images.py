"""Images in memory, as training and validation read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pixseq.config import TrainConfig
from pixseq.data.augment import augment_pixels
from pixseq.data.batches import augment

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue: AIM's training configuration


@dataclass(frozen=True)
class Images:
    """Images in memory: tokens uint16 [N, T] or pixels uint8 [N, H, W, 3], labels int [N] or None.

    `grid` is rows, columns and numbers a pixel of one image. `chosen` picks some of the rows without copying them:
    training and validation share the arrays. `shows` [N] says which image of the source each row shows, None: its own.
    """

    rows: np.ndarray
    labels: np.ndarray | None
    grid: tuple[int, int, int]
    chosen: np.ndarray | None = None
    shows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows if self.chosen is None else self.chosen)

    def count(self) -> dict[str, int]:
        """For summaries: images of the source, and rows where these are several an image."""
        if self.shows is None:
            return {"images": len(self)}
        shown = self.shows if self.chosen is None else self.shows[self.chosen]
        return {"images": len(np.unique(shown)), "rows": len(shown)}

    def subset(self, rows: np.ndarray) -> Images:
        return replace(self, chosen=rows if self.chosen is None else self.chosen[rows])

    def batch(self, rows: np.ndarray | range) -> tuple[Tensor, Tensor | None]:
        """The images as they are stored (tokens as int32), and labels int64 [B] or None."""
        rows = np.asarray(rows) if self.chosen is None else self.chosen[rows]
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64))
        return as_tensor(self.rows[rows]), labels

    def augmented(self, images: Tensor, config: TrainConfig, step: int) -> Tensor:
        """What the recipe does to the images of a step: a pure function of seed and step."""
        how, seed = config.augment, config.seed
        if how.startswith("resized-crop"):
            jitter = JITTER if how == "resized-crop-jitter" else None
            return augment_pixels(images, config.crop_scale, True, jitter, seed, step)
        flat = images.numpy().reshape(len(images), -1)
        return torch.from_numpy(augment(flat, self.grid, how, seed, step)).view(images.shape)


def as_tensor(images: np.ndarray) -> Tensor:
    """Images as they are stored; torch does little with uint16, so that tokens become int32."""
    return torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.int32))
