"""The codec of a store or a checkpoint, what its tokens or pixels mean, as others may have written it: checked by type.

scheme; height and width of the pictures, None where they stay whole; n_vocab; the palette's colours and id;
class_names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixseq.errors import PixseqError

KEYS = ("scheme", "height", "width", "n_vocab", "palette", "palette_id", "class_names")
SCHEMES = ("palette", "rgb", "gray", "pixels")
MOST_SIDE = 1 << 16  # pixels
MOST_VOCAB = 65535  # 65535 itself marks tokens that were never written


def check_codec(codec: Mapping[str, Any]) -> None:
    """Raises ValueError, in words, for a key that is missing or of another type than readers rely on."""
    missing = [key for key in KEYS if key not in codec]
    if missing:
        raise ValueError(f"it does not say {', '.join(missing)}")
    if codec["scheme"] not in SCHEMES:
        raise ValueError(f"its scheme is {codec['scheme']!r}, not one of {', '.join(SCHEMES)}")
    for key, most in (("height", MOST_SIDE), ("width", MOST_SIDE), ("n_vocab", MOST_VOCAB)):
        if codec[key] is not None and not is_count(codec[key], most):
            raise ValueError(f"its {key} is {codec[key]!r}, not a number from 1 to {most}")
    if (codec["height"] is None) != (codec["width"] is None) or (codec["n_vocab"] is None) != (
        codec["scheme"] == "pixels"
    ):
        raise ValueError("its height, width and n_vocab do not go together")
    if codec["height"] is None and codec["scheme"] != "pixels":
        raise ValueError("it has tokens of whole pictures")
    _check_palette(codec["palette"], codec["n_vocab"])
    if not isinstance(codec["palette_id"], str | None):
        raise ValueError("its palette_id is no text")
    names = codec["class_names"]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("its class_names are no texts")


def _check_palette(palette: Any, n_vocab: int | None) -> None:
    if palette is None:
        return
    rows = palette if isinstance(palette, list) else [None]
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and all(type(x) in (int, float) for x in row)):
            raise ValueError("its palette does not hold three numbers a colour")
    if len(rows) != n_vocab:
        raise ValueError(f"its palette has {len(rows)} colours, its vocabulary {n_vocab}")


def is_count(value: Any, most: int) -> bool:
    """A whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_texts(value: Any) -> bool:
    """A mapping of texts to texts."""
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def palette_of(
    path: str | Path, codec: Mapping[str, Any], hint: str = "encode again with --palette"
) -> list[list[float]] | None:
    """The colours [K, 3] of the tokens that `codec` describes, None in the schemes that need none.

    Raises PixseqError where they are ids of a palette that was never given. `path` is what the codec was found in.
    """
    if codec["scheme"] == "palette" and codec["palette"] is None:
        raise PixseqError(f"{path} has no palette: the colours of its tokens are not known", hint)
    return codec["palette"]
