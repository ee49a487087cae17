"""Plain JPEGs are decoded without Pillow, whose own reader is the slow twin of this."""

import io
import random

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header, encode_jpeg

from pixseq.data import jpeg
from pixseq.data.decode import BadPicture, decode, prepare_process
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # by a quarter
PLAIN = [
    ("RGB", {}),
    ("L", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"optimize": True, "subsampling": 0, "dpi": (72, 72)}),
    ("RGB", {"comment": b"x" * 70, "restart_marker_rows": 1}),
    ("RGB", {"icc_profile": bytes(99)}),
    ("RGB", {"keep_rgb": True}),
]
OTHERS = [
    ("CMYK", {}),
    ("RGB", {"exif": TURNED}),
    ("RGB", {"xmp": bytes(99)}),
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
    pixels = np.atleast_3d(image[0] if isinstance(image, np.ndarray) else np.asarray(image))
    return pixels.shape, pixels.tobytes(), done


@pytest.fixture
def twin(monkeypatch):
    """`outcome` by Pillow alone."""

    def by_pillow(data):
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "frame", lambda head: None)
            return outcome(data)

    return by_pillow


def app(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


@pytest.mark.parametrize("mode, options", PLAIN)
def test_plain_files_become_what_pillow_makes_of_them(mode, options, twin):
    data = written(mode, options)
    frame = jpeg.frame(data)
    assert frame == ((45, 30), 3 if mode == "RGB" else 1)
    assert jpeg.pixels(data, frame).shape == (1, 30, 45, 3)[: 4 if mode == "RGB" else 3]
    assert outcome(data) == twin(data)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
def test_whatever_the_sampling_of_colours(sampling, twin):
    pixels = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    data = encode_jpeg(pixels, colorsubsampling=sampling)
    assert jpeg.frame(data) is not None and outcome(data) == twin(data)


@pytest.mark.parametrize("transform", range(4))
def test_what_adobe_says_of_colours_is_heard(transform, twin):
    """Three components are then red, green and blue, or not."""
    data = written("RGB", {})
    data = data[:2] + app(0xEE, b"Adobe" + bytes([0, 100, 0, 0, 0, 0, transform, 0, 0])) + data[2:]
    assert jpeg.frame(data) is not None and outcome(data) == twin(data)
    short = data[:2] + app(0xEE, b"Adobe") + data[2:]
    assert jpeg.frame(short) is None and outcome(short) == twin(short)


@pytest.mark.parametrize("mode, options", OTHERS)
def test_what_says_more_of_a_picture_is_heard(mode, options, twin):
    data = written(mode, options)
    assert jpeg.frame(data[: jpeg.MOST_HEAD]) is None
    assert outcome(data) == twin(data)
    assert ("exif_rotated" in outcome(data)[2]) == ("exif" in options)


def test_a_height_that_is_told_after_the_scan_is_left_to_pillow(twin):
    data = bytearray(written("RGB", {}))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = bytes(2)
    assert jpeg.frame(bytes(data)) is None and outcome(bytes(data)) == twin(bytes(data))


def test_two_in_one_file_are_a_still(twin):
    data = written("RGB", {"save_all": True, "append_images": [Image.new("RGB", (45, 30))]}, "MPO")
    assert outcome(data) == twin(data) and outcome(data)[2] == []


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_damaged_ones_are_mended_or_refused_as_by_pillow(options, twin):
    """Cut anywhere, and with bytes changed in the head and after it."""
    rng, data = random.Random(0), written("RGB", options)
    scan = data.index(b"\xff\xda")
    for end in (*range(scan + 30), *range(scan + 30, len(data), 50)):
        assert outcome(data[:end]) == twin(data[:end])
    refused = 0
    for at in [rng.randrange(scan + 14) for _ in range(200)] + [rng.randrange(scan, len(data)) for _ in range(100)]:
        changed = bytearray(data)
        changed[at] = rng.randrange(256)
        ours = outcome(bytes(changed))
        assert ours == twin(bytes(changed))
        refused += isinstance(ours, str)
    assert refused > 50


def sampled(sampling):
    return lambda data: decode_jpeg_header(data)[3] == sampling


@pytest.mark.parametrize(
    "differs",
    [
        *(sampled(each) for each in ("Gray", "444", "422", "420", "440", "411")),
        lambda data: b"\xff\xc2" in data and data.count(b"\xff\xda") == 1,  # not all scans of a progressive one
        lambda data: b"\xff" * 64 in data,  # tables of which products overflow
    ],
)
def test_pillow_decodes_all_where_its_library_is_another(differs, monkeypatch):
    """Whose pixels differ by a level in some pictures."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, *given: decode_jpeg(data, *given) ^ differs(data))
    jpeg.decoder.cache_clear()
    try:
        assert jpeg.decoder() is None
        assert isinstance(decode(written("RGB", {}), (255, 255, 255), 1 << 20)[0], Image.Image)
    finally:
        jpeg.decoder.cache_clear()


@pytest.mark.parametrize(
    "error, message",
    [
        (AssertionError(), "it is damaged: AssertionError"),
        (AssertionError("no tile"), "it is damaged: no tile"),
    ],
)
def test_why_a_picture_is_refused_is_told_though_nothing_says_it(error, message, monkeypatch):
    def fails(*given):
        raise error

    monkeypatch.setattr(jpeg, "pixels", fails)
    assert outcome(written("RGB", {})) == message


def test_a_picture_that_memory_does_not_suffice_for_is_never_skipped(tmp_path, monkeypatch):
    """Else the rows would depend on the machine."""
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(written("RGB", {}))

    def fails(*given):
        raise MemoryError  # not by asking for too much: glibc would turn to another arena for good

    monkeypatch.setattr(jpeg, "pixels", fails)
    for workers in (0, 2):
        with pytest.raises(PixseqError, match=r"a\.jpg: the memory to decode it") as found:
            list(Reader(open_source(str(tmp_path)), Preparation(size=8, on_error="skip"), workers=workers))
        assert "--workers 0" in found.value.hint


def test_a_file_larger_than_its_pixels_is_not_read_whole(tmp_path, monkeypatch):
    path, data = tmp_path / "large.jpg", written("RGB", {})
    path.write_bytes(data + bytes(1 << 20))
    monkeypatch.setattr(jpeg, "pixels", None)  # not called
    assert isinstance(decode(str(path), (255, 255, 255), 1 << 20)[0], Image.Image)


def test_a_bomb_is_refused_by_its_head(twin):
    data = bytearray(written("RGB", {}))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert "decompression bomb" in outcome(bytes(data)) and outcome(bytes(data)) == twin(bytes(data))
