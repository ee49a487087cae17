"""Pictures come out upright, in eight bits, square, in order, and the same whatever the threads."""

import io
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pixseq.data import images
from pixseq.data.folders import open_paths
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.records import Pixels, Source
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, UsageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(source, workers=0, start=0, limit=None, batch_size=1024, **prep):
    reader = Reader(source, Preparation(**prep), start, limit, batch_size, workers)
    batches = list(reader)
    images = np.concatenate([batch.images for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches]) if source.has_labels else None
    return images, labels, reader


def saved(tmp_path, image, name="x.png", **options):
    file = tmp_path / name
    image.save(file, **options)
    return open_paths("pictures", [str(file)], "train")


def one(tmp_path, image, name="x.png", size=4, save=(), **prep):
    images, _, reader = read(saved(tmp_path, image, name, **dict(save)), size=size, **prep)
    return images[0], reader.counts


def arrays(images, labels=None, class_names=None):
    def stream(start, stop):
        yield Pixels(images[start:stop], None if labels is None else labels[start:stop])

    return Source("npy", "arrays", "all", len(images), class_names, labels is not None, stream)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


CORNERS = [[list(RED), list(GREEN)], [list(BLUE), list(WHITE)]]


def quarters():
    """4x4: red, green above blue, white."""
    image = Image.new("RGB", (4, 4), RED)
    for place, colour in (((2, 0), GREEN), ((0, 2), BLUE), ((2, 2), WHITE)):
        image.paste(colour, (*place, place[0] + 2, place[1] + 2))
    return image


# ----------------------------------------------------------------------------------------------------- one picture


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.bmp", "x.gif", "x.tif", "x.ppm"])
def test_every_lossless_format_gives_the_same_pixels(tmp_path, name):
    pixels, counts = one(tmp_path, quarters(), name, save={"lossless": True} if name == "x.webp" else {})
    assert pixels[::3, ::3].tolist() == CORNERS
    assert counts == {"images": 1}


