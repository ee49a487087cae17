"""Pixels as an artifact: what encode writes for models of patches."""

import json

import numpy as np
import pytest
from PIL import Image

from pixseq.artifacts.arrays import StoreWriter, open_store, verify
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
    decode.run(tmp_path / "x.zarr", tmp_path / "grid.png", count=4, images_dir=tmp_path / "singles")
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
