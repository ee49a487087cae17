"""Where a part is taken it stands for all: every class has its share, whichever command takes it, recorded."""

import io
import tarfile

import numpy as np
import pytest
from conftest import write_tokens
from PIL import Image

from pixseq import progress
from pixseq.artifacts import manifest
from pixseq.artifacts.arrays import open_store
from pixseq.data.picking import picked, survey
from pixseq.data.sources import open_source
from pixseq.engine.images import Images
from pixseq.engine.opening import some_of
from pixseq.errors import UsageError
from pixseq.numerics.parts import choose_rows, hold_out, is_mixed, shares
from pixseq.stages import decode, encode, evaluate, features, frechet, palette, sample


def test_shares_are_proportional_and_leave_no_class_out():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(1, rng.choice([3, 50, 1000]), rng.integers(1, 12))
        wanted = int(rng.integers(1, counts.sum() + 1))
        given = shares(counts, wanted)
        assert given.sum() == wanted and np.all(given <= counts)
        quota = counts * wanted / counts.sum()
        if wanted >= len(counts):
            assert given.min() > 0
        if quota.min() >= 1:
            assert np.all(np.abs(given - quota) < 1)
    assert list(shares(np.full(20, 50), 500)) == [25] * 20
    assert np.count_nonzero(shares(np.full(20, 50), 5)) == 5


def test_rows_lie_all_over_the_set_and_all_over_each_class():
    assert list(choose_rows(10, 5)) == [0, 2, 4, 6, 8] and list(choose_rows(3, 5)) == [0, 1, 2]
    labels = np.repeat([0, 1], [30, 10])
    assert list(choose_rows(40, 4, labels)) == [0, 10, 20, 30]
    mixed = np.random.default_rng(0).permutation(labels)
    assert list(np.bincount(mixed[choose_rows(40, 4, mixed)])) == [3, 1]


def test_what_is_held_out_leaves_something_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [50, 30, 2, 1])
    for seed in range(5):
        held = hold_out(83, 0.1, labels, seed)
        assert len(held) == 8 and np.all(np.bincount(np.delete(labels, held), minlength=4) > 0)
    assert len(hold_out(3, 0.9, np.arange(3), 0)) == 2 and len(hold_out(50, 0.001, None, 0)) == 1


# ---- sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """60 pictures, each of one shade, its number; four classes, one after the other; in several forms."""
    root, labels = tmp_path_factory.mktemp("parts"), np.repeat(np.arange(4), [30, 10, 10, 10])
    with tarfile.open(root / "s.tar", "w") as tar:
        for i, label in enumerate(labels):
            data = io.BytesIO()
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(data, "PNG")
            path = root / "folder" / "abcd"[label] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.getvalue())
            for name, content in ((f"{i:04}.png", data.getvalue()), (f"{i:04}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = np.arange(60, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(root / "s.npz", images=images, labels=labels)
    np.save(root / "s.npy", images)
    return root


@pytest.mark.parametrize("name", ["folder", "s.tar", "s.npz", "s.npy"])
def test_a_limit_takes_images_of_every_class_from_all_over(sources, tmp_path, name, capsys):
    progress.enable()
    try:
        record = encode.run(str(sources / name), tmp_path / "t.zarr", scheme="gray", size=8, limit=12)
    finally:
        progress.enable(False)
    store = open_store(tmp_path / "t.zarr", "tokens")
    known = name != "s.npy"
    rows = choose_rows(60, 12, np.repeat(np.arange(4), [30, 10, 10, 10]) if known else None)
    np.testing.assert_array_equal(store.read("tokens")[:, 0], rows)
    if known:
        np.testing.assert_array_equal(np.bincount(store.labels()), [6, 2, 2, 2])
    assert record["summary"]["part"] == {"of": 60, "taken": 12, "how": "stratified" if known else "spread"}
    assert "is read once to count" not in capsys.readouterr().err
    again = encode.run(str(sources / name), tmp_path / "all.zarr", scheme="gray", size=8, limit=60)
    whole = encode.run(str(sources / name), tmp_path / "whole.zarr", scheme="gray", size=8)
    assert again["id"] == whole["id"] and "part" not in whole["summary"]


def test_a_source_that_does_not_know_its_length_is_read_once_for_it(sources, tmp_path, capsys):
    progress.enable()
    try:
        how = {"scheme": "gray", "size": 8, "limit": 12, "label_column": "none"}
        record = encode.run(str(sources / "s.tar"), tmp_path / "t.zarr", **how)
    finally:
        progress.enable(False)
    assert record["summary"]["part"]["taken"] == 12 and "is read once to count" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "s.tar", "s.npz", "s.npy"])
def test_what_is_picked_is_what_was_asked_for(sources, name, monkeypatch):
    monkeypatch.setattr("pixseq.data.picking.FAR", 4)
    opened = open_source(str(sources / name))
    count, labels = survey(opened)
    assert count == 60 and (labels is None) == (name == "s.npy")
    for rows in ([3], [0, 1, 2], [0, 9, 10, 58, 59], np.arange(60)):
        read = encode_shades(opened, np.array(rows))
        np.testing.assert_array_equal(read, rows)


def encode_shades(opened, rows):
    shades = []
    for item in picked(opened, rows):
        if hasattr(item, "images"):
            shades += [int(image.flat[0]) for image in item.images]
        else:
            with Image.open(io.BytesIO(item.data) if isinstance(item.data, bytes) else item.data) as picture:
                shades.append(picture.getpixel((0, 0)))
    return shades


