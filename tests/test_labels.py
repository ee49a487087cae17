"""Labels are found where they plainly are, texts become classes, gaps are counted; nothing vanishes in silence."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pictures import drawn, png, pngs, write_parquet, write_tar, write_zip

from pixseq import progress
from pixseq.artifacts.arrays import open_store
from pixseq.data import arrays
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, UsageError
from pixseq.stages import encode, palette


def labels(path, split="train", on_error="fail", **asked):
    """Which picture has which label (by its first pixel), and the class names."""
    source = open_source(str(path), split, on_error=on_error, **asked)
    batches = list(Reader(source, Preparation(size=8, on_error=on_error)))
    shown = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
    if not source.has_labels:
        return dict.fromkeys(shown), source.class_names
    return dict(zip(shown, np.concatenate([b.labels for b in batches]).tolist())), source.class_names


def refuses(path, match, **asked):
    with pytest.raises((PixseqError, UsageError), match=match) as caught:
        labels(path, **asked)
    return caught.value.hint or ""


@pytest.mark.parametrize(
    "column, values, numbers, names",
    [
        ("label", ["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        ("label", pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ["a", "b"]),
        ("label", ["big cat", "big cat ", " ant"], [1, 1, 0], ["ant", "big cat"]),  # blanks around are no difference
        ("className", ["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        ("label", ["10", "9", "0"], [10, 9, 0], None),  # numbers that are written as text stay numbers
        ("cls", [2, 0, 1], [2, 0, 1], None),
        ("class", [2.0, 0.0, 1.0], [2, 0, 1], None),
        ("Target", [True, False, True], [1, 0, 1], None),
        ("category", ["x", "y", "x"], [0, 1, 0], ["x", "y"]),
        ("species_id", pa.array([3, 1, 2], pa.uint8()), [3, 1, 2], None),
    ],
)
def test_parquet_columns_that_are_plainly_labels(tmp_path, column, values, numbers, names):
    write_parquet(tmp_path / "x.parquet", {"image": pngs(3), "width": [8, 8, 8], column: values})
    assert labels(tmp_path / "x.parquet") == (dict(enumerate(numbers)), names)
    assert open_source(str(tmp_path / "x.parquet")).labels_from == f"the column {column}"


def test_which_column_may_be_said_and_candidates_are_named(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, {"image": pngs(2), "breed": ["pug", "lab"], "fine_label": [4, 5], "coarse_label": [0, 1]})
    assert labels(file)[0] == {0: 4, 1: 5}
    assert labels(file, label_column="coarse_label")[0] == {0: 0, 1: 1}
    assert labels(file, label_column="breed") == ({0: 1, 1: 0}, ["lab", "pug"])
    assert labels(file, label_column="none") == ({0: None, 1: None}, None)
    assert "breed, fine_label, coarse_label" in refuses(file, "no labels in a column nope", label_column="nope")
    write_parquet(file, {"image": pngs(2), "breed": ["pug", "lab"], "path": ["a", "b"]})
    assert not open_source(str(file)).has_labels
    assert "could be: breed (--label-column NAME)" in open_source(str(file)).labels_from
    write_parquet(file, {"image": pngs(2), "label_a": [0, 1], "label_b": [1, 0]})
    assert "--label-column" in refuses(file, "several columns of labels: label_a, label_b")
    write_parquet(file, {"image": pngs(2), "label": [0.25, 1.0]})
    assert "--label-column none" in refuses(file, "0.25 is no class")
    write_parquet(file, {"image": pngs(2), "label": pa.array([1, 1 << 63], pa.uint64())})
    assert "--label-column none" in refuses(file, f"{1 << 63} is no class")


@pytest.mark.parametrize(
    "values",
    [[None, 1, 0, 1], [1.0, float("nan"), 0.0, 1.0], [1, 0, -1, 1], ["b", None, "a", "b"], ["b", " ", "a", "b"]],
)
def test_rows_without_a_label_are_counted_never_dropped_in_silence(tmp_path, values):
    write_parquet(tmp_path / "x.parquet", {"image": pngs(4), "label": values})
    hint = refuses(tmp_path / "x.parquet", r"row \d has no label: 1 of 4 rows of the column label are empty or -1")
    assert "--on-error skip" in hint and "--label-column none" in hint
    found, _ = labels(tmp_path / "x.parquet", on_error="skip")
    assert len(found) == 3 and set(found.values()) == {0, 1}
    assert "they are passed over" in open_source(str(tmp_path / "x.parquet"), on_error="skip").notes[0]
    write_parquet(tmp_path / "x.parquet", {"image": pngs(4), "label": pa.array([None] * 4, pa.int64())})
    assert open_source(str(tmp_path / "x.parquet")).labels_from == "all 4 rows of the column label are empty or -1"


def test_text_classes_are_numbered_over_all_splits(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": pngs(2), "label": ["cat", "eel"]})
    write_parquet(tmp_path / "test.parquet", {"image": pngs(2), "label": ["eel", "dog"]})
    assert labels(tmp_path) == ({0: 0, 1: 2}, ["cat", "dog", "eel"])
    assert labels(tmp_path, "test") == ({0: 2, 1: 1}, ["cat", "dog", "eel"])
    for split, names in (("train", ["cat", "eel"]), ("val", ["eel", "dog"])):
        members = [
            (f"{i}.{end}", data) for i in (0, 1) for end, data in (("png", pngs(2)[i]), ("cls", names[i].encode()))
        ]
        write_tar(tmp_path / f"shards/{split}-0.tar", members)
    assert labels(tmp_path / "shards", "val") == ({0: 2, 1: 1}, ["cat", "dog", "eel"])


def test_classes_of_tars_and_npz_are_numbered_over_all_splits(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog"])):
        members = [(f"{name}/{i}.png", data) for name in names for i, data in enumerate(pngs(2))]
        write_tar(tmp_path / f"tars/{split}.tar", members)
        (tmp_path / "npz").mkdir(exist_ok=True)
        np.savez(tmp_path / f"npz/{split}.npz", x=drawn(len(names)), y=names)
    assert labels(tmp_path / "tars", "test") == ({0: 1, 1: 1}, ["cat", "dog"])
    assert open_source(str(tmp_path / "tars"), "test").split == "test"
    assert labels(tmp_path / "npz", "test") == ({0: 1}, ["cat", "dog"])


def test_shards_with_labels_that_are_texts_are_each_opened_once(tmp_path, monkeypatch):
    for name in ("train_1", "train_2", "train_3", "test"):
        np.savez(tmp_path / f"{name}.npz", x=drawn(2), y=["cat", name])
    opened, members = [], arrays._members
    monkeypatch.setattr(arrays, "_members", lambda file: opened.append(file.stem) or members(file))
    assert open_source(str(tmp_path)).class_names == ["cat", "test", "train_1", "train_2", "train_3"]
    assert sorted(opened) == ["test", "train_1", "train_2", "train_3"]


def test_tars_of_class_folders_that_are_splits_by_their_names_alone(tmp_path):
    for split, names in (("seen", "ba"), ("unseen", "dc")):
        members = [(f"{name}/{i}.png", data) for name in names for i, data in enumerate(pngs(2))]
        write_tar(tmp_path / f"{split}-0-of-1.tar", members)
    for split, numbers in (("seen", [1, 1, 0, 0]), ("unseen", [3, 3, 2, 2])):
        source = open_source(str(tmp_path), split)
        assert (source.split, source.class_names) == (split, ["a", "b", "c", "d"])
        assert [file.label for file in source.read(0, None)] == numbers == source.labels().tolist()
        assert [file.name for file in source.files] == [f"{split}-0-of-1.tar"]


@pytest.mark.parametrize("write, ending", [(write_tar, "tar"), (write_zip, "zip")])
def test_a_file_that_is_named_after_a_split_is_read_as_that(tmp_path, write, ending):
    file = tmp_path / f"test.{ending}"
    write(file, [(f"{name}/0.png", png) for name, png in zip(("cat", "dog"), pngs(2))])
    assert labels(file, "test") == labels(file) == ({0: 0, 1: 1}, ["cat", "dog"])
    with pytest.raises(PixseqError, match="no splits, but split val was asked for"):
        open_source(str(file), "val")


def test_two_pictures_of_one_name_in_tars_of_folders(tmp_path):
    members = [("cat/0.png", pngs(1)[0]), ("dog/0.png", pngs(1)[0])]
    for name in ("a1", "a2"):
        write_tar(tmp_path / f"set/{name}.tar", members)
    assert "name one tar" in refuses(tmp_path / "set", r"cat/0.png is there twice, in a1.tar and in a2.tar")
    write_tar(tmp_path / "x.tar", [*members, members[0]])
    assert "unpack it" in refuses(tmp_path / "x.tar", "is there twice, in x.tar and in x.tar")


@pytest.mark.parametrize("top", ["", "photos/", "./photos/"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_class_folders_in_a_tar(tmp_path, top, mode):
    pictures = pngs(4)
    names = ["cat/x.1.png", "dog/x.png", "cat/x.2.png", "dog/._x.png"]
    write_tar(tmp_path / "x.tar", [(top + name, data) for name, data in zip(names, pictures)], mode)
    assert labels(tmp_path / "x.tar") == ({0: 0, 1: 1, 2: 0}, ["cat", "dog"])
    assert open_source(str(tmp_path / "x.tar")).labels_from == "the class folders"


def test_splits_and_plain_folders_in_a_tar(tmp_path):
    names = ["train/cat/0.png", "train/dog/0.png", "eval/cat/0.png", "eval/dog/0.png"]
    write_tar(tmp_path / "x.tar", zip(names, pngs(4)))
    assert labels(tmp_path / "x.tar") == ({0: 0, 1: 1}, ["cat", "dog"])
    assert labels(tmp_path / "x.tar", "eval") == ({2: 0, 3: 1}, ["cat", "dog"])
    write_tar(tmp_path / "x.tar", zip(["photos/0.png", "photos/1.png"], pngs(2)))
    assert labels(tmp_path / "x.tar")[0] == {0: None, 1: None}
    listed = [("CUB/train_test_split.txt", b"1 1"), ("CUB/images.txt", b"1 a"), ("CUB/images/a/0.png", pngs(1)[0])]
    write_tar(tmp_path / "x.tar", [*listed, ("CUB/images/b/0.png", pngs(1)[0])])
    assert "unpack it" in refuses(tmp_path / "x.tar", "x.tar holds CUB/images.txt")


def test_json_members_of_other_keys(tmp_path):
    members = []
    for i, data in enumerate(pngs(2)):
        members += [(f"{i}.png", data), (f"{i}.json", json.dumps({"target": i + 3, "breed": "ab"[1 - i]}).encode())]
    write_tar(tmp_path / "x.tar", members)
    assert labels(tmp_path / "x.tar")[0] == {0: 3, 1: 4}
    assert labels(tmp_path / "x.tar", label_column="breed") == ({0: 1, 1: 0}, ["a", "b"])
    assert "--label-column none" in refuses(tmp_path / "x.tar", "no label nonsense", label_column="nonsense")
    write_tar(tmp_path / "x.tar", [("0.png", pngs(1)[0]), ("0.json", b'{"Label": "cat", "width": 8}')])
    assert labels(tmp_path / "x.tar") == ({0: 0}, ["cat"])


def test_what_could_hold_labels_is_named(tmp_path):
    members = [("0.png", pngs(1)[0]), ("0.json", b'{"breed": "pug", "width": 8, "box": [1]}'), ("0.kind.txt", b"a")]
    write_tar(tmp_path / "x.tar", members)
    assert "could be: breed, kind.txt (--label-column NAME)" in open_source(str(tmp_path / "x.tar")).labels_from
    assert labels(tmp_path / "x.tar", label_column="kind.txt") == ({0: 0}, ["a"])
    np.savez(tmp_path / "x.npz", x=drawn(3), breed=[1, 2, 3], other=np.zeros((3, 4)), scale=1.0)
    assert "could be: breed (--label-column NAME)" in open_source(str(tmp_path / "x.npz")).labels_from
    (tmp_path / "set/train").mkdir(parents=True)
    (tmp_path / "set/train/0.png").write_bytes(pngs(1)[0])
    for table in ("set/labels.csv", "set/train/metadata.jsonl"):
        (tmp_path / table).write_text("0.png,cat")
    said = "there are no class folders, and those that labels.csv, metadata.jsonl may hold are not read"
    assert open_source(str(tmp_path / "set")).labels_from == said


def test_members_of_another_ending(tmp_path):
    members = []
    for i, data in enumerate(pngs(2)):
        members += [(f"{i}.png", data), (f"{i}.cls", b"%d" % i), (f"{i}.Species", b"ba"[i : i + 1])]
    write_tar(tmp_path / "x.tar", members)
    assert labels(tmp_path / "x.tar") == ({0: 0, 1: 1}, None)
    assert labels(tmp_path / "x.tar", label_column="species") == ({0: 1, 1: 0}, ["a", "b"])
    assert labels(tmp_path / "x.tar", label_column="none")[0] == {0: None, 1: None}
    refuses(tmp_path / "x.tar", "no label breed", label_column="breed")


@pytest.mark.parametrize("values", [np.array([1, 0, 1]), np.array([[1.0], [0.0], [1.0]]), np.array(["b", "a", "b"])])
def test_labels_npy_beside(tmp_path, values):
    names = ["a", "b"] if values.dtype.kind == "U" else None
    np.save(tmp_path / "images.npy", drawn(3))
    np.save(tmp_path / "labels.npy", values)
    (tmp_path / "._labels.npy").write_bytes(b"\0\5\x16\7")  # as macOS leaves it
    assert labels(tmp_path / "images.npy") == labels(tmp_path) == ({0: 1, 1: 0, 2: 1}, names)
    np.savez(tmp_path / "x.npz", images=drawn(3), targets=values)
    assert labels(tmp_path / "x.npz") == ({0: 1, 1: 0, 2: 1}, names)
    np.save(tmp_path / "labels.npy", np.arange(4))
    assert "--label-column none" in refuses(tmp_path / "images.npy", r"has 3 images, but .*labels\.npy is int64 \[4\]")


def test_npy_files_of_splits_and_names(tmp_path):
    for split, first in (("train", 0), ("test", 2)):
        np.save(tmp_path / f"x_{split}.npy", drawn(4)[first : first + 2])
        np.save(tmp_path / f"y_{split}.npy", np.array([first, first + 1]))
    assert labels(tmp_path)[0] == {0: 0, 1: 1} and labels(tmp_path, "test")[0] == {2: 2, 3: 3}
    assert labels(tmp_path / "x_test.npy")[0] == {2: 2, 3: 3}
    np.save(tmp_path / "mine.npy", drawn(2))
    assert labels(tmp_path / "mine.npy")[0] == {0: None, 1: None}
    np.save(tmp_path / "mine_labels.npy", np.array([5, 6]))
    assert labels(tmp_path / "mine.npy")[0] == {0: 5, 1: 6}
    np.savez(tmp_path / "x.npz", images=drawn(2), kinds=np.array([1, 0]))
    assert labels(tmp_path / "x.npz", label_column="kinds")[0] == {0: 1, 1: 0}


def test_a_source_without_columns_refuses_a_column():
    with pytest.raises(UsageError, match=r"digits .* has no columns"):
        open_source("digits", label_column="label")
    assert not open_source("digits", label_column="none").has_labels


def test_encode_says_in_one_line_what_labels_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_enabled", True)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/0.png").write_bytes(png(drawn(1)[0]))
    write_parquet(tmp_path / "texts.parquet", {"image": pngs(3), "label": ["a", "b", "a"]})
    write_parquet(tmp_path / "numbers.parquet", {"image": pngs(3), "label": [7, 0, 7]})
    for name, line, count in (
        ("flat", "no labels: there are no class folders", 0),
        ("texts.parquet", "labels: 2 classes (a, b), from the column label", 2),
        ("numbers.parquet", "labels: 2 classes, from the column label", 2),
    ):
        record = encode.run(str(tmp_path / name), tmp_path / f"{name}.zarr", scheme="gray", size=8)
        said = capsys.readouterr().err.splitlines()
        assert [text for text in said if "labels" in text] == [line]
        assert record["summary"]["classes"] == count
    record = encode.run(
        str(tmp_path / "texts.parquet"), tmp_path / "bare.zarr", scheme="gray", size=8, label_column="none"
    )
    assert open_store(tmp_path / "bare.zarr", "tokens").labels() is None and record["config"]["label_column"] == "none"
    palette.run_fit(str(tmp_path / "texts.parquet"), tmp_path / "p.json", colors=2, size=8, label_column="none")


def samples(*texts):
    """Members of a tar: pictures 0, 1 ... with these labels, None for none."""
    for i, (text, data) in enumerate(zip(texts, pngs(len(texts)))):
        yield f"{i}.png", data
        if text is not None:
            yield f"{i}.cls", text.encode()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_labels_of_a_tar_are_is_decided_by_all_of_them(tmp_path, mode):
    file = tmp_path / "x.tar"
    write_tar(file, samples("1", "dog", "1"), mode)  # the first alone would be a number
    assert labels(file) == ({0: 0, 1: 1, 2: 0}, ["1", "dog"])
    for texts, first in (((None, "3", "4"), 0), (("3", "", None, "4"), 1), (("3", "-1"), 1)):
        write_tar(file, samples(*texts), mode)
        none = sum(text in (None, "", "-1") for text in texts)
        hint = refuses(file, rf"{first}.png has no label: {none} of {len(texts)} pictures")
        assert "--on-error skip" in hint
        kept = {i: int(text) for i, text in enumerate(texts) if text not in (None, "", "-1")}
        assert labels(file, on_error="skip") == (kept, None)
        assert f"{none} of {len(texts)}" in str(open_source(str(file), on_error="skip").notes)
    source = open_source(str(file), on_error="skip")
    assert source.count == 2 and list(source.labels()) == [0, -1]
    write_tar(file, samples("3", "1.5"), mode)
    assert labels(file) == ({0: 1, 1: 0}, ["1.5", "3"])


@pytest.mark.parametrize(
    "values, numbers, names",
    [
        (["cat", "", "dog", "-1"], {0: 0, 2: 1}, ["cat", "dog"]),
        ([3, -1, 4, -1], {0: 3, 2: 4}, None),
        ([3.0, float("nan"), 4.0, -1.0], {0: 3, 2: 4}, None),
    ],
)
@pytest.mark.parametrize("size", [8, 12])
def test_labels_that_lack_in_arrays_are_counted(tmp_path, values, numbers, names, size):
    file = tmp_path / "x.npz"
    np.savez(file, images=drawn(4, size), labels=np.array(values))
    hint = refuses(file, r"image 1 has no label: 2 of 4 of labels are empty or -1")
    assert "--on-error skip" in hint and "--label-column none" in hint
    assert labels(file, on_error="skip") == (numbers, names)
    assert "2 of 4" in str(open_source(str(file), on_error="skip").notes)
    record = encode.run(str(file), tmp_path / "t.zarr", scheme="pixels", size=8, on_error="skip")
    assert record["summary"]["skipped"] == 2 and record["summary"]["images"] == 2
    np.savez(file, images=drawn(2), labels=np.array(["", "-1"]))
    bare = open_source(str(file))
    assert not bare.has_labels and bare.labels_from == "2 of 2 of labels are empty or -1"
    np.save(tmp_path / "cats.npy", drawn(3))
    np.save(tmp_path / "cats_labels.npy", np.array([1, 0, -1]))
    refuses(tmp_path / "cats.npy", "image 2 has no label: 1 of 3")
