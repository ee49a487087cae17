"""Every source is recognised by content, read in one order with its labels, and refused by name when it is broken."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from pixseq.bounded import pages
from pixseq.data import webdataset
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.records import ImageFile
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, UsageError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(source, size, start=0, limit=None):
    """Images and labels, exactly as stored if `size` is their own."""
    batches = list(Reader(source, Preparation(size=size), start, limit, batch_size=16))
    images = np.concatenate([batch.images for batch in batches])
    return images, np.concatenate([batch.labels for batch in batches]) if source.has_labels else None


def check(source, images, labels, split, class_names=None):
    """The source gives these images and labels, from the start and from the middle."""
    size = images.shape[1]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, -1)
    assert source.split == split and source.count in (None, len(images)) and source.class_names == class_names
    assert source.has_labels == (labels is not None)
    for start, limit in ((0, None), (len(images) // 2, None), (0, 1)):
        rows = slice(start, None if limit is None else start + limit)
        got_images, got_labels = read(source, size, start, limit)
        np.testing.assert_array_equal(got_images, images[rows])
        if labels is not None:
            assert got_labels.tolist() == list(labels[rows])


def refuses(path, match, split="train", hint=""):
    """Opening and reading raises one PixseqError that names the file."""
    with pytest.raises(PixseqError, match=match) as caught:
        list(Reader(open_source(str(path), split), Preparation(size=8)))
    assert hint in (caught.value.hint or "")
    return caught.value


def save(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


# --------------------------------------------------------------------------------------------------- digits, splits


def test_digits_are_scaled_and_split_without_overlap():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    expected = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    names = list("0123456789")
    check(open_source("digits"), expected[:1437], bunch.target[:1437], "train", names)
    check(open_source("digits", "test"), expected[1437:], bunch.target[1437:], "test", names)
    assert expected.max() == 255 and np.bincount(bunch.target[1437:]).min() > 30


@pytest.mark.parametrize("split, times", [("train", 3), ("test", 1)])
def test_placed_digits_lie_whole_on_their_canvas_at_different_places(split, times):
    plain, opened = (next(open_source(name, split).read(0, None)) for name in ("digits", "digits-placed"))
    n = len(plain.images)
    assert opened.images.shape == (times * n, 12, 12) and opened.images.dtype == np.uint8
    places = np.full((times, n), -1)
    for i, canvas in enumerate(opened.images):
        want, total = plain.images[i % n], int(plain.images[i % n].sum())
        assert canvas.sum(dtype=int) == total and opened.labels[i] == plain.labels[i % n]
        cuts = [(y, x) for y in range(5) for x in range(5) if np.array_equal(canvas[y : y + 8, x : x + 8], want)]
        assert cuts  # one, or several where the digit has empty rows or columns
        places[i // n, i % n] = 5 * cuts[0][0] + cuts[0][1]
    assert np.bincount(places.ravel(), minlength=25).min() > len(opened.images) / 25 / 3  # all over the canvas
    repeated = [len(np.unique(opened.images[i::n], axis=0)) < times for i in range(n)]
    assert not any(repeated)


def test_placed_digits_are_the_same_whenever_they_are_read():
    source = open_source("digits-placed")
    whole, again, part = (next(source.read(*rows)) for rows in ((0, None), (0, None), (1430, 1450)))
    assert source.count == len(whole.images) == len(source.labels()) and np.array_equal(whole.images, again.images)
    assert np.array_equal(part.images, whole.images[1430:1450]) and np.array_equal(part.labels, whole.labels[1430:1450])
    assert np.array_equal(source.labels(), whole.labels)
    assert np.array_equal(source.shows(), np.tile(np.arange(1437), 3))
    assert open_source("digits-placed", "test").shows is None  # one picture a digit


def test_a_missing_split_is_an_error_with_both_sides(tmp_path):
    refuses("digits-placed", "digits-placed has the splits test, train, not val", "val")
    refuses("digits-place", "digits-place does not exist", hint="digits-placed")
    refuses("digits", "digits has the splits test, train, not val", "val")
    np.save(tmp_path / "x.npy", noise(4, 8, 8))
    assert open_source(str(tmp_path / "x.npy")).split == "all"
    refuses(tmp_path / "x.npy", "has no splits, but split test was asked for", "test", hint="leave --split out")


def test_nothing_there_and_nothing_known(tmp_path):
    (tmp_path / "cats.npz").write_bytes(b"what is this")
    refuses(tmp_path / "cat.npz", "does not exist", hint="cats.npz")
    refuses(tmp_path / "cats.npz", "no source of images", hint="a source is")
    refuses("digit", "digit does not exist", hint="digits")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "holds no pictures")
    (tmp_path / "t.zarr").mkdir()
    (tmp_path / "t.zarr/zarr.json").write_text("{}")
    refuses(tmp_path / "t.zarr", "not a source of images")


# ----------------------------------------------------------------------------------------------------------- CIFAR


def pickled(folder, name, images, labels, key="labels", python_2=False):
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    content = {"data": rows, key: labels, "filenames": ["x"] * len(labels)}
    (folder / name).write_bytes(pickle.dumps({k.encode(): v for k, v in content.items()} if python_2 else content, 2))


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR-10 folder of 12 batches of 5 images (so that 10 must not sort before 2), and a test batch."""
    folder = tmp_path / "somewhere"
    folder.mkdir()
    images, labels = noise(65, 32, 32, 3), np.arange(65) % 10
    for i in range(12):
        rows = slice(5 * i, 5 * i + 5)
        pickled(folder, f"data_batch_{i + 1}", images[rows], labels[rows].tolist(), python_2=i % 2)
    pickled(folder, "test_batch", images[60:], labels[60:].tolist())
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, 2))
    (folder / "readme.html").write_text("<html>")
    return folder, images, labels, [f"c{i}" for i in range(10)]


