"""A set that lacks one of its files is an error that names it; to read the rest is a wish that has to be said."""

import pickle
import tarfile

import numpy as np
import pytest
from pictures import drawn, pngs, write_parquet, write_tar

from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError


def count(path, on_error="fail", split="train"):
    source = open_source(str(path), split, on_error=on_error)
    return sum(len(batch.images) for batch in Reader(source, Preparation(size=8)))


def lacks(path, name, images):
    """Refused with the name of what is missing; with --on-error skip the rest is read, and a note says so."""
    with pytest.raises(PixseqError, match=r"incomplete|cut short") as caught:
        count(path)
    assert name in caught.value.message and "--on-error skip" in caught.value.hint
    assert count(path, "skip") == images
    assert name in "\n".join(open_source(str(path), on_error="skip").notes)


@pytest.mark.parametrize(
    "names, missing",
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "train-00001-of-00003.parquet"),
        (["train-00000-of-00003", "train-00001-of-00003"], "train-00002-of-00003.parquet"),
        (["data/train-00001-of-00002-9f3c"], "train-00000-of-00002-9f3c.parquet"),
        (["part_2_of_3", "part_3_of_3"], "part_1_of_3.parquet"),
        (["default/train/0000", "default/train/0002"], "0001.parquet"),
    ],
)
def test_shards_of_parquet(tmp_path, names, missing):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", {"image": pngs(2)})
    lacks(tmp_path, missing, 2 * len(names))


def test_a_shard_that_is_named_is_read_and_other_splits_do_not_matter(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00002"):
        write_parquet(tmp_path / f"{name}.parquet", {"image": pngs(2)})
    assert count(tmp_path) == 2
    assert count(tmp_path / "test-00000-of-00002.parquet") == 2
    assert "one of 2 shards" in open_source(str(tmp_path / "test-00000-of-00002.parquet")).notes[0]
    write_parquet(tmp_path / "train-00001-of-00002.parquet", {"image": pngs(2)})
    with pytest.raises(PixseqError, match="more than one form: -of-00001 and -of-00002"):
        count(tmp_path)


@pytest.mark.parametrize(
    "names, missing",
    [
        (["set-000000", "set-000001", "set-000003"], "set-000002.tar"),
        (["00005", "00007"], "00006.tar"),
        (["train-000", "train-017"], "train-001.tar"),
        (["x-0-of-2"], "x-1-of-2.tar"),
        (["shard-0", "shard-2"], "shard-1.tar"),
    ],
)
def test_shards_of_webdataset(tmp_path, names, missing):
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [("0.png", pngs(1)[0]), ("0.cls", b"1")])
    lacks(tmp_path, missing, len(names))


def test_years_and_ids_are_no_numbering(tmp_path):
    names = ("2012", "2017", "a7", "a99", "b00000000000001", "b20261128120000", "c-0-of-20261128120000")
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [("0.png", pngs(1)[0])])
    assert count(tmp_path) == len(names)


@pytest.mark.parametrize(
    "names, first",
    [
        (["seen-00000-of-00001", "unseen-00000-of-00001"], "seen"),
        (["train_small-00000-of-00001", "train_full-00000-of-00001"], "train_full"),
        (["fold_1", "fold_2", "fold_3"], "fold_1"),
        (["train-0-of-1", "challenge-0-of-1"], "challenge"),
    ],
)
def test_sets_of_shards_are_splits(tmp_path, names, first):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", {"image": pngs(2)})
    assert count(tmp_path, split=first) == 2 and open_source(str(tmp_path), first).split == first
    if "train-0-of-1" not in names:
        with pytest.raises(PixseqError, match=f"splits {first}, .*, not train"):
            count(tmp_path)


def test_a_download_under_way(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", pngs(1)[0])])
    (tmp_path / "b.tar.part").write_bytes(b"x")
    lacks(tmp_path, "b.tar.part", 1)


@pytest.mark.parametrize("kind", ["python", "binary", "tar"])
def test_batches_of_cifar(tmp_path, kind):
    folder = tmp_path / "cifar"
    folder.mkdir()
    rows = np.zeros((4, 3072), np.uint8)
    for i in (1, 2, 3, 4, 5):
        name = f"data_batch_{i}" + ".bin" * (kind == "binary")
        whole = pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}, 2)
        (folder / name).write_bytes(np.c_[np.arange(4, dtype=np.uint8), rows].tobytes() if kind == "binary" else whole)
    path = tmp_path / "x.tar.gz" if kind == "tar" else folder

    def pack():
        if kind == "tar":
            with tarfile.open(path, "w:gz") as tar:
                tar.add(folder, "cifar-10-batches-py")

    pack()
    assert count(path) == 20
    (folder / name).unlink()
    pack()
    lacks(path, name, 16)
    if kind == "binary":  # cut just between two records
        (folder / name).write_bytes(np.c_[np.arange(3, dtype=np.uint8), rows[:3]].tobytes())
        lacks(path, "data_batch_5.bin (3 images)", 19)


def test_batches_of_downsampled_imagenet(tmp_path):
    rows = drawn(2).transpose(0, 3, 1, 2).reshape(2, -1)
    for i in range(1, 10):
        np.savez(tmp_path / f"train_data_batch_{i}.npz", data=rows, labels=np.array([1, 2]))
    lacks(tmp_path, "train_data_batch_10.npz", 18)


def test_shards_that_are_empty_or_something_else_are_named(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", {"image": pngs(2)})
    shard = tmp_path / "train-00001-of-00002.parquet"
    for content, said in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>login", "is a web page"),
    ):
        shard.write_bytes(content)
        with pytest.raises(PixseqError, match=said) as caught:
            count(tmp_path)
        assert shard.name in caught.value.message


@pytest.mark.parametrize("at", [0, 1, 100])
@pytest.mark.parametrize(
    "name", ["train-0000.tar", "train/0000.tar", "0000.parquet", "train-labels-idx1-ubyte", "0.npz"]
)
def test_a_file_cut_to_its_first_bytes_is_not_passed_over(tmp_path, name, at):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if "idx" in name:
        images = bytes((0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 5))
        (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
        data = b"\0\0"
    else:
        other = (tmp_path / name).with_name(f"1{(tmp_path / name).suffix}")
        if other.suffix == ".tar":
            write_tar(other, [("0.png", pngs(1)[0])])
        elif other.suffix == ".parquet":
            write_parquet(other, {"image": pngs(1)})
        else:
            np.savez(other, images=drawn(1))
        data = other.read_bytes()
    (tmp_path / name).write_bytes(data[:at])
    with pytest.raises(PixseqError) as caught:
        count(tmp_path)
    assert (tmp_path / name).name in caught.value.message
