"""The codec of a store of images or of a model: what its tokens or pixels mean, as it travels with them.

Written as JSON: attributes of a store, codec.json of a checkpoint. It enters their ids, so that what is written is what
was read. Others may have written it: `Codec.read` checks it by type.
Shapes: N images of T numbers, T = rows * columns * channels; K colours of a palette.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import quantize
from pixseq.text import few, word

MOST_SIDE = 1 << 16  # pixels
MOST_VOCAB = 65535  # 65535 itself marks tokens that were never written


class SchemeTraits(NamedTuple):
    """What images become in a scheme: `kind` of store, which names its main array too, `channels` numbers a pixel, of
    a vocabulary of `n_vocab` (None: as many as the palette has colours, or no vocabulary).
    """

    kind: str
    channels: int
    n_vocab: int | None
    has_palette: bool = False


SCHEMES = {
    "palette": SchemeTraits("tokens", 1, None, has_palette=True),
    "rgb": SchemeTraits("tokens", 3, 256),
    "gray": SchemeTraits("tokens", 1, 256),
    "pixels": SchemeTraits("pixels", 3, None),
}


@dataclass(frozen=True)
class Codec:
    """What the numbers of images mean. In the order in which it is written; what is optional only where it is set.

    `scheme`: one of SCHEMES. `height` and `width` in pixels are None where pictures stay whole, and then `shorter_side`
    is that of all of them. `n_vocab` is None of pixels. `palette` [K, 3] floats in [-1, 1] and `palette_id` are None in
    the schemes without one, and where ids came without their palette. `shown`, of a model that sees crops of larger
    pictures: how much of the shorter side it sees outside of training. `others` is what else stood there.
    """

    scheme: str
    height: int | None
    width: int | None
    n_vocab: int | None
    palette: list[list[float]] | None = None
    palette_id: str | None = None
    shorter_side: int | None = field(default=None, metadata={"optional": True})
    class_names: list[str] | None = None
    shown: float | None = field(default=None, metadata={"optional": True})
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Codec:
        """Raises ValueError, in words, for a key that is missing or of another type than readers rely on."""
        missing = [name for name in NEEDED if name not in written]
        if missing:
            raise ValueError(f"it does not say {', '.join(missing)}")
        known = {name: written[name] for name in (*NEEDED, *OPTIONAL) if name in written}
        codec = cls(**known, others={key: value for key, value in written.items() if key not in known})
        _check_sizes(codec)
        _check_palette(codec.palette, codec.n_vocab)
        if not isinstance(codec.palette_id, str | None):
            raise ValueError("its palette_id is no text")
        names = codec.class_names
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("its class_names are no texts")
        for key in OPTIONAL:
            if key in written and not isinstance(written[key], int | float):
                raise ValueError(f"its {key} is {written[key]!r}, not a number")
        return codec

    def written(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "others"}
        return {key: value for key, value in values.items() if key in NEEDED or value is not None} | dict(self.others)

    @property
    def whole(self) -> bool:
        """Whether pictures have sizes of their own."""
        return self.height is None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, columns and channels (numbers a pixel) of one image."""
        # whole pictures have no rows and columns that anything could count with
        return cast(int, self.height), cast(int, self.width), SCHEMES[self.scheme].channels

    @property
    def kind(self) -> str:
        """Of the store of its images, which is the name of its main array too: tokens or pixels."""
        return SCHEMES[self.scheme].kind

    @property
    def colors(self) -> np.ndarray | None:
        """What each token looks like, float64 [K, 3] in [-1, 1]; None where the numbers are a pixel's own bytes."""
        if SCHEMES[self.scheme].channels > 1:
            return None
        return np.array(self.palette) if SCHEMES[self.scheme].has_palette else quantize.GRAYS

    @property
    def size(self) -> str:
        """Of its pictures, in words."""
        return "whole" if self.whole else f"{self.height}x{self.width}"

    @property
    def side(self) -> int | None:
        """The side of square pixels; None: of tokens, whose pictures have the size they are stored in."""
        return self.height if self.kind == "pixels" and self.height == self.width else None

    def to_images(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens uint16 [N, T], or pixels, as pictures uint8 [N, H, W, 3]. See `must_have_colours`."""
        return quantize.to_images(tokens, *self.grid[:2], self.colors)

    def to_tokens(self, images: np.ndarray) -> np.ndarray:
        """A few pictures uint8 [N, H, W, 3] as tokens uint16 [N, T]; a palette's table is made anew each time."""
        table = None if self.palette is None else quantize.nearest_table(np.array(self.palette))
        return quantize.to_tokens(images, self.scheme, table)

    def kept(self, keep: float) -> int:
        """How many tokens `keep` of the rows are. Raises UsageError where these are all rows: none is left to draw.

        And where a part above 0 is none, so that nothing of the prompt would be seen.
        """
        rows, columns, channels = self.grid
        kept, of_all = round(keep * rows), f"{rows} row{'s' * (rows > 1)}"
        if keep > 0 and kept == 0:
            least = next(n for n in range(1, 101) if round(n / 100 * rows) > 0) / 100
            nothing = "--keep 0 draws from nothing"
            raise UsageError(
                f"--keep {keep} keeps none of {of_all}, so that nothing of the prompt is given",
                f"at least {least:g} keeps one; {nothing}" if rows > 1 else nothing,
            )
        if kept == rows:
            most = next(n for n in range(99, -1, -1) if round(n / 100 * rows) < rows) / 100
            raise UsageError(
                f"--keep {keep} keeps all of {of_all}, which leaves nothing to draw",
                f"of pictures of {of_all} at most {most:g} leaves one",
            )
        return kept * columns * channels

    def must_have_colours(self, path: str | Path, hint: str = "encode again with --palette") -> None:
        """Raises PixseqError where tokens are ids of a palette that was never given. `path` is what this is of."""
        if SCHEMES[self.scheme].has_palette and self.palette is None:
            raise PixseqError(f"{path} has no palette: the colours of its tokens are not known", hint)

    def seen(self, path: str | Path, side: int | None, shown: float) -> Codec:
        """That of a model on the stored pictures at `path`: squares of `side`, None: of the size they are stored in.

        Where they are stored larger, it has `shown`. Smaller ones are never enlarged: they are seen as they are. Raises
        UsageError where the pictures have no one size.
        """
        if side is None and self.whole:
            raise UsageError(
                f"{path} holds whole pictures, of which models see squares of a side that is not given",
                "for example --set model.image_size=224",
            )
        if side is None or (self.height, self.width) == (side, side):
            return self
        if not self.whole and min(self.grid[:2]) < side:
            return self
        return replace(self, height=side, width=side, shown=shown, shorter_side=None)

    def must_pair(self, path: str | Path, other: Codec, other_path: str | Path, classes: bool = False) -> None:
        """The artifact at `path` (a model, tokens), whose codec this is, goes only with tokens of its palette and size.

        Of whole pictures the centre is seen; of larger squares too, by a model that was trained on crops of them. With
        `classes`, of the same classes too. Raises PixseqError naming both sides.
        """
        if self.scheme != other.scheme:
            raise PixseqError(
                f"{path} is of {self.scheme} tokens, {other_path} holds {other.scheme} tokens",
                f"encode with --scheme {self.scheme}",
            )
        if self.palette_id != other.palette_id:
            known = None not in (self.palette_id, other.palette_id)
            raise PixseqError(
                f"{path} has the palette {self.palette_id or 'unknown'}, "
                f"{other_path} was encoded with {other.palette_id or 'an unknown one'}",
                f"encode the pictures with the same palette; `pixseq show {word(path)} --lineage` names it"
                if known
                else "give the one without it the palette: --palette",
            )
        if self.n_vocab != other.n_vocab:
            raise PixseqError(
                f"{path} has a vocabulary of {self.n_vocab}, {other_path} one of {other.n_vocab}",
                "encode the pictures with the palette of the model",
            )
        self._must_see(path, other, other_path)
        ours, theirs = self.class_names, other.class_names
        if classes and ours != theirs and ours and theirs:
            raise PixseqError(
                f"{path} has the classes {few(ours)}, {other_path} has {few(theirs)}",
                "encode a source with the same classes",
            )

    def _must_see(self, path: str | Path, other: Codec, other_path: str | Path) -> None:
        """What must_pair says of sizes."""
        if (other.height, other.width) == (self.height, self.width) or (other.whole and self.side is not None):
            return
        crops = self.shown is not None and self.side is not None
        if not crops or other.whole or min(other.grid[:2]) < min(self.grid[:2]):
            more = " or more, or --resize whole" if crops else ""
            raise PixseqError(
                f"{path} is of {self.size} pictures, {other_path} holds {other.size}{' pictures' * other.whole}",
                f"encode with --size {self.height}{more}",
            )


OPTIONAL = tuple(each.name for each in fields(Codec) if each.metadata.get("optional"))
NEEDED = tuple(each.name for each in fields(Codec) if each.name not in (*OPTIONAL, "others"))


def _check_sizes(codec: Codec) -> None:
    if codec.scheme not in [*SCHEMES]:  # a list of a damaged file could not be looked up
        raise ValueError(f"its scheme is {codec.scheme!r}, not one of {', '.join(SCHEMES)}")
    for key, most in (("height", MOST_SIDE), ("width", MOST_SIDE), ("n_vocab", MOST_VOCAB)):
        value = getattr(codec, key)
        if value is not None and not is_count(value, most):
            raise ValueError(f"its {key} is {value!r}, not a number from 1 to {most}")
    if (codec.height is None) != (codec.width is None) or (codec.n_vocab is None) != (codec.kind == "pixels"):
        raise ValueError("its height, width and n_vocab do not go together")
    if codec.whole and codec.kind != "pixels":
        raise ValueError("it has tokens of whole pictures")


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
