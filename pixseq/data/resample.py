"""Pictures resized to the very bytes of Pillow, in a quarter of its time where a compiler is found: see resample.c.

Compiling takes a quarter of a second, so Pillow serves until some hundred photographs were resized, and on while the
compiler is at work; and wherever there is none, or the code makes other bytes of a few drawn pictures. It serves for
the largest pictures always.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from pixseq import native

WORTH = 1 << 25  # pixels read and made
GIVEN = ("-O2", "-ffp-contract=off", "-fwrapv")  # in half the time; doubles as Pillow has them; sums that wrap around
FILTERS = [Image.Resampling[name] for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")]
MOST_SIDE = 1 << 16  # pixels: the code holds a vector for each of a line, much for a picture of a few long ones
BAND = 1 << 20  # pixels of an array that Pillow is given at once: it copies them
BY_RATE = int(PIL.__version__.split(".")[0]) >= 13  # how Pillow chooses the pass that is first

Box = tuple[float, float, float, float]


TASK = struct.Struct("PPP8i4f")  # `struct task`: much of what a small picture costs is Python's

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def sides(pictures: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height of a picture, or of each of [n, h, w] or [n, h, w, 3]."""
    if isinstance(pictures, Image.Image):
        return pictures.size
    return pictures.shape[2], pictures.shape[1]


def resample(
    pictures: Image.Image | np.ndarray, size: tuple[int, int], method: Image.Resampling, box: Box | None = None
) -> np.ndarray:
    """Image.resize of a picture of mode L or RGB, or of each of uint8 [n, h, w] or [n, h, w, 3].

    uint8 [n, h', w', 3], where `size` is (w', h'), grey in all three channels.
    """
    width, height = sides(pictures)
    whole = (0, 0, width, height)
    box = box or whole
    if size == (width, height) and box == whole:
        return three_channels(np.asarray(pictures)[None] if isinstance(pictures, Image.Image) else pictures)
    count = 1 if isinstance(pictures, Image.Image) else len(pictures)
    code = _code.after(count * int((box[2] - box[0]) * (box[3] - box[1]) + size[0] * size[1]))
    made = None if code is None else _in_c(code, pictures, size, method, box)
    return three_channels(_in_pillow(pictures, size, method, box)) if made is None else made


def _in_pillow(
    pictures: Image.Image | np.ndarray, size: tuple[int, int], method: Image.Resampling, box: Box
) -> np.ndarray:
    if isinstance(pictures, Image.Image):
        return np.asarray(pictures.resize(size, method, box))[None]
    width, height = sides(pictures)
    if width * height > BAND and not _is_down_first((width, height), size):
        return np.stack([_in_bands(each, size, method, box) for each in pictures])
    if width == height and size[0] == size[1] and box == (0, 0, width, height):
        return _resize_squares(pictures, size[0], method)
    return np.stack([_resized(each, size, method, box) for each in pictures])


def _resized(picture: np.ndarray, size: tuple[int, int], method: Image.Resampling, box: Box) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize(size, method, box))