def test_every_source_knows_the_labels_that_it_reads():
    for split in ("train", "test"):
        opened = open_source("digits", split)
        read = np.concatenate([block.labels for block in opened.read(0, None)])
        np.testing.assert_array_equal(opened.labels(), read)


def test_a_palette_of_some_images_sees_every_class(sources, tmp_path):
    for name in ("folder", "s.tar", "s.npz"):
        record = palette.run_fit(str(sources / name), tmp_path / f"{name}.json", colors=8, size=8, max_images=4)
        assert record["summary"]["part"] == {"of": 60, "taken": 4, "how": "stratified"}
        assert record["summary"]["distinct_colors"] == 4 and record["summary"]["images"] == 4


# ---- stores


@pytest.fixture(scope="module")
def sorted_store(tmp_path_factory):
    """80 rows of four classes, one after the other, each row of one token: its own number modulo 16."""
    rows = (np.arange(80) % 16)[:, None].repeat(36, 1)
    return write_tokens(
        tmp_path_factory.mktemp("sorted") / "t.zarr", 80, tokens=rows, labels=np.repeat(np.arange(4), 20)
    )


def test_pictures_and_prompts_are_of_every_class(sorted_store, checkpoints, tmp_path):
    store = open_store(sorted_store, "tokens")
    rows = choose_rows(80, 8, store.labels())
    assert list(store.labels()[rows]) == [0, 0, 1, 1, 2, 2, 3, 3]
    record = decode.run(sorted_store, tmp_path / "d.png", count=8, images_dir=tmp_path / "d")
    assert sorted(int(path.stem) for path in (tmp_path / "d").iterdir()) == list(rows)
    part = {"of": 80, "taken": 8, "how": "stratified"}
    assert record["summary"]["part"] == part
    with pytest.raises(UsageError, match="--first and --seed"):
        decode.run(sorted_store, tmp_path / "e.png", first=2, seed=1)
    record = sample.run(
        checkpoints["ar"], tmp_path / "s.png", count=8, prompt=str(sorted_store), tokens_out=tmp_path / "s.zarr",
        device="cpu",
    )  # fmt: skip
    assert record["config"]["part"] == part
    drawn = open_store(tmp_path / "s.zarr", "tokens").read("tokens")
    np.testing.assert_array_equal(drawn[:, 0], rows % 16)
    evaluate.run(checkpoints["ar"], sorted_store, pictures=tmp_path / "p.png", device="cpu")
    assert manifest.read(tmp_path / "p.png")["summary"]["part"] == {**part, "taken": 16}


def test_prompts_are_the_first_of_a_store_only_where_it_is_shuffled(tokens, checkpoints, tmp_path):
    out = {"prompt": str(tokens), "tokens_out": tmp_path / "s.zarr", "device": "cpu"}
    record = sample.run(checkpoints["ar"], tmp_path / "s.png", count=8, **out)
    drawn, stored = (open_store(path, "tokens").read("tokens") for path in (tmp_path / "s.zarr", tokens))
    assert (drawn[:, :18] == stored[:8, :18]).all() and "first of a shuffled set" in str(record)
    rng = np.random.default_rng(0)
    assert is_mixed(rng.integers(0, 10, 1000)) and is_mixed(np.tile(np.arange(4), 9))
    assert all(is_mixed(np.random.default_rng(seed).integers(0, 2, 32)) for seed in range(40))
    for labels in (
        np.arange(8) // 4,
        np.arange(8) // 2,
        np.repeat(np.arange(10), 100),
        np.repeat(rng.integers(0, 10, 200), 8),
        np.zeros(50, int),
    ):
        assert not is_mixed(labels)


def test_prompts_of_a_source_are_of_every_class(checkpoints, tmp_path):
    for i in range(40):
        path = tmp_path / "pics" / "abcd"[i // 10] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), 6 * i, np.uint8)).save(path)
    record = sample.run(checkpoints["ar"], tmp_path / "s.png", count=4, prompt=str(tmp_path / "pics"), device="cpu")
    assert record["config"]["part"] == {"of": 40, "taken": 4, "how": "stratified"}


def test_distances_of_a_part_are_of_every_class(sorted_store, tmp_path):
    features.run("pixels", sorted_store, tmp_path / "f.zarr", device="cpu")
    frechet.run(tmp_path / "f.zarr", tmp_path / "f.zarr", tmp_path / "d.json", count=40)
    config = manifest.read(tmp_path / "d.json")["config"]
    assert config["part_a"] == config["part_b"] == {"of": 80, "taken": 40, "how": "stratified"}
    store = open_store(tmp_path / "f.zarr", "features")
    rows = choose_rows(80, 40, store.labels())
    np.testing.assert_array_equal(frechet._rows(store, 0, rows), store.read("features", 0)[rows])
    assert frechet.run(tmp_path / "f.zarr", tmp_path / "f.zarr", count=40)["frechet_distance"] < 1e-3


def test_validation_on_a_part_sees_every_class(sorted_store):
    store = open_store(sorted_store, "tokens")
    images = Images(store.read("tokens"), store.labels(), (6, 6, 1)).subset(np.arange(10, 80))
    some = some_of(images, 14)
    np.testing.assert_array_equal(np.bincount(store.labels()[some.chosen]), [2, 4, 4, 4])
