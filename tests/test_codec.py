"""What tokens and pixels mean: read as others wrote it, written as it was read, asked instead of looked up."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from pixseq.artifacts.codec import SCHEMES, Codec
from pixseq.choices import Scheme
from pixseq.errors import PixseqError, UsageError

PALETTE = [[-1, -1.0, -1], [0.25, 0.5, 1.0]]
TOKENS = {"scheme": "palette", "height": 4, "width": 2, "n_vocab": 2, "palette": PALETTE, "palette_id": "sha256:a"}
TOKENS |= {"class_names": ["cat"]}
SQUARE = Codec("pixels", 8, 8, None, class_names=["a", "b"])


@pytest.mark.parametrize("more", [{}, {"note": [1, {"b": None}]}, {"shown": 0.875}, {"shorter_side": 9}], ids=str)
def test_what_is_written_is_what_was_read(more):
    """Ids are taken over it: a number stays of its type, and what is not known here is carried along."""
    codec = Codec.read(TOKENS | more)
    assert repr(sorted(codec.written().items())) == repr(sorted((TOKENS | more).items()))
    assert Codec.read(codec.written()) == codec


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scheme": "cmyk"}, "scheme is 'cmyk'"),
        ({"scheme": ["rgb"]}, "scheme is \\['rgb'\\]"),
        ({"height": True}, "height is True"),
        ({"width": None}, "do not go together"),
        ({"height": None, "width": None}, "tokens of whole pictures"),
        ({"n_vocab": 3}, "2 colours, its vocabulary 3"),
        ({"palette": "red"}, "three numbers"),
        ({"palette_id": 1}, "palette_id"),
        ({"class_names": "cat"}, "class_names"),
        ({"shown": "all"}, "shown is 'all'"),
    ],
    ids=str,
)
def test_a_strangers_codec_is_refused_in_words(change, told):
    with pytest.raises(ValueError, match=told):
        Codec.read(TOKENS | change)
    with pytest.raises(ValueError, match=f"does not say {next(iter(TOKENS))}"):
        Codec.read({})


@pytest.mark.parametrize("scheme", ["palette", "rgb", "gray"])
def test_pictures_of_its_own_colours_come_back(scheme):
    codec = Codec.read(TOKENS) if scheme == "palette" else Codec(scheme, 4, 2, 256)
    rows, columns, channels = codec.grid
    tokens = np.random.default_rng(0).integers(0, codec.n_vocab, (3, rows * columns * channels)).astype(np.uint16)
    images = codec.to_images(tokens)
    assert images.shape == (3, 4, 2, 3) and np.array_equal(codec.to_tokens(images), tokens)


def test_what_a_model_sees_of_pictures():
    whole = Codec("pixels", None, None, None, shorter_side=12)
    assert whole.whole and whole.side is None and SQUARE.side == 8
    for stored in (whole, replace(SQUARE, height=12, width=12)):
        assert stored.seen("x", 8, 0.875) == replace(stored, height=8, width=8, shown=0.875, shorter_side=None)
    for side in (None, 8, 9):  # smaller ones are seen as they are
        assert SQUARE.seen("x", side, 0.875) is SQUARE
    with pytest.raises(UsageError, match="x holds whole pictures"):
        whole.seen("x", None, 0.875)


def test_two_that_do_not_go_together_are_both_named():
    ours, crops = Codec.read(TOKENS), replace(SQUARE, shown=0.875)
    whole = Codec("pixels", None, None, None, shorter_side=12)
    for codec, other in ((ours, ours), (crops, replace(SQUARE, height=9, width=9)), (SQUARE, whole)):
        codec.must_pair("a", other, "b", classes=True)
    for codec, other, told in (
        (ours, SQUARE, "a is of palette tokens, b holds pixels tokens"),
        (ours, replace(ours, palette_id=None), "a has the palette sha256:a, b was encoded with an unknown one"),
        (ours, replace(ours, n_vocab=3), "a has a vocabulary of 2, b one of 3"),
        (ours, replace(ours, height=2), "a is of 4x2 pictures, b holds 2x2"),
        (SQUARE, replace(SQUARE, height=9, width=9), "a is of 8x8 pictures, b holds 9x9"),
        (crops, replace(SQUARE, height=9, width=7), "a is of 8x8 pictures, b holds 9x7"),
        (ours, replace(ours, class_names=["dog"]), "a has the classes cat, b has dog"),
    ):
        with pytest.raises(PixseqError, match=f"^{told}$"):
            codec.must_pair("a", other, "b", classes=True)


def test_every_scheme_that_may_be_chosen_has_its_traits():
    assert tuple(SCHEMES) == get_args(Scheme)
