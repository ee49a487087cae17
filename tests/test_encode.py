import errno
import io
import json
import os
import signal
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from program import ended, forked, until
from sklearn.datasets import load_digits

from pixseq import progress
from pixseq.artifacts import layout, manifest, publishing
from pixseq.artifacts.arrays import open_store, verify
from pixseq.artifacts.palette import palette_id, save_palette
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.data.described import describe
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.parts import choose_rows
from pixseq.stages import decode, encode

COLORS = np.random.default_rng(0).uniform(-1, 1, (12, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A module's playground: a palette, 60 pictures in three class folders, two of them unreadable."""
    root = tmp_path_factory.mktemp("encode")
    save_palette(root / "p.json", COLORS, "palette fit", {}, {}, {})
    rng = np.random.default_rng(1)
    for label in "abc":
        (root / "pictures" / label).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / label / f"{i:02}.png")
    (root / "pictures" / "a" / "07.png").write_text("no picture")
    (root / "pictures" / "c" / "19.png").write_text("no picture")
    return root


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 7 rows, batches of 4 images: they end together only now and then."""
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 7 * 64)
    monkeypatch.setattr(encode, "BATCH_BYTES", 4 * 8 * 8 * 3)


def test_every_token_is_the_nearest_colour_of_its_pixel(folder, tmp_path):
    record = encode.run("digits", tmp_path / "t.zarr", folder / "p.json", size=8, limit=300)
    store = open_store(tmp_path / "t.zarr", "tokens")
    tokens = store.read("tokens")
    bunch, rows = load_digits(), choose_rows(1437, 300, load_digits().target[:1437])
    pixels = np.rint(bunch.images[rows].reshape(300, 64) * (255 / 16)).astype(np.uint8)
    distance = ((pixels[:, :, None, None] / 127.5 - 1 - COLORS) ** 2).sum(axis=-1)
    assert tokens.dtype == np.uint16 and tokens.shape == (300, 64)
    np.testing.assert_array_equal(tokens, distance.argmin(axis=2))
    np.testing.assert_array_equal(store.labels(), bunch.target[rows])
    counts = np.bincount(tokens.reshape(-1), minlength=12) / tokens.size
    summary = record["summary"]
    assert summary["unigram_nats_per_token"] == pytest.approx(-(counts[counts > 0] * np.log(counts[counts > 0])).sum())
    assert summary["mse"] == pytest.approx(127.5**2 * distance.min(axis=2).mean(), rel=1e-4)
    assert (summary["images"], summary["rows"], summary["distinct_tokens"]) == (300, 300, np.count_nonzero(counts))


def test_a_store_carries_all_that_training_needs(folder, tmp_path):
    record = encode.run(str(folder / "pictures"), tmp_path / "t.zarr", folder / "p.json", size=8, on_error="skip")
    store = open_store(tmp_path / "t.zarr", "tokens")
    assert store.meta == {
        "scheme": "palette",
        "height": 8,
        "width": 8,
        "n_vocab": 12,
        "palette": COLORS.tolist(),
        "palette_id": palette_id(COLORS),
        "class_names": ["a", "b", "c"],
    }
    assert record == store.manifest and verify(tmp_path / "t.zarr") == []
    assert record["inputs"]["palette"]["id"] == palette_id(COLORS)
    assert record["inputs"]["source"]["id"].startswith("folder:60:")
    wanted = {"filter": "bilinear", "resize": "crop", "split": "all", "size": 8, "background": "white", "views": 0}
    assert wanted.items() <= record["config"].items()
    assert (record["summary"]["images"], record["summary"]["skipped"], record["summary"]["rows"]) == (58, 2, 58)
    np.testing.assert_array_equal(store.labels(), [0] * 19 + [1] * 20 + [2] * 19)


@pytest.mark.parametrize("scheme, width", [("rgb", 3 * 64), ("gray", 64)])
def test_rgb_and_gray_need_no_palette(tmp_path, scheme, width):
    record = encode.run("digits", tmp_path / "t.zarr", size=8, limit=50, scheme=scheme)
    store = open_store(tmp_path / "t.zarr", "tokens")
    tokens = store.read("tokens")
    assert tokens.shape == (50, width) and store.meta["n_vocab"] == 256 and store.meta["palette"] is None
    rows = choose_rows(1437, 50, load_digits().target[:1437])
    grey = np.rint(load_digits().images[rows] * (255 / 16)).reshape(50, 64)
    np.testing.assert_array_equal(tokens, np.repeat(grey, width // 64, axis=1))
    assert record["summary"]["mse"] == 0 and "palette" not in record["inputs"]


@pytest.mark.parametrize("options", [{}, {"views": 3, "seed": 5}, {"limit": 33}, {"scheme": "gray", "palette": None}])
def test_interrupted_anywhere_and_resumed_it_reaches_the_same_id(folder, tmp_path, monkeypatch, small_chunks, options):
    settings = {"palette": folder / "p.json", "size": 8, "on_error": "skip", **options}
    whole = encode.run(str(folder / "pictures"), tmp_path / "whole.zarr", **settings)
    append, out, interruptions = StoreWriter.append, tmp_path / "t.zarr", 0
    for _ in range(100):
        done = []

        def interrupted(self, rows, state, done=done):
            append(self, rows, state)
            done.append(1)
            if len(done) == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoreWriter, "append", interrupted)
        try:
            record = encode.run(str(folder / "pictures"), out, resume=True, **settings)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert not out.exists() and layout.partial_path(out).exists()
    assert interruptions and record["id"] == whole["id"] and record["summary"] == whole["summary"]
    assert verify(out) == []


def test_a_run_that_fails_ends_its_threads_itself(folder, tmp_path, monkeypatch, small_chunks):
    """Not when the garbage collector comes by: it may do so in a thread that begins, which then waits for itself."""

    def failing(*args):
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    monkeypatch.setattr(StoreWriter, "append", failing)
    with pytest.raises(KeyboardInterrupt) as held:  # and with it all frames
        encode.run(str(folder / "pictures"), tmp_path / "t.zarr", folder / "p.json", size=8, on_error="skip")
    pools = [each for each in threading.enumerate() if each not in before and "(_handle" in each.name]
    assert held and pools == []


def test_what_only_lacks_its_name_is_published_where_recipe_and_content_match(folder, tmp_path, monkeypatch):
    settings = {"palette": folder / "p.json", "size": 8, "on_error": "skip"}
    out, partial = tmp_path / "t.zarr", tmp_path / "t.zarr.partial"

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(publishing, "publish", killed)
        encode.run(str(folder / "pictures"), out, **settings)
    assert partial.exists() and not out.exists()
    with pytest.raises(PixseqError, match="another recipe"):
        encode.run(str(folder / "pictures"), out, **settings | {"size": 9}, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(encode, "_encode", killed)  # nothing is encoded again
        record = encode.run(str(folder / "pictures"), out, **settings, resume=True)
    assert record == manifest.read(out) and not verify(out) and sorted(os.listdir(tmp_path)) == ["t.zarr"]
    assert sorted(os.listdir(out)) == ["labels", "tokens", "zarr.json"]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(publishing, "publish", killed)
        encode.run(str(folder / "pictures"), tmp_path / "u.zarr", **settings)
    (tmp_path / "u.zarr.partial" / "labels" / "c" / "0").unlink()
    again = encode.run(str(folder / "pictures"), tmp_path / "u.zarr", **settings, resume=True)
    assert again["id"] == record["id"] and not verify(tmp_path / "u.zarr")


def test_without_resume_an_interrupted_encode_starts_again(folder, tmp_path, monkeypatch, small_chunks):
    out, settings = tmp_path / "t.zarr", {"palette": folder / "p.json", "size": 8, "on_error": "skip"}
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode.run(str(folder / "pictures"), out, **settings, views=2)
    with pytest.raises(PixseqError, match="only its unfinished"):
        manifest.read(out)
    with pytest.raises(PixseqError, match=r"another recipe.*views"):
        encode.run(str(folder / "pictures"), out, **settings, resume=True)
    encode.run(str(folder / "pictures"), out, **settings)
    assert open_store(out, "tokens").shape("tokens") == (58, 64) and not layout.partial_path(out).exists()


def test_two_sources_of_the_same_count_have_ids_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            shade = np.full((8 + i, 8, 3), 20 * i + (name == "b"), np.uint8)
            Image.fromarray(shade).save(tmp_path / name / f"{name}{i}.png")
    ids = {describe(open_source(str(tmp_path / name)))["id"] for name in ("a", "b")}
    assert len(ids) == 2


def test_a_bad_picture_is_named_and_can_be_passed_over_later(folder, tmp_path, small_chunks):
    out, settings = tmp_path / "t.zarr", {"palette": folder / "p.json", "size": 8}
    with pytest.raises(PixseqError, match=r"a/07\.png") as fault:
        encode.run(str(folder / "pictures"), out, **settings)
    assert "--on-error skip" in fault.value.hint and not any(tmp_path.iterdir())  # no chunk was written yet
    encode.run(str(folder / "pictures"), out, **settings, resume=True, on_error="skip")
    assert open_store(out, "tokens").shape("tokens") == (58, 64)


def test_killed_at_any_moment_it_leaves_no_target_and_resumes_to_the_same_id(folder, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (1500, 24, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    settings = {"palette": folder / "p.json", "size": 16, "views": 4}
    whole = encode.run(str(tmp_path / "images.npy"), tmp_path / "whole.zarr", **settings)
    out = tmp_path / "t.zarr"
    command = ["encode", tmp_path / "images.npy", "--palette", folder / "p.json", "--size", 16, "--views", 4]
    command += ["-o", out, "--resume", "--quiet"]
    for rows in (1, 3000):
        child = forked(*command)
        until(lambda rows=rows: rows_written(out) >= rows, child.is_alive)
        child.kill()
        assert ended(child) == -signal.SIGKILL and not out.exists()
    record = encode.run(str(tmp_path / "images.npy"), out, **settings, resume=True)
    assert record["id"] == whole["id"] and verify(out) == []


def rows_written(out):
    try:
        state = json.loads((layout.partial_path(out) / "zarr.json").read_text())["attributes"]
        return state["pixseq_unfinished"]["rows"]
    except (OSError, KeyError):
        return 0


def test_a_stream_of_unknown_length_is_written_as_it_comes(folder, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(30):
            data = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 8 * i, np.uint8)).save(data, "PNG")
            for name, content in ((f"{i:04}.png", data.getvalue()), (f"{i:04}.cls", str(i % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    record = encode.run(str(tmp_path / "shard.tar"), tmp_path / "t.zarr", scheme="gray", size=8)
    store = open_store(tmp_path / "t.zarr", "tokens")
    np.testing.assert_array_equal(store.read("tokens")[:, 0], np.arange(30) * 8)
    np.testing.assert_array_equal(store.labels(), np.arange(30) % 3)
    assert record["inputs"]["source"]["id"].startswith("webdataset:")


def test_options_that_do_not_go_together_are_usage_errors(folder, tmp_path):
    for options in (
        {"palette": None},
        {"palette": folder / "p.json", "scheme": "rgb"},
        {"palette": folder / "p.json", "scheme": "cmyk"},
        {"palette": folder / "p.json", "limit": 0},
        {"palette": folder / "p.json", "views": 2, "resize": "squash"},
    ):
        with pytest.raises(UsageError):
            encode.run("digits", tmp_path / "t.zarr", **options)
    assert list(tmp_path.iterdir()) == []


def test_tokens_cannot_stand_in_for_a_palette(folder, tmp_path):
    encode.run("digits", tmp_path / "t.zarr", folder / "p.json", size=8, limit=10)
    with pytest.raises(PixseqError, match="is of kind tokens, where palette is needed"):
        encode.run("digits", tmp_path / "u.zarr", tmp_path / "t.zarr", size=8)
    assert not (tmp_path / "u.zarr").exists()


def test_an_existing_target_stays_until_a_new_one_is_whole(folder, tmp_path, monkeypatch):
    out = tmp_path / "t.zarr"
    first = encode.run("digits", out, folder / "p.json", size=8, limit=10)
    with pytest.raises(PixseqError, match="already exists"):
        encode.run("digits", out, folder / "p.json", size=8, limit=20)
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode.run("digits", out, folder / "p.json", size=8, limit=20, overwrite=True)
    assert manifest.read(out)["id"] == first["id"] and verify(out) == []
    assert encode.run("digits", out, folder / "p.json", size=8, limit=20, overwrite=True)["summary"]["rows"] == 20


def test_a_full_disk_is_an_error_that_says_so(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", full)
        with pytest.raises(PixseqError, match="disk is full"):
            encode.run("digits", tmp_path / "t.zarr", folder / "p.json", size=8)
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PixseqError, match=r"takes up to \d+\.\d kB, but its disk has 1\.0 kB free"):
        encode.run("digits", tmp_path / "t.zarr", folder / "p.json", size=8)
    assert list(tmp_path.iterdir()) == []


def test_classes_without_images_are_said(folder, tmp_path, capsys):
    progress.enable()
    try:
        encode.run(str(folder / "pictures"), tmp_path / "t.zarr", folder / "p.json", size=8, limit=1)
    finally:
        progress.enable(False)
    assert "2 of 3 classes have no image" in capsys.readouterr().err


def test_decode_draws_the_palette_colours_of_the_tokens(folder, tmp_path):
    encode.run("digits", tmp_path / "t.zarr", folder / "p.json", size=8, limit=40)
    record = decode.run(
        tmp_path / "t.zarr", tmp_path / "g.png", count=6, first=10, columns=3, images_dir=tmp_path / "d"
    )
    tokens = open_store(tmp_path / "t.zarr", "tokens").read("tokens", slice(10, 16))
    images = np.rint(127.5 * (COLORS + 1)).astype(np.uint8)[tokens].reshape(6, 8, 8, 3)
    singles = [np.asarray(Image.open(tmp_path / "d" / f"{i:06}.png")) for i in range(10, 16)]
    np.testing.assert_array_equal(singles, images)
    grid = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
    assert {tuple(c) for c in grid.reshape(-1, 3)} >= {tuple(c) for c in images.reshape(-1, 3)}
    assert manifest.read(tmp_path / "g.png") == record
    assert record["inputs"]["tokens"]["id"] == manifest.read(tmp_path / "t.zarr")["id"]
    drawn = [decode.run(tmp_path / "t.zarr", tmp_path / f"{i}.png", count=4, seed=2)["id"] for i in range(2)]
    assert drawn[0] == drawn[1]
    for options in ({"first": 40}, {"count": 0}, {"columns": 0}):
        with pytest.raises(UsageError):
            decode.run(tmp_path / "t.zarr", tmp_path / "h.png", **options)
