"""One picture file to upright 8-bit pixels, whatever its mode; refusing what would exhaust memory or guess at meaning.

Colour profiles are not applied (as in the papers' pipelines and Hugging Face's); CMYK is converted without one.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageOps, features

from pixseq.bounded.files import open_small
from pixseq.data import jpeg
from pixseq.data.sniff import HEAD_BYTES, NOT_READ, special
from pixseq.errors import PixseqError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # the only decoders that foreign bytes may reach
PILLOW_LIMIT = 89_478_485  # pixels; above it Pillow warns of a decompression bomb, and here the warning is an error
MIN_SIDE = 2  # pixels: a line of single pixels has no picture in it
ORIENTATION = 0x0112
BLOCK_BYTES = 1 << 26  # that a picture's memory is made of: from 32 MB on, it goes back to the system at once
AT_HAND = 1 << 20  # bytes, or one a pixel: such a file is read whole, a larger one as far as it is decoded
AT_ONCE = 1 << 20  # values
PIXEL_BYTES, FOLDED = 11, 32  # bytes a pixel while it is decoded, and bytes for each of the file that are no matter
NARROW = (8, 10, 12, 14)  # bits of 16 that detectors and converters use


class BadPicture(Exception):
    """A picture that cannot be used, with the reason for the user and a way out."""

    def __init__(self, why: str, hint: str = "mend or remove it"):
        super().__init__(why)
        self.hint = hint


def prepare_process(max_pixels: int) -> None:
    """Make Pillow's bomb warning an error, above `max_pixels` where that is more than Pillow's limit, and hush its
    remarks on metadata. Process-wide: threads share the filters.
    """
    Image.MAX_IMAGE_PIXELS = max(PILLOW_LIMIT, max_pixels)
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.core.set_block_size(BLOCK_BYTES)  # Pillow's own of 16 MB stay with each thread when they are freed
    Image.preinit()  # loads decoders before there are threads: the usual ones, and of Pillow's forty others these
    for name in ("Avif", "Mpo", "Tiff", "WebP"):
        import_module(f"PIL.{name}ImagePlugin")


def decode(
    data: bytes | str,
    background: tuple[int, int, int],
    max_pixels: int,
    bit_depth: int | None = None,
    take: Callable[[int], None] = lambda size: None,
) -> tuple[Image.Image | np.ndarray, list[str]]:
    """An upright picture, and what was done to it (names of counts). Raises BadPicture, and MemoryError.

    It is one of Pillow's of mode L or RGB, or uint8 [1, h, w] or [1, h, w, 3].

    Of 16-bit values the lowest `bit_depth` bits are the picture's; None: all 16. Before its pixels are read, `take` is
    called with the bytes of memory that they take beyond what a file of its size may, see bounded/room.py.
    """
    try:
        with open_small(data, AT_HAND) if isinstance(data, str) else io.BytesIO(data) as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise BadPicture("it is empty")
            file.seek(0)
            image = jpeg.frame(file.read(jpeg.MOST_HEAD)) or _opened(file)
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or 0):  # as Image.open says of others than plain JPEGs
                raise Image.DecompressionBombError
            if width * height > max_pixels:
                raise BadPicture(
                    f"{width} x {height} pixels are more than the {max_pixels:,} allowed (--max-pixels)",
                    f"allow them with --max-pixels {width * height}",
                )
            if min(width, height) < MIN_SIDE:
                raise BadPicture(f"{width} x {height} pixels are too few: a side has {MIN_SIDE} or more")
            take(width * height * PIXEL_BYTES - FOLDED * size)
            if isinstance(image, jpeg.Frame):  # upright, and nothing is to be done to it
                if size <= max(AT_HAND, width * height):
                    file.seek(0)
                    pixels = jpeg.pixels(file.read(), image)
                    if pixels is not None:
                        return pixels, ["grey"] if image.channels == 1 else []
                image = _opened(file)
            return _upright(image, background, bit_depth)
    except (BadPicture, MemoryError):
        raise
    except PixseqError:
        raise BadPicture("it is no file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture(
            f"it has more than {max(PILLOW_LIMIT, max_pixels):,} pixels: a decompression bomb, or --max-pixels N?",
            "allow as many pixels as it has with --max-pixels",
        ) from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, or cut off early") from None
    except OSError as error:
        raise BadPicture(error.strerror or str(error)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadPicture(f"it is damaged: {str(error) or type(error).__name__}") from error


def _opened(file: BinaryIO) -> Image.Image:
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return Image.open(file, formats=_formats(head))


def _formats(head: bytes) -> tuple[str, ...]:
    """The decoders that may read a file, with that of HEIC or AVIF where it is one. Raises BadPicture without it."""
    kind = special(head)
    if kind is None:
        return FORMATS
    if kind in NOT_READ:
        raise BadPicture(NOT_READ[kind])
    if kind == "HEIC":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise BadPicture("it is HEIC, which needs pillow-heif: pip install pillow-heif") from None
        register_heif_opener()
        return ("HEIF",)
    if not features.check("avif"):
        raise BadPicture("it is AVIF, which this Pillow cannot read: pip install --upgrade pillow")
    return ("AVIF",)


def _upright(
    image: Image.Image, background: tuple[int, int, int], bit_depth: int | None
) -> tuple[Image.Image, list[str]]:
    done = []
    tile = getattr(image, "tile", None)
    wide = ";16" in str(tile[0].args) if tile and image.mode in ("RGB", "RGBA", "LA") else False
    # A JPEG with a second picture in it (MPO, as phones write) is a still, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        done.append("animated_first_frame")
    image.load()
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        done.append("exif_rotated")
    if image.mode.startswith("I"):
        image, bits = _from_16_bit(image, bit_depth)
        done += ["sixteen_bit", *bits]
    elif wide:  # Pillow keeps the upper byte of each value only
        if bit_depth is not None:
            raise BadPicture("of 16-bit colours only the upper 8 bits are read, so that --bit-depth cannot apply")
        bands = cast(tuple[tuple[int, int], ...], image.getextrema())
        most = max(high for _, high in bands[: 1 if image.mode == "LA" else 3])
        done += ["sixteen_bit", *_within((most << 8) + 255)]
    if image.mode == "CMYK":
        done.append("cmyk")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if (
            cast(tuple[int, int], alpha.getextrema())[0] < 255
        ):  # conversion alone would show whatever colour hides under the transparency
            backdrop = Image.new("RGB", image.size, background)
            backdrop.paste(image, mask=alpha)
            image = backdrop
            done.append("alpha_composited")
    if image.format == "JPEG" and image.mode in ("L", "RGB"):  # not copied
        return image, [*done, *(["grey"] if image.mode == "L" else [])]
    if image.mode in ("1", "L"):
        return image.convert("L"), [*done, "grey"]
    if image.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        raise BadPicture(f"pixels of mode {image.mode} have no fixed scale")
    return image.convert("RGB"), done


def _from_16_bit(image: Image.Image, bit_depth: int | None) -> tuple[Image.Image, list[str]]:
    """Scale by 1/257, or to what `bit_depth` says. (Pillow's own conversion clips: nearly all levels become white.)"""
    values = np.asarray(image)
    if image.mode == "I" and (image.format == "TIFF" or values.min() < 0 or values.max() > 65535):
        raise BadPicture("32-bit whole numbers have no fixed scale")
    if bit_depth is None:
        return Image.fromarray(to_bytes(values, 16)), _within(int(values.max()))
    if values.max() >= 1 << bit_depth:
        most = int(values.max())
        raise BadPicture(
            f"it holds the value {most}, beyond --bit-depth {bit_depth}",
            f"if all are of one detector, --bit-depth {most.bit_length()}; mend or remove it otherwise",
        )
    return Image.fromarray(to_bytes(values, bit_depth)), []


def _within(most: int) -> list[str]:
    """A count of pictures that leave upper bits unused: detectors write 10, 12 or 14 of 16."""
    return [f"within_{bits}_bits" for bits in NARROW if most < 1 << bits][:1]


def narrow_bits(counts: dict[str, int]) -> int | None:
    """How many bits suffice for all 16-bit pictures counted so far, where that is less than 16."""
    bits = [bits for bits in NARROW if counts.get(f"within_{bits}_bits")]
    all_narrow = bits and sum(counts[f"within_{b}_bits"] for b in bits) == counts["sixteen_bit"]
    return max(bits) if all_narrow else None


def to_bytes(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """Whole numbers below 2^bit_depth to uint8, rounded: 255 is the largest; of 16 bits x / 257."""
    most = (1 << bit_depth) - 1
    scaled, flat = np.empty(values.shape, np.uint8), np.ascontiguousarray(values).reshape(-1)
    for low in range(0, flat.size, AT_ONCE):  # not all at once: a large picture's copies of 32 bits add up
        block = flat[low : low + AT_ONCE].astype(np.uint32)
        scaled.reshape(-1)[low : low + AT_ONCE] = (block * 510 + most) // (2 * most)
    return scaled
