"""Class folders of PNG pictures to show commands on: handwritten digits of scikit-learn, enlarged and in colours.

Usage: python photos.py FOLDER [TRAIN_PER_CLASS TEST_PER_CLASS]
"""

import colorsys
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDE = 32


def coloured(digit: np.ndarray, row: int) -> Image.Image:
    """A digit [8, 8] of 0 to 16, enlarged, in a dark ink on a pale paper of its own."""
    ink = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    share = np.asarray(ink)[..., None] / 255
    paper, pen = colorsys.hsv_to_rgb(row * 0.618 % 1, 0.3, 1), colorsys.hsv_to_rgb(row * 0.37 % 1, 1, 0.5)
    return Image.fromarray((255 * (share * pen + (1 - share) * np.array(paper))).astype(np.uint8))


def main(folder: str, train: str = "40", test: str = "10") -> None:
    digits, labels = load_digits(return_X_y=True)
    for number, name in enumerate(NAMES):
        found = np.flatnonzero(labels == number)
        for split, rows in (("train", found[: int(train)]), ("test", found[-int(test) :])):
            target = Path(folder, split, name)
            target.mkdir(parents=True, exist_ok=True)
            for row in rows:
                coloured(digits[row].reshape(8, 8), row).save(target / f"{row:04}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
