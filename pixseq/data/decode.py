"""One picture file to upright 8-bit pixels, whatever its mode; refusing what would exhaust memory or guess at meaning.

Colour profiles are not applied (as in the papers' pipelines and Hugging Face's); CMYK is converted without one.
"""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # the only decoders that foreign bytes may reach
PILLOW_LIMIT = 89_478_485  # pixels; above it Pillow warns of a decompression bomb, and here the warning is an error
MIN_SIDE = 2  # pixels: a line of single pixels has no picture in it
ORIENTATION = 0x0112


class BadPicture(Exception):
    """A picture that cannot be used, with the reason for the user."""


def prepare_process() -> None:
    """Make Pillow's bomb warning an error and hush its remarks on metadata. Process-wide: threads share the filters."""
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    Image.init()  # loads the decoders before there are threads


def decode(data: bytes | str, background: tuple[int, int, int], max_pixels: int) -> tuple[Image.Image, list[str]]:
    """An upright picture of mode L or RGB, and what was done to it (names of counts). Raises BadPicture."""
    try:
        with open(data, "rb") if isinstance(data, str) else io.BytesIO(data) as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise BadPicture("it is empty")
            file.seek(0)
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadPicture(f"{width} x {height} pixels are more than the {max_pixels:,} allowed")
            if min(width, height) < MIN_SIDE:
                raise BadPicture(f"{width} x {height} pixels are too few")
            return _upright(image, background)
    except BadPicture:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture(f"it has more than {PILLOW_LIMIT:,} pixels: a decompression bomb?") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, or cut off early") from None
    except OSError as error:
        raise BadPicture(error.strerror or str(error)) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadPicture(f"it is damaged: {error or type(error).__name__}") from error


def _upright(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    done = []
    # A JPEG with a second picture in it (MPO, as phones write) is a still, not an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        done.append("animated_first_frame")
    image.load()
    if image.getexif().get(ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        done.append("exif_rotated")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
        done.append("sixteen_bit")
    if image.mode == "CMYK":
        done.append("cmyk")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] < 255:  # conversion alone would show whatever colour hides under the transparency
            backdrop = Image.new("RGB", image.size, background)
            backdrop.paste(image, mask=alpha)
            image = backdrop
            done.append("alpha_composited")
    if image.mode in ("1", "L"):
        return image.convert("L"), [*done, "grey"]
    if image.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        raise BadPicture(f"pixels of mode {image.mode} have no fixed scale")
    return image.convert("RGB"), done


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale by 1/257. (Pillow's own conversion clips: all but the darkest 256 levels become white.)"""
    values = np.asarray(image)
    if image.mode == "I" and (image.format == "TIFF" or values.min() < 0 or values.max() > 65535):
        raise BadPicture("32-bit whole numbers have no fixed scale")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