def test_cifar_10_python_version(cifar):
    folder, images, labels, names = cifar
    assert open_source(str(folder)).name == "cifar10"
    check(open_source(str(folder)), images[:60], labels[:60], "train", names)
    check(open_source(str(folder), "test"), images[60:], labels[60:], "test", names)


def test_cifar_archive_is_read_in_place_and_in_the_folders_order(cifar, tmp_path):
    folder, images, labels, names = cifar
    archive = tmp_path / "cifar.bin"  # content decides
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(folder.iterdir(), reverse=True):
            tar.add(file, f"cifar-10-batches-py/{file.name}")
    before = sorted(tmp_path.rglob("*"))
    check(open_source(str(archive)), images[:60], labels[:60], "train", names)
    check(open_source(str(archive), "test"), images[60:], labels[60:], "test", names)
    assert sorted(tmp_path.rglob("*")) == before
    archive.write_bytes(archive.read_bytes()[:-2000])
    refuses(archive, r"cifar\.bin is damaged")


def test_cifar_binary_versions(tmp_path):
    images, labels = noise(10, 32, 32, 3), np.arange(10)
    rows = images.transpose(0, 3, 1, 2).reshape(10, -1)
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    ten.mkdir()
    hundred.mkdir()
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        np.c_[labels.astype(np.uint8), rows][part].tofile(ten / f"data_batch_{i + 1}.bin")
    (ten / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    check(open_source(str(ten)), images, labels, "train", list("abcdefghij"))
    np.c_[labels.astype(np.uint8), (labels + 90).astype(np.uint8), rows].tofile(hundred / "test.bin")
    assert open_source(str(hundred), "test").name == "cifar100"
    check(open_source(str(hundred), "test"), images, labels + 90, "test")
    refuses(hundred, "has the split test, not train")
    (ten / "data_batch_1.bin").write_bytes(bytes(3073 * 2 + 5))
    refuses(ten, r"data_batch_1\.bin has 6151 bytes, no multiple of the 3073")


def test_cifar_100_has_its_fine_labels_and_names(tmp_path):
    images, labels = noise(6, 32, 32, 3), [0, 99, 5, 5, 7, 50]
    pickled(tmp_path, "train", images, labels, "fine_labels")
    names = [f"fine{i}" for i in range(100)]
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["x"]}, 2))
    assert open_source(str(tmp_path)).name == "cifar100"
    check(open_source(str(tmp_path)), images, np.array(labels), "train", names)


