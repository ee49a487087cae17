"""Plain JPEG files, decoded without Pillow: of a small one, half of its time is Python's, and two thirds of a thread's.

Plain is one frame of 8 bits, grey or of three components, with nothing beside it that says how it is meant. Any other,
and any that is amiss, is left to Pillow (JFIF: ITU-T T.871; markers: ITU-T T.81, annex B). The decoder is libjpeg-turbo
in both, so that pixels are the same to the last bit; where Pillow was built with another, it decodes all.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

BEGIN = b"\xff\xd8\xff"
MOST_HEAD = 1 << 16  # bytes before the scan
MOST_BYTES = (1 << 31) - 1  # of pixels, which the decoder counts so far
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, of Huffman's codes
SCAN = 0xDA
PASSED = (0xC4, 0xDB, 0xDD, 0xFE, SCAN)  # tables, the interval of restarts, comments
APPLICATIONS = {0xE0: (b"JFIF\0", 14), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}  # and at least the bytes
CHANNELS = {1: "GRAY", 3: "RGB"}

Decode = Callable[..., np.ndarray]


class Frame(NamedTuple):
    size: tuple[int, int]  # width and height
    channels: int  # 1 or 3


def frame(head: bytes) -> Frame | None:
    """What a plain file shows, by its first MOST_HEAD bytes; None: it is another."""
    try:
        return _frame(head) if head.startswith(BEGIN) else None
    except (IndexError, ValueError):
        return None


def _frame(head: bytes) -> Frame:
    """Raises ValueError or IndexError for what is not plain."""
    end, marker, found = 2, 0, b""
    while marker != SCAN:
        marker, begin = head[end + 1], end + 4
        if head[end] != 0xFF:
            raise ValueError("no segment where one is due")
        end = begin - 2 + int.from_bytes(head[begin - 2 : begin])
        if not begin <= end <= len(head):
            raise ValueError("cut")
        if marker in FRAMES and not found:
            found = head[begin:end]
        elif marker in APPLICATIONS:
            name, least = APPLICATIONS[marker]
            if not head.startswith(name, begin) or end - begin < least:
                raise ValueError("a segment that may say more of the picture")
        elif marker not in PASSED:
            raise ValueError("a segment that may say more of the picture")
    precision, height, width = found[0], int.from_bytes(found[1:3]), int.from_bytes(found[3:5])
    if precision != 8 or found[5] not in CHANNELS or width * height * 3 > MOST_BYTES:
        raise ValueError("not 8 bits of grey or colour, or many")
    return Frame((width, height), found[5])


def pixels(data: bytes, frame: Frame) -> np.ndarray | None:
    """uint8 [1, h, w], or [1, h, w, 3] of colour; None: something is amiss, and Pillow knows what to do."""
    code = decoder()
    if code is None:
        return None
    try:
        picture = code(data, CHANNELS[frame.channels])
    except ValueError:
        return None
    return picture[None, ..., 0] if frame.channels == 1 else picture[None]


@cache
def decoder() -> Decode | None:
    """The decoder, if it makes the very pixels that Pillow makes of a few drawn pictures."""
    try:
        from simplejpeg import decode_jpeg

        noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
        drawn = Image.fromarray(noise).resize((61, 47), Image.Resampling.BICUBIC)
        for mode, sampling, progressive in (("L", 0, False), *(("RGB", n, n == 2) for n in range(3))):
            file = io.BytesIO()
            drawn.convert(mode).save(file, "JPEG", subsampling=sampling, progressive=progressive)
            pillows = np.asarray(Image.open(file)).reshape(47, 61, -1)
            if not np.array_equal(decode_jpeg(file.getvalue(), CHANNELS[pillows.shape[2]]), pillows):
                return None
    except (ImportError, OSError, ValueError):
        return None
    return decode_jpeg
