"""Images in memory, as training and validation read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pixseq.config import TrainConfig
from pixseq.data.pictures import Pictures, centres, cropped
from pixseq.engine.augment import augment_pixels, drawn_boxes
from pixseq.engine.batches import WHOLE, augment, places
from pixseq.runtime import Machine
from pixseq.runtime.cuda import to_device

ON_DEVICE = 1 / 8  # of a device's memory may be images; models and activations need the rest
JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue: AIM's training configuration


@dataclass(frozen=True)
class Images:
    """Images in memory: tokens uint16 [N, T] or pixels uint8 [N, H, W, 3] or whole pictures, labels int [N] or None.

    `grid` is rows, columns and numbers a pixel of what a model sees of one image. `chosen` picks some of the rows
    without copying them: training and validation share the arrays. `shows` [N] says which image of the source each row
    shows, None: its own. `on_device` are the rows on a device, where its batches are then made too.
    """

    rows: np.ndarray | Pictures
    labels: np.ndarray | None
    grid: tuple[int, int, int]
    chosen: np.ndarray | None = None
    shows: np.ndarray | None = None
    on_device: Tensor | None = None

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

    def joined(self, other: Images) -> Images:
        """Both together, labelled ones: in the order of the store that they share, or one store after the other.

        Raises ValueError where they are not stored alike: of one size, or whole.
        """
        if self.rows is other.rows:
            return replace(self, chosen=np.sort(np.concatenate([self.chosen, other.chosen])))
        shows = None
        if self.shows is not None or other.shows is not None:
            ours, theirs = (np.arange(len(x.rows)) if x.shows is None else x.shows for x in (self, other))
            shows = np.concatenate([ours, theirs + ours.max() + 1])
        chosen = None
        if self.chosen is not None or other.chosen is not None:
            ours, theirs = (np.arange(len(x.rows)) if x.chosen is None else x.chosen for x in (self, other))
            chosen = np.concatenate([ours, theirs + len(self.rows)])
        labels = np.concatenate([self.labels, other.labels])
        return Images(_one_after_the_other(self.rows, other.rows), labels, self.grid, chosen, shows)

    @property
    def are_tokens(self) -> bool:
        return isinstance(self.rows, np.ndarray) and self.rows.ndim == 2

    @property
    def are_larger(self) -> bool:
        """Whether a model sees parts of the pictures that are stored."""
        return not self.are_tokens and (isinstance(self.rows, Pictures) or self.rows.shape[1:3] != tuple(self.grid[:2]))

    def on(self, machine: Machine) -> Images:
        """Held on the machine's device where that has memory of its own, of which they take little enough."""
        if machine.device.type == "cpu" or self.are_larger or not isinstance(self.rows, np.ndarray):
            return self
        if self.rows.nbytes > ON_DEVICE * machine.memory_bytes():
            return self
        return replace(self, on_device=torch.from_numpy(_torch_form(self.rows)).to(machine.device))

    def batch(self, rows: np.ndarray | range) -> tuple[Tensor, Tensor | None]:
        """The images as models see them outside of training (tokens as int32), and labels int64 [B] or None."""
        rows = self._numbers(rows)
        if self.on_device is not None:
            images = self.on_device[to_device(torch.from_numpy(rows), self.on_device.device)]
            return images if images.dtype == torch.uint8 else images.int() & 0xFFFF, self._labels(rows)
        stored = self._stored(rows)
        if self.are_larger or isinstance(stored, list):
            stored = centres(list(stored), self.grid[0])
        return as_tensor(stored), self._labels(rows)

    def training_batch(
        self, rows: np.ndarray, config: TrainConfig, step: int, share: slice = WHOLE
    ) -> tuple[Tensor, Tensor | None]:
        """The images of a step as the recipe augments them, a pure function of seed and step; labels as of `batch`.

        Of a `share` of the rows, only these are read and changed, as they are among all of the rows.
        """
        how, draws = config.augment, (config.seed, step, len(rows), share)
        rows = rows[share]
        if not how.startswith("resized-crop"):
            images, labels = self.batch(rows)
            if images.device.type != "cpu":
                return moved_on_device(images, self.grid, how, *draws), labels
            flat = images.numpy().reshape(len(images), -1)
            return torch.from_numpy(augment(flat, self.grid, how, *draws)).view(images.shape), labels
        jitter, scale = JITTER if how == "resized-crop-jitter" else None, config.crop_scale
        if scale < 1 and self.are_larger:
            numbers = self._numbers(rows)
            images, labels = as_tensor(self._crops(numbers, scale, *draws)), self._labels(numbers)
            scale = 1.0
        else:
            images, labels = self.batch(rows)
        return augment_pixels(images, scale, True, jitter, *draws), labels

    def _crops(self, rows: np.ndarray, scale: float, seed: int, step: int, batch: int, share: slice) -> np.ndarray:
        """Random parts of the stored pictures, resized to what a model sees: uint8 [B, H, W, 3]."""
        pictures = self._stored(rows)
        height, width = np.array([picture.shape[:2] for picture in pictures]).T
        return cropped(list(pictures), drawn_boxes(seed, step, height, width, scale, batch, share), self.grid[0])

    def _numbers(self, rows: np.ndarray | range) -> np.ndarray:
        return np.asarray(rows) if self.chosen is None else self.chosen[rows]

    def _stored(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        return self.rows[rows] if isinstance(self.rows, np.ndarray) else [self.rows[row] for row in rows]

    def _labels(self, rows: np.ndarray) -> Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64))


def _one_after_the_other(a: np.ndarray | Pictures, b: np.ndarray | Pictures) -> np.ndarray | Pictures:
    if isinstance(a, Pictures) and isinstance(b, Pictures):
        return Pictures(np.concatenate([a.pixels, b.pixels]), np.concatenate([a.shapes, b.shapes]))
    if isinstance(a, Pictures) or isinstance(b, Pictures):
        raise ValueError("whole pictures and squares")
    return np.concatenate([a, b])


def as_tensor(images: np.ndarray) -> Tensor:
    """Images as they are stored; torch does little with uint16, so that tokens become int32."""
    return torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.int32))


def _torch_form(rows: np.ndarray) -> np.ndarray:
    """uint8 as it is; torch can hardly index uint16, so its bits as int16."""
    return rows if rows.dtype == np.uint8 else rows.view(np.int16)


def moved_on_device(
    images: Tensor,
    grid: tuple[int, int, int],
    how: str,
    seed: int,
    step: int,
    batch: int | None = None,
    share: slice = WHOLE,
) -> Tensor:
    """batches.augment of images on their device, tokens [B, T] or pixels."""
    if how == "none":
        return images
    b = len(images)
    drawn = places(b, grid, how, seed, step, batch, share)
    rows, columns = (to_device(torch.from_numpy(np.ascontiguousarray(x)), images.device) for x in drawn)
    each = torch.arange(b, device=images.device)[:, None, None]
    return images.view(b, *grid)[each, rows[:, :, None], columns[:, None, :]].view(images.shape)