def test_broken_cifar_is_named(tmp_path):
    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    batch = tmp_path / "data_batch_1"
    good = {"data": noise(2, 3072), "labels": [0, 1]}
    for content, match in (
        ({"data": Run(), "labels": [0]}, "data_batch_1: this pickle is refused: it asks for posix.mkdir"),
        ({"data": noise(2, 3072), "labels": [0]}, "data_batch_1 has 2 images, but 1 labels"),
        ({"data": noise(2, 3000), "labels": [0, 1]}, r"data is uint8 \[2, 3000\]"),
        ({"data": noise(2, 3072), "labels": [0, 10]}, "labels from 0 to 10, but 10 classes"),
        ({"data": noise(2, 3072), "labels": ["a", "b"]}, "labels is not a list of whole numbers"),
        ({"other": 1}, "data_batch_1 is no CIFAR batch"),
        ([1], "data_batch_1"),
    ):
        batch.write_bytes(pickle.dumps(content, 2))
        refuses(tmp_path, match)
    assert not (tmp_path / "ran").exists()
    batch.write_bytes(pickle.dumps(good, 2)[:-100])
    refuses(tmp_path, "data_batch_1 is damaged")
    batch.write_bytes(b"text")
    refuses(tmp_path, "data_batch_1")
    batch.rename(tmp_path / "data_batch_2").write_bytes(pickle.dumps(good, 2))
    refuses(tmp_path, "it lacks data_batch_1, data_batch_3, data_batch_4, data_batch_5", hint="--on-error skip")
    refuses(tmp_path / "data_batch_2", "is one file of a set", hint="name the folder")


# ------------------------------------------------------------------------------------------------- idx and STL-10


def idx(file, values, packed=False):
    data = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_mnist_style_idx(tmp_path, packed, dot):
    images, labels = noise(9, 8, 8), np.arange(9, dtype=np.uint8)
    for split, rows in (("train", slice(0, 6)), ("t10k", slice(6, 9))):
        idx(tmp_path / f"{split}-images{dot}idx3-ubyte{'.gz' * packed}", images[rows], packed)
        idx(tmp_path / f"{split}-labels{dot}idx1-ubyte{'.gz' * packed}", labels[rows], packed)
    assert open_source(str(tmp_path)).name == "mnist-idx"
    check(open_source(str(tmp_path)), images[:6], labels[:6], "train")
    check(open_source(str(tmp_path), "test"), images[6:], labels[6:], "test")
    check(open_source(str(tmp_path / f"train-images{dot}idx3-ubyte{'.gz' * packed}")), images[:6], labels[:6], "train")
    (tmp_path.parent / (tmp_path.name + "-root")).mkdir()
    tmp_path.rename(tmp_path.parent / (tmp_path.name + "-root") / "raw")  # as torchvision keeps it
    check(open_source(str(tmp_path) + "-root"), images[:6], labels[:6], "train")


def test_emnist_is_turned_upright_and_its_sets_are_told_apart(tmp_path):
    images = noise(4, 8, 8)
    for name in ("letters", "digits"):
        idx(tmp_path / f"emnist-{name}-train-images-idx3-ubyte.gz", images.transpose(0, 2, 1), True)
        idx(tmp_path / f"emnist-{name}-train-labels-idx1-ubyte.gz", np.arange(4, dtype=np.uint8), True)
    refuses(tmp_path, "2 sets of idx images: emnist-digits-train.*emnist-letters-train", hint="name the images file")
    file = tmp_path / "emnist-letters-train-images-idx3-ubyte.gz"
    check(open_source(str(file)), images, np.arange(4), "train")


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_idx_labels_without_their_images_are_named(tmp_path, lacking):
    images, labels = noise(4, 8, 8), np.arange(4, dtype=np.uint8)
    splits = {"train": "train", "test": "t10k"}
    for name in splits.values():
        idx(tmp_path / f"{name}-images-idx3-ubyte", images)
        idx(tmp_path / f"{name}-labels-idx1-ubyte", labels)
    other = "test" if lacking == "train" else "train"
    (tmp_path / f"{splits[lacking]}-images-idx3-ubyte").unlink()
    said = f"is incomplete: it has {splits[lacking]}-labels-idx1-ubyte, but not the images"
    refuses(tmp_path, said, split=lacking)
    check(open_source(str(tmp_path), other), images, labels, other)
    (tmp_path / f"{splits[other]}-images-idx3-ubyte").unlink()
    refuses(tmp_path, said, split=lacking)


