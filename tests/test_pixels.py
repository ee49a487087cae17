"""Pixels as an artifact: what encode writes for models of patches."""

import json

import numpy as np
import pytest
from PIL import Image

from pixseq.artifacts import specs
from pixseq.artifacts.arrays import open_store, verify
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.quantize import byte_counts, channel_statistics
from pixseq.stages import decode, encode, palette, show


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(30):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return folder


def test_pixels_are_the_prepared_pictures(photos, tmp_path):
    record = encode.run(str(photos), tmp_path / "x.zarr", size=8, scheme="pixels")
    store = open_store(tmp_path / "x.zarr", "pixels")
    pixels = store.read("pixels")
    assert pixels.shape == (30, 8, 8, 3) and pixels.dtype == np.uint8 and store.labels().tolist() == [0] * 15 + [1] * 15
    with Image.open(photos / "a" / "00.png") as picture:
        square = picture.resize((8, 8), Image.BILINEAR, box=(0, 2, 20, 22))
    assert np.array_equal(pixels[0], np.asarray(square))
    summary = record["summary"]
    assert np.allclose(summary["channel_mean"], pixels.mean((0, 1, 2)) / 255, atol=1e-6)
    assert np.allclose(summary["channel_std"], pixels.std((0, 1, 2)) / 255, atol=1e-6)
    assert summary["images"] == summary["rows"] == 30 and "mse" not in summary
    assert store.meta == {
        "scheme": "pixels",
        "height": 8,
        "width": 8,
        "n_vocab": None,
        "palette": None,
        "palette_id": None,
        "class_names": ["a", "b"],
    }
    assert record == store.manifest and record["config"]["scheme"] == "pixels"
    assert show.run(tmp_path / "x.zarr", verify=True)["kind"] == "pixels"
    decode.run(tmp_path / "x.zarr", tmp_path / "grid.png", count=4, first=0, images_dir=tmp_path / "singles")
    with Image.open(tmp_path / "singles" / "000003.png") as single:
        assert np.array_equal(np.asarray(single), pixels[3])


def test_views_limits_and_squash(photos, tmp_path):
    encode.run(str(photos), tmp_path / "v.zarr", size=8, scheme="pixels", views=3, limit=5)
    assert len(open_store(tmp_path / "v.zarr", "pixels")) == 15
    encode.run(str(photos), tmp_path / "s.zarr", size=8, scheme="pixels", resize="squash", limit=1)
    with Image.open(photos / "a" / "00.png") as picture:
        whole = np.asarray(picture.resize((8, 8), Image.BILINEAR))
    assert np.array_equal(open_store(tmp_path / "s.zarr", "pixels").read("pixels")[0], whole)


@pytest.mark.parametrize("options", [{}, {"views": 2, "seed": 3}, {"limit": 17}])
def test_interrupted_anywhere_and_resumed_it_reaches_the_same_id(photos, tmp_path, monkeypatch, options):
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 5 * 8 * 8 * 3 // 2)  # chunks of 5 rows, batches of 7 or 3 images
    monkeypatch.setattr(encode, "BATCH_BYTES", 7 * 8 * 8 * 3)
    settings = {"size": 8, "scheme": "pixels", **options}
    whole = encode.run(str(photos), tmp_path / "whole.zarr", **settings)
    append, interruptions = StoreWriter.append, 0
    for _ in range(100):
        done = []

        def interrupted(self, rows, state, done=done):
            append(self, rows, state)
            done.append(1)
            if len(done) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoreWriter, "append", interrupted)
        try:
            record = encode.run(str(photos), tmp_path / "x.zarr", resume=True, **settings)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert not (tmp_path / "x.zarr").exists()
    assert interruptions > 1 and record["id"] == whole["id"] and record["summary"] == whole["summary"]
    assert verify(tmp_path / "x.zarr") == []