def test_content_decides_not_the_suffix(tmp_path):
    quarters().save(tmp_path / "x.jpg", format="PNG")
    images, _, _ = read(open_paths("p", [str(tmp_path / "x.jpg")], "train"), size=4)
    assert images[0, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    back = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # the transposition that stores it lying so
    stored = quarters()
    for method in back.get(orientation, []):
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, counts = one(tmp_path, stored, save={"exif": exif})
    assert pixels[::3, ::3].tolist() == CORNERS
    assert counts == ({"images": 1} if orientation == 1 else {"images": 1, "exif_rotated": 1})


def test_transparency_shows_the_background_not_the_hidden_colour(tmp_path):
    rgba = Image.new("RGBA", (4, 4), (*RED, 0))
    la = Image.new("LA", (4, 4), (0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    keyed = Image.new("RGB", (4, 4), RED)
    cases = [(rgba, {}), (la, {}), (palette, {"transparency": 1}), (keyed, {"transparency": RED})]
    for image, save in cases:
        for background, expected in (("white", WHITE), ("#102030", (16, 32, 48))):
            pixels, counts = one(tmp_path, image, save=save, background=background)
            assert (pixels == expected).all() and counts == {"images": 1, "alpha_composited": 1}
    half, _ = one(tmp_path, Image.new("RGBA", (4, 4), (*RED, 51)))
    assert half[0, 0].tolist() == [255, 204, 204]
    opaque, counts = one(tmp_path, Image.new("RGBA", (4, 4), (*RED, 255)))
    assert opaque[0, 0].tolist() == list(RED) and counts == {"images": 1}


def test_16_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("x.png", "x.tif", "x.pgm"):
        pixels, counts = one(tmp_path, Image.fromarray(ramp), name, size=64)
        np.testing.assert_array_equal(pixels[..., 0], np.rint(ramp / 257))
        assert counts == {"images": 1, "sixteen_bit": 1, "grey": 1}


def test_palette_two_level_and_grey_pictures_become_rgb(tmp_path):
    assert one(tmp_path, quarters().convert("P"), "x.gif")[0][::3, ::3].tolist() == CORNERS
    assert one(tmp_path, Image.new("1", (4, 4), 1))[0][0, 0].tolist() == list(WHITE)
    pixels, counts = one(tmp_path, Image.new("L", (4, 4), 77), "x.jpg")
    assert (pixels == 77).all() and counts == {"images": 1, "grey": 1}


def test_cmyk_is_converted_and_counted(tmp_path):
    pixels, counts = one(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg")  # Adobe's inverted form
    assert np.abs(pixels.astype(int) - RED).max() <= 4 and counts == {"images": 1, "cmyk": 1}


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_an_animation_gives_its_first_frame_and_is_counted(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    save = {"save_all": True, "append_images": frames[1:], "lossless": True}
    pixels, counts = one(tmp_path, frames[0], name, save=save if name == "x.webp" else {**save, "lossless": None})
    assert (pixels == RED).all() and counts == {"images": 1, "animated_first_frame": 1}


# ---------------------------------------------------------------------------------------------------- bad pictures


def whole_png():
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 40, 3)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "text.png": (b"not a picture", "no JPEG, PNG"),
    "empty.png": (b"", "empty"),
    "cut.png": (whole_png()[:-2000], "truncated|damaged|broken"),
    "head.png": (whole_png()[:30], "cut off"),
    "large.ppm": (b"P6 9000 9000 255\n0", r"9000 x 9000 pixels are more than the 64,000,000 allowed"),
    "bomb.ppm": (b"P6 12000 12000 255\n0", "decompression bomb"),
    "huge.ppm": (b"P6 60000 60000 255\n0", "decompression bomb"),
    "line.ppm": (b"P6 4000 1 255\n0", "4000 x 1 pixels are too few"),
    "page.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no JPEG, PNG"),  # not on the list
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(PixseqError, match=rf"{name}: .*({BAD[name][1]})") as caught:
        read(open_paths("p", [str(tmp_path / name)], "train"))
    assert "--on-error skip" in caught.value.hint


def test_float_and_32_bit_pictures_are_refused(tmp_path):
    for image in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 1 << 20)):
        with pytest.raises(PixseqError, match="no fixed scale"):
            read(saved(tmp_path, image, "x.tif"))


def test_a_missing_file_or_broken_link_is_named(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(PixseqError, match=r"link\.png: No such file"):
        read(open_paths("p", [str(tmp_path / "link.png")], "train"))


def test_names_are_safe_in_messages(tmp_path):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m.png")
    with open(file, "wb") as handle:
        handle.write(b"x")
    with pytest.raises(PixseqError) as caught:
        read(open_paths("p", [file], "train"))
    assert "\x1b" not in caught.value.message and caught.value.message.encode("utf-8")


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_bad_pictures_and_reports_them(tmp_path, workers):
    files = []
    for i in range(60):
        files.append(str(tmp_path / f"{i:02}.png"))
        if i % 2:
            (tmp_path / f"{i:02}.png").write_bytes(b"bad")
        else:
            Image.new("RGB", (4, 4), (i, 0, 0)).save(files[-1])
    source = open_paths("p", files, "train")
    images, _, reader = read(source, workers, on_error="skip", size=4, batch_size=7)
    assert images[:, 0, 0, 0].tolist() == list(range(0, 60, 2))
    assert reader.counts == {"images": 30, "skipped": 30}
    assert len(reader.problems) == 20 and reader.problems[0].startswith(files[1])
    with pytest.raises(PixseqError, match=r"01\.png"):
        read(source, workers, size=4)
    with pytest.raises(PixseqError, match="none of the 30 pictures"):
        list(Reader(open_paths("p", files[1::2], "train"), Preparation(on_error="skip")))


# ------------------------------------------------------------------------------------------------------ geometry


def test_crop_is_shorter_side_then_centre_crop_and_squash_is_one_resize(tmp_path):
    picture, bilinear = Image.fromarray(noise(60, 90, 3)), Image.Resampling.BILINEAR
    cropped, _ = one(tmp_path, picture, size=16)
    np.testing.assert_array_equal(cropped, picture.resize((24, 16), bilinear).crop((4, 0, 20, 16)))
    squashed, _ = one(tmp_path, picture, size=16, resize="squash")
    np.testing.assert_array_equal(squashed, picture.resize((16, 16), bilinear))


def test_jpegs_are_those_of_pillow_alone(tmp_path):
    """Grey and coloured ones, of which no copy is made, and one that must be turned."""
    exif, files, wanted = Image.Exif(), [], []
    exif[0x0112] = 6
    for i, (shape, save) in enumerate([((40, 60, 3), {}), ((50, 30), {}), ((33, 61, 3), {"exif": exif}), ((8, 8), {})]):
        files.append(tmp_path / f"{i}.jpg")
        Image.fromarray(noise(*shape, seed=i)).save(files[-1], **save)
        with Image.open(files[-1]) as plain:
            upright = plain.rotate(-90, expand=True) if save else plain
            left, top = ((n - min(upright.size)) // 2 for n in upright.size)
            box = (left, top, left + min(upright.size), top + min(upright.size))
            wanted.append(np.asarray(upright.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR, box)))
    found, _, reader = read(open_paths("p", [str(file) for file in files], "train"), size=8)
    np.testing.assert_array_equal(found, wanted)
    assert reader.counts == {"images": 4, "grey": 2, "exif_rotated": 1}


def test_a_picture_whose_shorter_side_fits_is_copied(tmp_path):
    picture = noise(32, 35, 3)
    cropped, _ = one(tmp_path, Image.fromarray(picture), size=32)
    np.testing.assert_array_equal(cropped, picture[:, 1:33])


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28), (17, 40, 3), (40, 17), (8, 8)])
@pytest.mark.parametrize("size", [8, 16, 28, 45])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_arrays_resized_together_equal_pillow_one_by_one(shape, size, resize):
    stack = noise(5, *shape)
    prep = Preparation(size=size, resize=resize)
    box = prep.boxes(shape[1], shape[0], 0)[0]
    slow = [Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box) for image in stack]
    slow = np.stack([np.asarray(image.convert("RGB")) for image in slow])
    images, _, reader = read(arrays(stack), size=size, resize=resize)
    np.testing.assert_array_equal(images, slow)
    assert images.flags.c_contiguous and reader.counts.get("grey", 0) == (5 if len(shape) == 2 else 0)