def test_broken_idx_is_named(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    idx(images, noise(5, 8, 8))
    idx(labels, np.arange(4, dtype=np.uint8))
    refuses(tmp_path, "train-images-idx3-ubyte has 5 images, but train-labels-idx1-ubyte has 4 labels")
    idx(labels, np.arange(5, dtype=np.uint8))
    images.write_bytes(images.read_bytes()[:-1])
    refuses(tmp_path, "has 335 bytes, but its header promises 336")
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    idx(packed, noise(5, 8, 8), True)
    images.unlink()
    whole = packed.read_bytes()
    for cut in (4, 12, 100):
        packed.write_bytes(whole[:-cut])
        refuses(tmp_path, r"ubyte\.gz is damaged")
    packed.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3i", 5, 1 << 20, 1 << 20) + bytes(99)))
    refuses(tmp_path, "declares 5,497,558,138,880 bytes, more than so small a file can hold")


def test_stl10_binary_is_column_major_and_counts_labels_from_1(tmp_path):
    images, labels = noise(6, 96, 96, 3), np.array([1, 10, 3, 4, 5, 6], np.uint8)
    for split in ("train", "test", "unlabeled"):
        images.transpose(0, 3, 2, 1).tofile(tmp_path / f"{split}_X.bin")
    labels.tofile(tmp_path / "train_y.bin")
    labels[:5].tofile(tmp_path / "test_y.bin")
    (tmp_path / "class_names.txt").write_text("\n".join("abcdefghij"))
    (tmp_path / "fold_indices.txt").write_text("0 1 2")
    assert open_source(str(tmp_path)).name == "stl10"
    check(open_source(str(tmp_path)), images, labels - 1, "train", list("abcdefghij"))
    check(open_source(str(tmp_path), "unlabeled"), images, None, "unlabeled")
    refuses(tmp_path, "has 6 images, but test_y.bin has 5 labels", "test")


# ------------------------------------------------------------------------------------------------------- npy, npz


@pytest.mark.parametrize("stored", ["[N, H, W]", "[N, H, W, 1]", "[N, 1, H, W]", "[N, H*W]"])
def test_grey_arrays(tmp_path, stored):
    images = noise(5, 8, 8)
    shape = {"[N, H, W]": (5, 8, 8), "[N, H, W, 1]": (5, 8, 8, 1), "[N, 1, H, W]": (5, 1, 8, 8), "[N, H*W]": (5, 64)}
    np.save(tmp_path / "x.npy", images.reshape(shape[stored]))
    check(open_source(str(tmp_path / "x.npy")), images, None, "all")


@pytest.mark.parametrize("stored", ["[N, H, W, 3]", "[N, 3, H, W]", "[N, 3*H*W]", "Fortran order"])
def test_colour_arrays(tmp_path, stored):
    images = noise(5, 8, 8, 3)
    planes = images.transpose(0, 3, 1, 2)
    forms = {
        "[N, H, W, 3]": images,
        "[N, 3, H, W]": planes,
        "[N, 3*H*W]": planes.reshape(5, -1),
        "Fortran order": np.asfortranarray(images),
    }
    np.save(tmp_path / "x", forms[stored])
    check(open_source(str(tmp_path / "x.npy")), images, None, "all")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_keys_and_splits(tmp_path, write):
    images, labels = noise(9, 8, 8, 3), np.arange(9)
    write(tmp_path / "one.npz", X=images, y=labels, class_names=list("abcdefghi"))
    check(open_source(str(tmp_path / "one.npz")), images, labels, "all", list("abcdefghi"))
    write(tmp_path / "keras.npz", x_train=images[:6], y_train=labels[:6], x_test=images[6:], y_test=labels[6:])
    check(open_source(str(tmp_path / "keras.npz")), images[:6], labels[:6], "train")
    check(open_source(str(tmp_path / "keras.npz"), "test"), images[6:], labels[6:], "test")
    write(tmp_path / "medmnist.npz", val_images=images, val_labels=labels[:, None].astype(np.uint8))
    check(open_source(str(tmp_path / "medmnist.npz"), "val"), images, labels, "val")


def test_downsampled_imagenet_shards(tmp_path):
    images, labels = noise(1100, 4, 4, 3), np.arange(1100) % 1000 + 1
    rows = images.transpose(0, 3, 1, 2).reshape(1100, -1)
    for i in range(11):
        part = slice(100 * i, 100 * i + 100)
        np.savez(tmp_path / f"train_data_batch_{i + 1}.npz", data=rows[part], labels=labels[part], mean=rows.mean(0))
    np.savez(tmp_path / "val_data.npz", data=rows, labels=labels)
    check(open_source(str(tmp_path)), images, labels - 1, "train")
    check(open_source(str(tmp_path), "val"), images, labels - 1, "val")


def test_uint16_is_scaled(tmp_path):
    wide = np.random.default_rng(0).integers(0, 65536, (5, 8, 8)).astype(">u2")
    np.save(tmp_path / "x.npy", wide)
    check(open_source(str(tmp_path / "x.npy")), np.rint(wide / 257).astype(np.uint8), None, "all")
    assert "scaled" in open_source(str(tmp_path / "x.npy")).notes[0]
    np.save(tmp_path / "x.npy", wide // 300)
    refuses(tmp_path / "x.npy", "stay below 256")


@pytest.mark.parametrize(
    "arrays, match",
    [
        ({"images": np.array([{"a": 1}], dtype=object)}, r"\[images\] holds object"),
        ({"images": np.full((3, 8, 8), np.nan, np.float32)}, r"\[images\] holds float32"),
        ({"images": noise(3, 8, 8), "labels": np.arange(4)}, r"has 3 images, but .*\[labels\] is int64 \[4\]"),
        ({"images": noise(3, 8, 8), "labels": np.array([0.5, 1, 2])}, r"\[labels\]: 0.5 is no class"),
        ({"images": noise(3, 8, 8), "x": noise(3, 8, 8)}, "could both be meant"),
        ({"weights": noise(3, 8, 8)}, "does not say which array holds the images: it has weights"),
        ({"images": noise(8, 8, 3)}, "is no stack of pictures"),
        ({"images": noise(3, 8, 8, 4)}, "is no stack of pictures"),
        ({"images": noise(3, 3, 8, 3)}, "is no stack of pictures"),
        ({"images": noise(3, 50)}, "is no stack of pictures"),
        ({"images": noise(0, 8, 8)}, "is empty"),
        ({"images": np.uint8(3)}, "is empty"),
        ({"images": noise(3, 8, 8), "labels": np.array([0, 1, -1])}, "image 2 has no label: 1 of 3 of labels"),
        ({"images": noise(3, 8, 8), "labels": np.array([0, 1, -2])}, "has the label -2"),
    ],
)
def test_arrays_without_a_clear_meaning_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "x.npz", **arrays)
    refuses(tmp_path / "x.npz", match)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_truncated_or_flipped_arrays_are_named(tmp_path, name):
    file = tmp_path / name
    np.save(file, noise(9, 8, 8)) if name == "x.npy" else np.savez(file, images=noise(9, 8, 8))
    whole = file.read_bytes()
    for length in (7, 90, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refuses(file, "is damaged")
    if name == "x.npz":
        file.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
        refuses(file, r"x\.npz.* is damaged: Bad CRC-32")


# -------------------------------------------------------------------------------------------------------- folders


def test_class_folders_are_sorted_by_bytes(tmp_path):
    pixels = iter(noise(20, 8, 8, 3))
    expected = {}
    for name in ("b/10.png", "b/2.png", "B/x.PNG", "é/x.png", "b/deep/er/x.png", "a-/1.bmp", "a/1"):
        expected[name] = next(pixels)
        save(tmp_path / (name if "." in name else name + ".png"), expected[name])
    (tmp_path / "a/1.png").rename(tmp_path / "a/1")  # a picture without a suffix
    (tmp_path / "a/notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    order = ["B/x.PNG", "a/1", "a-/1.bmp", "b/10.png", "b/2.png", "b/deep/er/x.png", "é/x.png"]
    source = open_source(str(tmp_path))
    assert source.name == "folder"
    check(
        source, np.stack([expected[name] for name in order]), [0, 1, 2, 3, 3, 3, 4], "all", ["B", "a", "a-", "b", "é"]
    )


def test_flat_folder_and_single_picture_have_no_labels(tmp_path):
    images = noise(3, 8, 8, 3)
    for name, pixels in zip("bca", images):
        save(tmp_path / f"{name}.png", pixels)
    (tmp_path / "readme.txt").write_text("x")
    source = open_source(str(tmp_path))
    check(source, images[[2, 0, 1]], None, "all")
    assert "readme.txt" in source.notes[0]
    check(open_source(str(tmp_path / "b.png")), images[:1], None, "all")


def test_a_text_beside_each_picture_is_not_opened(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(8, 8))
        (tmp_path / f"{i}.txt").write_text("a caption")
    (tmp_path / "3.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with patch.object(os, "open", wraps=os.open) as opened:
        refuses(tmp_path, "3.txt is a Git LFS pointer")
        (tmp_path / "3.txt").unlink()
        assert open_source(str(tmp_path)).count == 3
    assert {os.path.basename(call.args[0]) for call in opened.call_args_list} == {"3.txt"}


def test_train_and_test_folders_are_splits_with_one_numbering(tmp_path):
    images = noise(4, 8, 8, 3)
    for name, pixels in zip(("train/a/1.png", "train/c/1.png", "validation/b/1.png", "validation/c/1.png"), images):
        save(tmp_path / name, pixels)
    (tmp_path / "train/b").mkdir()
    train = open_source(str(tmp_path))
    check(train, images[:2], [0, 2], "train", ["a", "b", "c"])
    assert "class 1 is empty" in train.notes[0]
    check(open_source(str(tmp_path), "val"), images[2:], [1, 2], "val", ["a", "b", "c"])
    refuses(tmp_path, "has the splits train, val, not test", "test")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "car"):
        save(tmp_path / name / "1.png", noise(8, 8, 3))
    assert open_source(str(tmp_path)).class_names == ["car", "train"]
    save(tmp_path / "test/1.png", noise(8, 8, 3))
    refuses(tmp_path, r"holds splits \(test, train\) and other pictures \(car\)")


def test_a_wrapper_folder_is_seen_through(tmp_path):
    for name in "ab":
        save(tmp_path / "101_ObjectCategories" / name / "1.png", noise(8, 8, 3))
    assert open_source(str(tmp_path)).class_names == ["a", "b"]


def test_ambiguous_folders_are_refused(tmp_path):
    save(tmp_path / "a/1.png", noise(8, 8, 3))
    save(tmp_path / "1.png", noise(8, 8, 3))
    refuses(tmp_path, r"holds both pictures \(1.png\) and folders of pictures \(a\)")
    np.savez(tmp_path / "x.npz", images=noise(2, 8, 8))
    refuses(tmp_path, r"holds npz \(x.npz\) and pictures \(1.png\)", hint="name the file itself")


def test_links_are_followed_but_not_in_circles(tmp_path):
    images = noise(2, 8, 8, 3)
    save(tmp_path / "store/x.png", images[0])
    save(tmp_path / "set/a/y.png", images[1])
    (tmp_path / "set/a/x.png").symlink_to(tmp_path / "store/x.png")
    (tmp_path / "set/b").symlink_to(tmp_path / "store")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    files = [item.name.removeprefix(str(tmp_path)) for item in source.read(0, None)]
    assert files[:2] == ["/set/a/x.png", "/set/a/y.png"] and "/set/b/x.png" in files and len(files) < 5
    assert any("leads back" in note for note in source.notes)


def test_names_outside_utf_8_are_read_and_shown_safely(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\x1b[1m")
    with open(os.fsencode(tmp_path) + b"/\xff\x1b[1m/\xfe.png", "wb") as file:
        Image.fromarray(noise(8, 8, 3)).save(file, "PNG")
    source = open_source(str(tmp_path))
    assert len(read(source, 8)[0]) == 1
    assert json.dumps(source.class_names).isascii() and source.class_names[0].isprintable()
    source.class_names[0].encode("utf-8")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    refuses(tmp_path, f"{tmp_path} cannot be read: Permission denied")


def test_paths_come_from_stdin_in_their_order(tmp_path, monkeypatch):
    images = noise(3, 8, 8, 3)
    files = [str(tmp_path / f"{name}.png") for name in "cab"]
    for file, pixels in zip(files, images):
        Image.fromarray(pixels).save(file)
    for separator in ("\n", "\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((separator.join(files) + separator).encode())))
        source = open_source("-")
        assert source.name == "paths"
        check(source, images, None, "all")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    refuses("-", "no paths came on stdin")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="nothing is piped in"):
        open_source("-")


# -------------------------------------------------------------------------------------------------------- parquet


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, images, labels=None, column="image", names=None, encode=png):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = {column: [{"bytes": encode(pixels), "path": "../x.png"} for pixels in images]}
    features = {column: {"_type": "Image"}}
    if labels is not None:
        content["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": names, "_type": "ClassLabel"}
    table = pa.table(content)
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=3)


def test_hugging_face_parquet(tmp_path):
    images, labels, names = noise(11, 8, 8, 3), np.arange(11) % 3, ["x", "y", "z"]
    for i, rows in enumerate((slice(0, 7), slice(7, 9))):
        write_parquet(tmp_path / f"data/train-{i:05}-of-00002.parquet", images[rows], labels[rows], names=names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[9:], labels[9:], names=names)
    (tmp_path / "README.md").write_text("---\n")
    assert open_source(str(tmp_path)).name == "parquet"
    check(open_source(str(tmp_path)), images[:9], labels[:9], "train", names)
    check(open_source(str(tmp_path), "test"), images[9:], labels[9:], "test", names)
    one = tmp_path / "data/test-00000-of-00001.parquet"
    check(open_source(str(one)), images[9:], labels[9:], "all", names)
    check(open_source(str(one), "test"), images[9:], labels[9:], "test", names)


def test_parquet_of_many_row_groups_is_opened_as_often_as_of_few(tmp_path):
    import pyarrow.parquet as pq

    def opened(count):
        write_parquet(tmp_path / f"{count}.parquet", noise(count, 8, 8, 3), np.arange(count))
        before = pages._row_groups.cache_info().misses
        with patch.object(pq, "ParquetFile", wraps=pq.ParquetFile) as files:
            read(open_source(str(tmp_path / f"{count}.parquet")), 8)
        return files.call_count, pages._row_groups.cache_info().misses - before

    assert opened(3) == opened(30)


def test_parquet_of_other_shapes(tmp_path):
    images = noise(5, 8, 8, 3)
    write_parquet(tmp_path / "default/train/0000.parquet", images, [-1] * 5, "img", names=["a"])  # labels held back
    check(open_source(str(tmp_path)), images, None, "train")
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [png(p) for p in images], "label": [0, 1, 2, 3, 4]}), file)
    check(open_source(str(file)), images, np.arange(5), "all")
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), file)
    refuses(file, "several columns of pictures: a, b")
    pq.write_table(pa.table({"a": [1]}), file)
    refuses(file, "no column of pictures: it has a")
    pq.write_table(pa.table({"image": [png(images[0]), None]}), file)
    refuses(file, r"x\.parquet, row 1: it is empty")
    pq.write_table(pa.table({"image": [png(images[0])] * 2, "label": pa.array([1, None])}), file)
    refuses(file, r"x\.parquet, row 1 has no label")
    file.write_bytes(file.read_bytes()[:-20])
    refuses(file, r"x\.parquet is damaged")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refuses(tmp_path / "x.parquet", "pyarrow is not installed", hint="pip install pyarrow")


