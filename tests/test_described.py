"""A source is known by what is in it, wherever it lies and however it is named; older records still tell."""

import os
import shutil
from unittest.mock import patch

import numpy as np
import pytest
from conftest import write_tokens
from PIL import Image

from pixseq import progress
from pixseq.artifacts.arrays import open_store
from pixseq.data import described
from pixseq.data.described import describe, is_same
from pixseq.data.images import KEPT_PROBLEMS
from pixseq.data.sources import open_source
from pixseq.engine.parts import check_disjoint
from pixseq.errors import PixseqError
from pixseq.stages import encode, palette


def identity(path, split="train"):
    return describe(open_source(str(path), split))["id"]


def bitmaps(folder, seed, count=6, side=8):
    """Uncompressed pictures: of one size whatever they show, under the same names."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return folder


def test_sets_with_equal_names_and_sizes_are_two(tmp_path):
    """Small pictures are looked at whole, of large ones what lies within their frames of one colour too."""
    ours, theirs, copy = (bitmaps(tmp_path / name, seed) for name, seed in (("ours", 0), ("theirs", 1), ("copy", 0)))
    assert identity(ours) == identity(copy) != identity(theirs)
    for name, shade in (("black", 0), ("dark", 1)):
        framed = np.zeros((400, 400, 3), np.uint8)
        framed[150:250, 150:250] = shade
        (tmp_path / name).mkdir()
        Image.fromarray(framed).save(tmp_path / name / "0.bmp")
    assert identity(tmp_path / "black") != identity(tmp_path / "dark")
    for name, source in (("t", ours), ("u", theirs), ("c", copy)):
        encode.run(str(source), tmp_path / f"{name}.zarr", scheme="gray", size=4)
    train, test, same = (open_store(tmp_path / f"{name}.zarr", "tokens") for name in "tuc")
    check_disjoint(train, test, "why")
    with pytest.raises(PixseqError, match="same images"):
        check_disjoint(train, same, "why")


def test_a_picture_anywhere_in_a_large_set_changes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(described, "SAMPLED", 3)
    bitmaps(tmp_path / "s", 0, count=9)
    before = identity(tmp_path / "s")
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "s" / "b" / "00005.bmp")
    assert identity(tmp_path / "s") != before


def test_folders_are_listed_twice_and_files_asked_for_once(tmp_path):
    """Once for what is what and once for the identity: on a network each call is a journey."""
    bitmaps(tmp_path / "s", 0)
    with patch.object(os, "scandir", wraps=os.scandir) as scanned, patch.object(os, "stat", wraps=os.stat) as asked:
        identity(tmp_path / "s")
    assert [str(call.args[0]) for call in scanned.call_args_list].count(str(tmp_path / "s" / "a")) == 2
    files = [str(call.args[0]) for call in asked.call_args_list if str(call.args[0]).endswith(".bmp")]
    assert len(files) == len(set(files)) == 6


@pytest.mark.parametrize("form", ["pictures", "npz", "npy", "parquet", "tar"])
def test_a_split_is_one_source_named_from_above_or_directly(tmp_path, form):
    from pictures import pngs, write_parquet, write_tar

    root, direct = tmp_path / "root", tmp_path / "root" / "train"
    for seed, split in enumerate(("train", "test")):
        folder = root / split
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3), np.uint8)
        if form == "pictures":
            bitmaps(folder, seed)
        elif form == "npz":
            np.savez(folder / "00000.npz", images=pixels, labels=np.arange(6))
            np.savez(folder / "00001.npz", images=pixels, labels=np.arange(6))
        elif form == "npy":
            np.save(root / f"x_{split}.npy", pixels)
            direct = root / "x_train.npy"
        elif form == "parquet":
            write_parquet(folder / "0.parquet", {"image": pngs(4 + seed), "label": [0, 1, 0, 1, 0][: 4 + seed]})
        else:
            write_tar(folder / "0.tar", [(f"{i}.png", data) for i, data in enumerate(pngs(4 + seed))])
    assert identity(root) == identity(direct) != identity(root, "test")
    one, other, test = (tmp_path / f"{name}.zarr" for name in ("one", "other", "test"))
    encode.run(str(root), one, scheme="gray", size=4)
    encode.run(str(direct), other, scheme="gray", size=8)
    encode.run(str(root), test, scheme="gray", size=8, split="test")
    with pytest.raises(PixseqError, match="same source"):
        check_disjoint(open_store(one, "tokens"), open_store(other, "tokens"), "why")
    check_disjoint(open_store(one, "tokens"), open_store(test, "tokens"), "why")


def test_splits_within_one_file_are_two_sources(tmp_path):
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "s.npz", x_train=pixels, x_test=pixels)
    bitmaps(tmp_path / "s" / "train", 0)
    bitmaps(tmp_path / "s" / "test", 0)
    zipped = shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s")
    for path in (tmp_path / "s.npz", zipped, "digits"):
        assert identity(path) == identity(path) != identity(path, "test")


def test_paths_on_stdin_are_the_pictures_that_they_name(tmp_path, monkeypatch):
    import io
    import sys

    files = sorted(str(path) for path in bitmaps(tmp_path / "s", 0).rglob("*.bmp"))
    for name, size in (("a", 4), ("b", 8)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode("\n".join(files)))))
        encode.run("-", tmp_path / f"{name}.zarr", scheme="gray", size=size)
    with pytest.raises(PixseqError, match="same source"):
        check_disjoint(*(open_store(tmp_path / f"{name}.zarr", "tokens") for name in "ab"), "why")


def test_stores_from_before_there_was_this_id_are_compared_by_what_they_recorded(tmp_path):
    told = describe(open_source(str(bitmaps(tmp_path / "s", 0))))
    older = {"path": told["path"], "id": told["listing"]}
    assert told["listing"].startswith("folder:all:6:") and is_same(told, older) and is_same(older, told)
    other = describe(open_source(str(bitmaps(tmp_path / "o", 0, count=5))))
    assert not is_same(other, older) and not is_same(other, told)
    assert is_same(older, {**older, "path": "elsewhere"})
    stores = [open_store(write_tokens(tmp_path / f"{i}.zarr", count=8 + i), "tokens") for i in range(2)]
    stores[0].manifest["inputs"]["source"], stores[1].manifest["inputs"]["source"] = told, older
    with pytest.raises(PixseqError, match="same source"):
        check_disjoint(*stores, "why")


def test_all_that_were_passed_over_are_counted_and_the_first_named(tmp_path, monkeypatch):
    said, warned = [], []
    bitmaps(tmp_path / "pictures", 0)
    for i in range(30):
        (tmp_path / "pictures" / "a" / f"x{i:02}.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(progress, "warn", warned.append)
    options = {"split": "all", "size": 8, "on_error": "skip"}
    encode.run(str(tmp_path / "pictures"), tmp_path / "t.zarr", scheme="pixels", **options)
    palette.run_fit(str(tmp_path / "pictures"), tmp_path / "p.json", colors=2, **options)
    assert [line.split()[:4] for line in warned] == [["30", "of", "the", "pictures"]] * 2
    assert sum(line.startswith("skipped ") for line in said) == 2 * KEPT_PROBLEMS