def test_tokens_begun_are_not_gone_on_with_as_pixels(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode.run(str(photos), tmp_path / "x.zarr", size=8, scheme="rgb")
    with pytest.raises(PixseqError, match=r"another recipe.*scheme"):
        encode.run(str(photos), tmp_path / "x.zarr", size=8, scheme="pixels", resume=True)


def test_chunks_have_about_eight_megabytes_and_damage_is_named(photos, tmp_path):
    encode.run(str(photos), tmp_path / "x.zarr", size=64, scheme="pixels")
    chunks = open_store(tmp_path / "x.zarr", "pixels").group["pixels"].chunks
    assert 7e6 < np.prod(chunks) < 9e6 and chunks[1:] == (64, 64, 3)
    chunk = tmp_path / "x.zarr" / "pixels" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(PixseqError, match="pixels/c/0/0/0/0 is damaged"):
        show.run(tmp_path / "x.zarr", verify=True)


def test_means_and_deviations_are_exact_for_any_number_of_pixels():
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    counts = byte_counts(images)
    assert np.array_equal(counts.reshape(3, 256)[1], np.bincount(images[..., 1].reshape(-1), minlength=256))
    for times in (1, 10**12):  # sums of squares beyond int64
        mean, std = channel_statistics(counts * times)
        np.testing.assert_allclose(mean, images.mean((0, 1, 2)) / 255, rtol=1e-14)
        np.testing.assert_allclose(std, images.std((0, 1, 2)) / 255, rtol=1e-14)
    assert channel_statistics(byte_counts(np.full((4, 3, 3, 3), 201, np.uint8))) == ([201 / 255] * 3, [0.0] * 3)


def test_what_makes_no_sense_is_told(photos, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((4, 64), np.int64))
    palette.run_fit(str(photos), tmp_path / "p.json", colors=4, size=8)
    with pytest.raises(UsageError, match="--scheme pixels has no use for --palette"):
        encode.run(str(photos), tmp_path / "x.zarr", tmp_path / "p.json", scheme="pixels")
    with pytest.raises(UsageError, match="--scheme pixels needs pictures"):
        encode.run(str(tmp_path / "ids.npy"), tmp_path / "x.zarr", size=8, scheme="pixels")
    encode.run(str(photos), tmp_path / "x.zarr", size=8, scheme="pixels")
    encode.run(str(photos), tmp_path / "t.zarr", tmp_path / "p.json", size=8)
    for path, wanted, hint in (("x.zarr", "tokens", "--palette"), ("t.zarr", "pixels", "--scheme pixels")):
        with pytest.raises(PixseqError, match=f"where {wanted} is needed") as fault:
            open_store(tmp_path / path, wanted)
        assert hint in fault.value.hint
    group = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())
    assert group["attributes"]["pixseq"]["kind"] == "pixels"


# ---- whole pictures, filters and the resized side


SIZES = [(24, 20), (20, 33), (50, 50), (9, 40), (61, 17), (12, 12)]  # widths and heights


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Smooth pictures of many sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES * 3):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        picture.convert("L" if i == 3 else "RGB").save(path)
    return folder


def files_of(folder):
    return sorted(folder.glob("*/*.png"), key=lambda path: (path.parent.name, path.name))