# ----------------------------------------------------------------------------------------------------- WebDataset


def write_tar(file, members, mode="w"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(images, labels):
    for i, (pixels, label) in enumerate(zip(images, labels)):
        yield f"x/{i}.cls", str(label).encode()
        yield f"x/{i}.png", png(pixels)
        yield f"x/{i}.txt", b"a caption"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_shards(tmp_path, mode):
    images, labels = noise(9, 8, 8, 3), np.arange(9)
    write_tar(tmp_path / "set-train-2.tar", samples(images[:4], labels[:4]), mode)
    write_tar(tmp_path / "set-train-10.tar", samples(images[4:7], labels[4:7]), mode)
    write_tar(tmp_path / "set-val-1.tar", samples(images[7:], labels[7:]), mode)
    assert open_source(str(tmp_path)).name == "webdataset"
    check(open_source(str(tmp_path)), images[:7], labels[:7], "train")
    check(open_source(str(tmp_path), "val"), images[7:], labels[7:], "val")
    check(open_source(str(tmp_path / "set-val-1.tar")), images[7:], labels[7:], "all")
    write_tar(tmp_path / "other.tar", samples(images, labels))
    refuses(tmp_path, "set-train-2.tar names a split, other.tar does not")


def test_webdataset_labels_in_json_or_none(tmp_path):
    images = noise(2, 8, 8, 3)
    write_tar(tmp_path / "x.tar", [("a.json", b'{"label": 4}'), ("a.png", png(images[0]))])
    check(open_source(str(tmp_path / "x.tar")), images[:1], [4], "all")
    write_tar(tmp_path / "x.tar", [("a.jpg", png(images[0])), ("b.jpg", png(images[1]))])
    check(open_source(str(tmp_path / "x.tar")), images, None, "all")


def test_a_tar_never_touches_the_disk(tmp_path):
    images = noise(3, 8, 8, 3)
    file = tmp_path / "inner/x.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as tar:
        for name, pixels in zip(("../../a.png", "/etc/b.png", "c.png"), images):
            info = tarfile.TarInfo(name)
            info.size = len(png(pixels))
            tar.addfile(info, io.BytesIO(png(pixels)))
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    check(open_source(str(file)), images, None, "all")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["", "c/"])
def test_pictures_of_a_tar_that_are_links_are_told(tmp_path, folder):
    """tar packs a file of several names once, and then links to it."""
    (tmp_path / "c").mkdir()
    for name in ("a", "b", "d"):
        (tmp_path / "c" / f"{name}.cls").write_text("1")
    (tmp_path / "c" / "a.png").write_bytes(png(noise(1, 8, 8, 3)[0]))
    (tmp_path / "c" / "b.png").hardlink_to(tmp_path / "c" / "a.png")
    (tmp_path / "c" / "d.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted((tmp_path / "c").iterdir()):
            if not folder or path.suffix == ".png":
                tar.add(path, folder + path.name)
    source = open_source(str(tmp_path / "x.tar"))
    assert source.count == 1
    (told,) = (note for note in source.notes if "links" in note)
    assert f"2 pictures are links or no files, and passed over, such as {folder}b.png" in told
    assert "--hard-dereference" in told


def test_broken_tars_are_named(tmp_path):
    file = tmp_path / "x.tar"
    images = noise(4, 8, 8, 3)
    for members, match in (
        ([("a.png", png(images[0])), ("a.jpg", b"x")], "a.jpg is a second picture of sample a"),
        ([("a.png", png(images[0])), ("a.json", b'{"label": 1e99}')], "a.png holds no label"),
        ([("a.png", png(images[0])), ("a.cls", b"1"), ("b.png", png(images[1]))], "b.png has no label: 1 of 2"),
        ([("a.txt", b"x")], "holds no pictures"),
        ([("a.png", b"not a picture")], r"x\.tar: a\.png: it is no JPEG"),
    ):
        write_tar(file, members)
        refuses(file, match)
    huge = tarfile.TarInfo("a.png")
    huge.size = 10 << 30
    file.write_bytes(huge.tobuf() + bytes(4096))
    refuses(file, "is damaged")
    for mode in ("w", "w:gz"):
        write_tar(file, samples(images, range(4)), mode)
        whole = file.read_bytes()
        cuts = (1500, len(whole) // 2) if mode == "w:gz" else (1500, 1024 * 3, 512 * 11)  # 11: between two members
        for cut in (c for c in cuts if c < len(whole)):
            file.write_bytes(whole[:cut])
            refuses(file, r"x\.tar is damaged")


def test_a_member_may_not_be_larger_than_a_picture(tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", samples(noise(2, 8, 8, 3), [0, 1]))
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 70)
    refuses(tmp_path / "x.tar", r"x/0\.png declares \d+ bytes")


def test_items_of_file_sources_are_not_decoded_before_they_are_needed(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n bad")
    items = list(open_source(str(tmp_path)).read(0, None))
    assert [type(item) for item in items] == [ImageFile] * 3