def test_pictures_in_planes_come_out_as_those_in_pixels():
    stack = noise(5, 12, 12, 3)
    planes = np.ascontiguousarray(stack.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    images, _, _ = read(arrays(planes), size=12)
    np.testing.assert_array_equal(images, stack)
    assert images.flags.c_contiguous


def test_views_are_the_papers_crops():
    prep = Preparation(views=200, seed=3)
    boxes = np.array(prep.boxes(300, 200, 7))
    sides = boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(sides[:, 0], sides[:, 1])
    shorter = 224 * 200 / sides[:, 0]  # what the shorter side would be resized to, in pixels
    assert 256 <= shorter.min() < 262 and 378 < shorter.max() <= 384
    assert (boxes >= 0).all() and (boxes[:, 2] <= 300).all() and (boxes[:, 3] <= 200).all()
    assert boxes[:, 0].max() > 150 and boxes[:, 0].min() < 10


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0},
        {"views": -1},
        {"views": 2, "resize": "squash"},
        {"resize": "fit"},
        {"background": "no colour"},
        {"on_error": "ignore"},
        {"max_pixels": 10**10},
        {"bit_depth": 17},
    ],
)
def test_preparations_that_make_no_sense_are_usage_errors(values):
    with pytest.raises(UsageError):
        Preparation(**values)


# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("prep", [{"size": 8}, {"size": 6}, {"size": 6, "views": 3}])
def test_order_start_and_threads_change_nothing(prep):
    stack, labels = noise(700, 8, 8, 3), np.arange(700)
    whole, whole_labels, _ = read(arrays(stack, labels), **prep)
    views = max(prep.get("views", 0), 1)
    assert whole_labels.tolist() == np.repeat(labels, views).tolist() and whole_labels.dtype == np.int32
    for workers, start, limit, batch_size in ((2, 0, None, 300), (3, 130, None, 64), (0, 130, 401, 7)):
        images, labels_read, _ = read(arrays(stack, labels), workers, start, limit, batch_size, **prep)
        rows = slice(start * views, None if limit is None else (start + limit) * views)
        np.testing.assert_array_equal(images, whole[rows])
        np.testing.assert_array_equal(labels_read, whole_labels[rows])


