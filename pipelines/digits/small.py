"""Copies of pictures that are small enough to keep beside a text: at most 1,000 wide, 32 colours, no metadata.

Usage: python small.py PICTURE.png ... FOLDER
"""

import sys
from pathlib import Path

from PIL import Image

WIDTH = 1000


def main(*pictures: str, folder: str) -> None:
    for picture in pictures:
        with Image.open(picture) as image:
            small = image.convert("RGB")
        if small.width > WIDTH:
            small = small.resize((WIDTH, round(small.height * WIDTH / small.width)), Image.Resampling.LANCZOS)
        small.quantize(32, dither=Image.Dither.NONE).save(Path(folder, Path(picture).name), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:-1], folder=sys.argv[-1])
