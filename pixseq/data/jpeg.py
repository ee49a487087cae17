"""Plain JPEG files, decoded without Pillow: of its time for a small one half is Python's, while other threads wait.

Plain is one frame of 8 bits, grey or of three components, with nothing beside it that says how it is meant but Adobe's
word on colours, which the decoder knows, and a profile, which is not applied. Any other, and any that is amiss, is left
to Pillow (JFIF: ITU-T T.871; markers: ITU-T T.81, annex B). The decoder is libjpeg-turbo in both, so that pixels are
the same to the last bit; where Pillow was built with another, it decodes all.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

BEGIN, END = b"\xff\xd8\xff", b"\xff\xd9"
MOST_HEAD = 1 << 16  # bytes before the scan
MOST_BYTES = (1 << 31) - 1  # of pixels, which the decoder counts so far
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, of Huffman's codes
SCAN = 0xDA
SEGMENTS = {  # what their content begins with, and its bytes at least
    **dict.fromkeys((0xC4, 0xDB, 0xDD, 0xFE, SCAN), (b"", 0)),  # tables, the interval of restarts, comments
    0xE0: (b"JFIF\0", 14),
    0xE2: (b"ICC_PROFILE\0", 14),
    0xEE: (b"Adobe", 12),
}
CHANNELS = {1: "GRAY", 3: "RGB"}
SAMPLINGS = ("444", "422", "420", "440", "411")  # of colours


class Frame(NamedTuple):
    size: tuple[int, int]  # width and height
    channels: int  # 1 or 3


def frame(head: bytes) -> Frame | None:
    """What a plain file shows, by its first MOST_HEAD bytes; None: it is another."""
    try:
        return _frame(head) if head.startswith(BEGIN) else None
    except (LookupError, ValueError):
        return None


def _frame(head: bytes) -> Frame:
    """Raises ValueError or LookupError for what is not plain."""
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
            continue
        name, least = SEGMENTS[marker]
        if not head.startswith(name, begin) or end - begin < least:
            raise ValueError("a segment that may say more of the picture")
    precision, height, width = found[0], int.from_bytes(found[1:3]), int.from_bytes(found[3:5])
    if precision != 8 or found[5] not in CHANNELS or not 0 < width * height * 3 <= MOST_BYTES:
        raise ValueError("not 8 bits of grey or colour, none or many")
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
def decoder() -> Callable[..., np.ndarray] | None:
    """The decoder, if it makes the very pixels that Pillow makes of a few drawn pictures."""
    try:
        from simplejpeg import decode_jpeg, encode_jpeg

        for data in _drawn(encode_jpeg):
            pixels = np.atleast_3d(np.asarray(Image.open(io.BytesIO(data))))
            if not np.array_equal(decode_jpeg(data, CHANNELS[pixels.shape[2]]), pixels):
                return None
    except (ImportError, OSError, ValueError):
        return None
    return decode_jpeg


def _drawn(encode: Callable[..., bytes]) -> Iterator[bytes]:
    """What versions of the library are known to decode each in its way."""
    noise = (np.arange(47 * 61 * 3) ** 2 * 40503 >> 9).astype(np.uint8).reshape(47, 61, 3)  # random numbers take longer
    for sampling in SAMPLINGS:
        yield encode(noise, colorsubsampling=sampling)
    # Of tables that are wrong, numbers beyond 16 bits come.
    yield encode(noise[..., :1].copy(), 100, "GRAY").replace(bytes([1]) * 64, bytes([255]) * 64)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", progressive=True)
    head, first, *_ = file.getvalue().split(bytes([0xFF, SCAN]))  # without its other scans it is smoothed
    yield head + bytes([0xFF, SCAN]) + first + END
