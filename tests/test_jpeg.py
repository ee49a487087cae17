"""Plain JPEGs open without their tables being read in Python; Pillow's own reader is the slow twin of this."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from pixseq.data import jpeg
from pixseq.data.decode import BadPicture, decode, prepare_process

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # by a quarter
PLAIN = [
    ("RGB", {}),
    ("L", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"optimize": True, "subsampling": 0, "dpi": (72, 72)}),
    ("RGB", {"comment": b"x" * 70, "restart_marker_rows": 1}),
]
OTHERS = [
    ("CMYK", {}),
    ("RGB", {"exif": TURNED}),
    ("RGB", {"icc_profile": bytes(99)}),
    ("RGB", {"icc_profile": bytes(70_000)}),
]


@pytest.fixture(autouse=True)
def prepared():
    prepare_process(1 << 20)


def written(mode, options, form="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    image = Image.fromarray(pixels).resize((45, 30)).convert(mode)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def outcome(data):
    """The pixels and what was done, or why there are none."""
    try:
        image, done = decode(data, (255, 255, 255), 1 << 20)
    except BadPicture as error:
        return str(error)
    return image.mode, image.size, image.tobytes(), done


@pytest.fixture
def twin(monkeypatch):
    """`outcome` by Pillow alone."""

    def by_pillow(data):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "opened", lambda file: None)
            return outcome(data)

    return by_pillow


@pytest.mark.parametrize("mode, options", PLAIN)
def test_plain_files_become_what_pillow_makes_of_them(mode, options, twin):
    data = written(mode, options)
    assert jpeg.opened(io.BytesIO(data)).size == (45, 30)
    assert outcome(data) == twin(data) and outcome(data)[0] == mode


@pytest.mark.parametrize("mode, options", OTHERS)
def test_what_says_more_of_a_picture_is_heard(mode, options, twin):
    data = written(mode, options)
    assert jpeg.opened(io.BytesIO(data)) is None
    assert outcome(data) == twin(data)
    assert ("exif_rotated" in outcome(data)[3]) == ("exif" in options)


def test_two_in_one_file_are_a_still(twin):
    data = written("RGB", {"save_all": True, "append_images": [Image.new("RGB", (45, 30))]}, "MPO")
    assert outcome(data) == twin(data) and outcome(data)[3] == []


def test_damaged_ones_are_refused_as_by_pillow(twin):
    """Cut anywhere, and with bytes of their heads changed; a damaged table may be told in the decoder's words."""
    rng, data = random.Random(0), written("RGB", {})
    scan = data.index(b"\xff\xda")
    for end in (*range(scan + 30), *range(scan + 30, len(data), 50)):
        assert outcome(data[:end]) == twin(data[:end])
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(scan + 14)] = rng.randrange(256)
        ours, theirs = outcome(bytes(changed)), twin(bytes(changed))
        assert ours == theirs or (isinstance(ours, str) and isinstance(theirs, str))
        refused += isinstance(ours, str)
    assert refused > 50


def test_a_bomb_is_refused_by_its_head(twin):
    data = bytearray(written("RGB", {}))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert "decompression bomb" in outcome(bytes(data)) and outcome(bytes(data)) == twin(bytes(data))