def test_files_with_views_are_the_same_from_any_start_and_thread_count(tmp_path):
    files = []
    for i in range(40):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(noise(20 + i, 30, 3, seed=i)).save(files[-1])
    source = open_paths("p", files, "train")
    whole, _, _ = read(source, views=2, size=8, seed=5)
    again, _, _ = read(source, workers=2, start=9, batch_size=4, views=2, size=8, seed=5)
    np.testing.assert_array_equal(again, whole[18:])
    assert (read(source, views=2, size=8, seed=6)[0] != whole).any()


def test_a_batch_says_where_to_go_on():
    source = arrays(noise(50, 4, 4, 3))
    stops = [batch.stop for batch in Reader(source, Preparation(size=4), start=3, limit=40, batch_size=16)]
    assert stops == [19, 35, 43]


def test_labels_outside_the_classes_are_refused():
    for wrong in (-1, 2, 1 << 40):
        with pytest.raises(PixseqError, match=f"label {wrong}"):
            read(arrays(noise(3, 4, 4), np.array([0, 1, wrong]), ["a", "b"]), size=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow_with_the_source(workers):
    block = Pixels(noise(256, 32, 32, 3), None)

    def peak(blocks):
        def stream(start, stop):
            for _ in range(blocks):
                yield Pixels(block.images, None)

        source = Source("npy", "endless", "all", None, None, False, stream)
        tracemalloc.start()
        for _ in Reader(source, Preparation(size=16), batch_size=512, workers=workers):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)  # what is loaded on the way stays
    assert peak(160) < 3 * peak(10)  # threads come and go, so that it varies by less than a half


def test_pictures_that_unfold_far_beyond_their_files_wait_for_each_other(tmp_path, monkeypatch):
    for i in range(12):
        Image.new("RGB", (400, 400), (i, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(images, "DECODE_CHUNK", 1)
    monkeypatch.setattr(images, "DECODED_BYTES", 3_500_000)  # of two such pictures
    rows, inside, most = Preparation.rows, [], []

    def slow(self, image, number):
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(number)
        return rows(self, image, number)

    monkeypatch.setattr(Preparation, "rows", slow)
    source, prep = open_source(str(tmp_path)), Preparation(size=4)
    found = [np.concatenate([b.images for b in images.Reader(source, prep, workers=w)]) for w in (0, 8)]
    assert np.array_equal(*found) and max(most) <= 2
    inside.clear(), most.clear()
    monkeypatch.setattr(images, "DECODED_BYTES", 1)  # each alone has more than all of it
    list(images.Reader(source, prep, workers=8))
    assert max(most) == 1


def test_whole_pictures_are_no_strips_and_are_held_a_few_at_a_time(tmp_path, monkeypatch):
    for i in range(12):
        Image.new("RGB", (300, 20), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    monkeypatch.setattr(images, "HELD_BYTES", 40_000)  # of two such pictures and a part
    source, prep = open_source(str(tmp_path)), Preparation(size=20, resize="whole")
    for workers in (0, 4):
        found = list(images.Reader(source, prep, workers=workers))
        assert [len(batch.shapes) for batch in found] == [4] * 3 and [batch.stop for batch in found] == [4, 8, 12]
    Image.new("RGB", (321, 20)).save(tmp_path / "99.png")
    with pytest.raises(PixseqError, match=r"99\.png: 321 x 20 pixels: whole pictures are at most 16 times") as fault:
        list(images.Reader(open_source(str(tmp_path)), prep))
    assert "--resize crop" in fault.value.hint and "--on-error skip" in fault.value.hint


def test_a_reader_that_is_left_waits_for_no_thread(monkeypatch):
    """It ends where garbage is collected, be it in a thread that begins, for which those that end wait."""
    go, made = threading.Event(), Reader._arrays

    def slow(self, pictures, labels, index):
        assert index == 0 or go.wait(60)
        return made(self, pictures, labels, index)

    monkeypatch.setattr(Reader, "_arrays", slow)
    batches = iter(Reader(arrays(noise(9, 8, 8, 3)), Preparation(size=8), batch_size=1, workers=1))
    next(batches)
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(10)
    waits = closing.is_alive()
    go.set()
    assert not waits