def shorter_side_to(image, side):
    """Resize of torchvision on a Pillow picture, by its documentation: the longer side is int(side * long / short)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new = int(side * long / short)
    return image.resize((side, new) if width <= height else (new, side), Image.BICUBIC)


def middle(image, side):
    """CenterCrop of torchvision on a Pillow picture, by its documentation."""
    width, height = image.size
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    return image.crop((left, top, left + side, top + side))


def whole_pictures(path):
    store = open_store(path, "pixels")
    pixels, shapes = store.read("pixels"), store.read("shapes")
    assert pixels.dtype == np.uint8 and pixels.shape == (shapes.prod(1).sum(), 3) and shapes.dtype == np.int32
    return [part.reshape(*shape, 3) for part, shape in zip(np.split(pixels, shapes.prod(1).cumsum()[:-1]), shapes)]


@pytest.mark.parametrize("side", [16, 64])
def test_whole_pictures_keep_both_sides_and_are_never_enlarged(mixed, tmp_path, side):
    settings = {"size": side, "scheme": "pixels", "resize": "whole", "filter": "bicubic"}
    record = encode.run(str(mixed), tmp_path / "w.zarr", **settings)
    stored = whole_pictures(tmp_path / "w.zarr")
    for path, picture in zip(files_of(mixed), stored, strict=True):
        with Image.open(path) as image:
            expected = image if min(image.size) <= side else shorter_side_to(image, side)
            assert np.array_equal(picture, np.asarray(expected.convert("RGB")))
    store, flat = open_store(tmp_path / "w.zarr", "pixels"), np.concatenate([p.reshape(-1, 3) for p in stored])
    assert len(store) == 18 and store.labels().tolist() == [0] * 9 + [1] * 9
    assert record["summary"]["rows"] == record["summary"]["images"] == 18 and record["summary"]["grey"] == 1
    assert np.allclose(record["summary"]["channel_mean"], flat.mean(0) / 255, atol=1e-6)
    assert (store.meta["height"], store.meta["width"], store.meta["shorter_side"]) == (None, None, side)
    assert show.run(tmp_path / "w.zarr", verify=True)["id"] == record["id"]
    again = encode.run(str(mixed), tmp_path / "again.zarr", **settings, workers=2)
    assert again["id"] == record["id"]


def test_whole_pictures_are_drawn_whole(mixed, tmp_path):
    encode.run(str(mixed), tmp_path / "w.zarr", size=16, scheme="pixels", resize="whole")
    decode.run(tmp_path / "w.zarr", tmp_path / "g.png", 6, 0, columns=3, scale=1, images_dir=tmp_path / "singles")
    stored = whole_pictures(tmp_path / "w.zarr")[:6]
    for i, picture in enumerate(stored):
        with Image.open(tmp_path / "singles" / f"{i:06}.png") as single:
            assert np.array_equal(np.asarray(single), picture)
    height, width = np.max([picture.shape[:2] for picture in stored], axis=0)
    with Image.open(tmp_path / "g.png") as drawn:
        assert drawn.size == (3 * (width + 2) + 2, 2 * (height + 2) + 2)
    decode.run(tmp_path / "w.zarr", tmp_path / "r.png", count=4, seed=1)


@pytest.mark.parametrize("source, moment", [("mixed", "append"), ("mixed", "_commit"), ("digits", "append")])
def test_whole_pictures_interrupted_anywhere_and_resumed_reach_the_same_id(
    mixed, tmp_path, monkeypatch, source, moment
):
    """After a chunk is committed, or when its pixels are written and it is not."""
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 4 * 341 * 3 // 2)  # chunks of 4 rows, batches of 3 images
    monkeypatch.setattr(encode, "BATCH_BYTES", 3 * 16 * 16 * 3)
    monkeypatch.setattr(specs, "CHUNK_PIXELS", 1000)
    settings = {"size": 16, "scheme": "pixels", "resize": "whole", "limit": 18}
    whole = encode.run(str(mixed) if source == "mixed" else "digits", tmp_path / "whole.zarr", **settings)
    assert open_store(tmp_path / "whole.zarr", "pixels").group["pixels"].chunks == (1000, 3)
    method, interruptions = getattr(StoreWriter, moment), 0
    for _ in range(100):
        done = []

        def interrupted(self, *given, done=done):
            done.append(1)
            if moment == "_commit" and len(done) == 3:
                raise KeyboardInterrupt
            method(self, *given)
            if moment == "append" and len(done) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoreWriter, moment, interrupted)
        try:
            path = str(mixed) if source == "mixed" else "digits"
            record = encode.run(path, tmp_path / "x.zarr", resume=True, **settings)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 1 and record["id"] == whole["id"] and record["summary"] == whole["summary"]
    assert verify(tmp_path / "x.zarr") == []


def test_arrays_of_pictures_are_kept_whole_too(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 20, 31), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", images)
    encode.run(str(tmp_path / "grey.npy"), tmp_path / "same.zarr", size=20, scheme="pixels", resize="whole")
    assert np.array_equal(np.stack(whole_pictures(tmp_path / "same.zarr")), np.repeat(images[..., None], 3, axis=3))
    encode.run(str(tmp_path / "grey.npy"), tmp_path / "less.zarr", size=10, scheme="pixels", resize="whole")
    expected = np.asarray(Image.fromarray(images[4]).resize((15, 10), Image.BILINEAR))
    assert np.array_equal(whole_pictures(tmp_path / "less.zarr")[4][..., 1], expected)


def test_the_centre_of_a_resized_side_is_torchvisions(mixed, tmp_path):
    for size, resized in ((14, 16), (15, 16), (16, 16), (11, 40)):
        name = tmp_path / f"{size}-{resized}.zarr"
        encode.run(str(mixed), name, size=size, scheme="pixels", filter="bicubic", resized_side=resized)
        for path, ours in zip(files_of(mixed), open_store(name, "pixels").read("pixels"), strict=True):
            with Image.open(path) as image:
                assert np.array_equal(ours, np.asarray(middle(shorter_side_to(image, resized), size).convert("RGB")))
    squares = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", squares)  # of the very --size: resized and cut all the same
    encode.run(
        str(tmp_path / "x.npy"), tmp_path / "y.zarr", size=12, scheme="pixels", filter="bicubic", resized_side=14
    )
    expected = np.asarray(middle(Image.fromarray(squares[2]).resize((14, 14), Image.BICUBIC), 12))
    assert np.array_equal(open_store(tmp_path / "y.zarr", "pixels").read("pixels")[2], expected)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_filters_are_pillows(photos, tmp_path, filter):
    encode.run(str(photos), tmp_path / "x.zarr", size=7, scheme="pixels", filter=filter, limit=3)
    with Image.open(photos / "a" / "00.png") as picture:
        expected = picture.resize((7, 7), Image.Resampling[filter.upper()], box=(0, 2, 20, 22))
    assert np.array_equal(open_store(tmp_path / "x.zarr", "pixels").read("pixels")[0], np.asarray(expected))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resize": "whole", "scheme": "rgb"}, "--resize whole keeps both sides"),
        ({"resize": "whole", "views": 2}, "--views .* --resize whole"),
        ({"resize": "whole", "resized_side": 20}, "--resized-side .* --resize whole"),
        ({"resize": "squash", "resized_side": 20}, "--resized-side .* --resize squash"),
        ({"views": 2, "resized_side": 20}, "--resized-side .* --views"),
        ({"resized_side": 7}, "--resized-side 7 is not between --size, 8"),
        ({"filter": "cubic"}, "--filter cubic"),
    ],
)
def test_what_cannot_go_together_is_refused(photos, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        encode.run(str(photos), tmp_path / "x.zarr", **{"size": 8, "scheme": "pixels", **options})
    assert not list(tmp_path.iterdir())