def _in_bands(picture: np.ndarray, size: tuple[int, int], method: Image.Resampling, box: Box) -> np.ndarray:
    """[h, w(, 3)] to [h', w'(, 3)]: across a few rows at a time, then down, which are the passes of one call."""
    (left, upper, right, lower), (wide, tall) = box, size
    rows = max(BAND // picture.shape[1], 1)
    bands = [picture[top : top + rows] for top in range(0, len(picture), rows)]
    across = [_resized(band, (wide, len(band)), method, (left, 0, right, len(band))) for band in bands]
    return _resized(np.concatenate(across), (wide, tall), method, (0, upper, wide, lower))


def _is_down_first(sides: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes columns before rows."""
    (width, height), (wide, tall) = sides, size
    if BY_RATE:
        return height - tall > max(2 * (width - wide), 0)
    return height > 100 * width and tall < height


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


def _in_c(
    code: ctypes.CDLL, pictures: Image.Image | np.ndarray, size: tuple[int, int], method: Image.Resampling, box: Box
) -> np.ndarray | None:
    """See `resample`. None, and Pillow does it: it takes much memory, there is none, or the box is refused."""
    (width, height), (wide, tall), (left, upper, right, lower) = sides(pictures), size, box
    if max(width, height) > MOST_SIDE or not (0 <= left <= right <= width and 0 <= upper <= lower <= height):
        return None
    pixels, image = 0, None
    if isinstance(pictures, Image.Image):
        count, depth = 1, 1 if pictures.mode == "L" else 4
        image = _memory(pictures)
        if image is None:  # brought together, they would take as much memory again, and longer than Pillow
            return None
    else:
        pictures = np.ascontiguousarray(pictures)
        count, depth = len(pictures), 1 if pictures.ndim == 3 else 3
        pixels = pictures.ctypes.data
    down = _is_down_first((width, height), size)
    made = np.empty((count, tall, wide, 3), np.uint8)
    numbers = count, height, width, depth, tall, wide, FILTERS.index(method), down
    arrow = 0 if image is None else _pointer(image, b"arrow_array")
    done = code.resample(TASK.pack(pixels, arrow, made.ctypes.data, *numbers, *box))
    return made if done else None


def _memory(image: Image.Image) -> object | None:
    """The pixels of a picture, as Arrow's C data interface has them; None: not in one place, or others' memory."""
    if image.readonly:
        return None
    try:
        return image.im.__arrow_c_array__()
    except ValueError:
        return None


class _Code:
    """The code of resample.c, once it is worth it, compiled and proven."""

    def __init__(self) -> None:
        self.ready: ctypes.CDLL | None = None
        self.made = b""  # its file
        self.left = WORTH  # no more once there is a compiler
        self._compiler: native.Compiler | None = None
        self._lock = threading.Lock()

    def after(self, pixels: int) -> ctypes.CDLL | None:
        """The code, or None, before so many pixels are read and made. Never waits."""
        if self.ready is None and self._lock.acquire(blocking=False):
            try:
                self._go_on(pixels)
            finally:
                self._lock.release()
        return self.ready

    def _go_on(self, pixels: int) -> None:
        if self._compiler is not None and self._compiler.is_done:
            compiler, self._compiler = self._compiler, None
            try:
                code = compiler.code()
            except (OSError, subprocess.SubprocessError):
                return
            if _is_right(code):
                self.made, self.ready = compiler.made, code
        elif self.left > 0:
            self.left -= pixels
            if self.left <= 0:
                with contextlib.suppress(OSError, ValueError):
                    self._compiler = native.Compiler(Path(__file__).with_suffix(".c"), GIVEN)


_code = _Code()


def made() -> bytes | None:
    """The code as it is handed to other processes; None until there is some. Begins to compile."""
    return _code.made if _code.after(WORTH) else None


def leave_to_others() -> None:
    """No code is compiled here: it comes from another process, or not at all."""
    _code.left = 0


def take(made: bytes) -> None:
    """Code that another process compiled and found right. Without a file, which would be left where we are killed."""
    if not hasattr(os, "memfd_create"):  # Pillow serves
        return
    with contextlib.suppress(OSError), open(os.memfd_create("pixseq"), "wb") as file:
        file.write(made)
        file.flush()
        _code.ready = ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")


def _is_right(code: ctypes.CDLL) -> bool:
    """Whether it makes Pillow's bytes of drawn pictures, of either order of passes."""
    noise = (np.arange(61 * 47 * 3) ** 2 * 40503 >> 9).astype(np.uint8).reshape(61, 47, 3)
    whole = (0, 0, 47, 61)
    drawn: list[Image.Image | np.ndarray] = [noise[None], noise[None, ..., 0]]
    drawn += [Image.fromarray(each).copy() for each in (noise, noise[..., 0])]
    for pictures in drawn:
        for size, box in (((16, 9), whole), ((9, 40), (1.5, 3.25, 40.7, 48)), ((50, 70), whole), ((41, 53), whole)):
            for method in FILTERS:
                made = _in_c(code, pictures, size, method, box)
                expected = three_channels(_in_pillow(pictures, size, method, box))
                if made is None or not np.array_equal(made, expected):
                    return False
    return True


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
