"""Splits are never taken for classes: what folders hold decides, then their names, and doubt is an error."""

import os

import numpy as np
import pytest
from PIL import Image

from pixseq.data.sources import open_source
from pixseq.data.split_names import split_word
from pixseq.data.tree import DiskTree
from pixseq.errors import PixseqError

DOT = Image.fromarray(np.zeros((2, 2, 3), np.uint8))


def tree(root, *folders, each=2):
    """`each` pictures in every folder; a name with a suffix is a single picture, one that ends in .txt a text."""
    for name in folders:
        file = root / name
        if file.suffix == ".txt":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("x")
            continue
        for picture in [file] if file.suffix in (".png", ".jpg", ".JPEG") else [file / f"{i}.png" for i in range(each)]:
            picture.parent.mkdir(parents=True, exist_ok=True)
            DOT.save(picture, "PNG" if picture.suffix != ".JPEG" else "JPEG")


def read(path, split="train"):
    """split, class names, {file below path: label}."""
    source = open_source(str(path), split)
    found = {os.path.relpath(item.name, path): item.label for item in source.read(0, None)}
    return source.split, source.class_names, found


def notes(path, split="train"):
    return "\n".join(open_source(str(path), split).notes)


@pytest.mark.parametrize(
    "folders, split, recorded",
    [
        (("train", "dev"), "train", "train"),
        (("train", "dev"), "dev", "dev"),
        (("train", "eval"), "train", "train"),
        (("train", "holdout"), "holdout", "holdout"),
        (("train", "hold-out"), "train", "train"),
        (("training_set", "test_set"), "train", "train"),
        (("training_set", "test_set"), "test_set", "test"),
        (("TrainSet", "TestSet"), "test", "test"),
        (("train2017", "val2017", "test2017"), "val", "val"),
        (("2019", "2020"), "2020", "2020"),
        (("fold1", "fold2", "fold3"), "fold2", "fold2"),
        (("train", "unseen-cities"), "train", "train"),  # whatever it is called: it holds the same folders
        (("seen", "unseen"), "seen", "seen"),
        (("imagenet_train", "imagenet_val"), "train", "train"),
        (("Final_Training", "Final_Test"), "test", "test"),
    ],
)
def test_folders_that_hold_the_same_classes_are_splits(tmp_path, folders, split, recorded):
    tree(tmp_path, *(f"{folder}/{name}" for folder in folders for name in ("cat", "dog")))
    chosen = next(name for name in folders if split in (name, split_word(name, folders)))
    found = {f"{chosen}/{name}/{i}.png": label for label, name in enumerate(("cat", "dog")) for i in range(2)}
    assert read(tmp_path, split) == (recorded, ["cat", "dog"], found)


def test_no_split_of_that_name_lists_what_there_is(tmp_path):
    tree(tmp_path, "2019/cat", "2019/dog", "2020/cat", "2020/dog")
    with pytest.raises(PixseqError, match="has the splits 2019, 2020, not train") as caught:
        open_source(str(tmp_path))
    assert "--split" in caught.value.hint
    tree(tmp_path / "coco", "train2014/cat", "train2017/cat")
    with pytest.raises(PixseqError, match="more than one train: train2014, train2017"):
        open_source(str(tmp_path / "coco"))
    assert read(tmp_path / "coco", "train2014")[0] == "train2014"


def test_flat_folders_called_like_splits_are_splits_without_labels(tmp_path):
    tree(tmp_path, "train", "dev")
    assert read(tmp_path) == ("train", None, {"train/0.png": None, "train/1.png": None})
    tree(tmp_path / "kaggle", "train/cat", "train/dog", "test1")
    assert read(tmp_path / "kaggle")[1] == ["cat", "dog"]
    assert read(tmp_path / "kaggle", "test") == ("test", None, {"test1/0.png": None, "test1/1.png": None})
    assert "no class folders, unlike another split" in notes(tmp_path / "kaggle", "test")
    tree(tmp_path / "wrapped", "train/cat", "train/dog", "test/unknown")
    assert read(tmp_path / "wrapped")[1] == ["cat", "dog"]
    assert read(tmp_path / "wrapped", "test")[1] is None
    assert "unknown is no class of the other splits" in notes(tmp_path / "wrapped")


def test_classes_stay_classes(tmp_path):
    tree(tmp_path / "vehicles", "train", "car", "bus")
    assert read(tmp_path / "vehicles")[1] == ["bus", "car", "train"]
    tree(tmp_path / "lab", "test_tube", "train_station")
    assert read(tmp_path / "lab")[1] == ["test_tube", "train_station"]
    tree(tmp_path / "checked", "valid", "invalid")
    assert read(tmp_path / "checked")[1] == ["invalid", "valid"]
    tree(tmp_path / "kinds", "animals/cat", "animals/other", "vehicles/car", "vehicles/other", "vehicles/bus")
    assert read(tmp_path / "kinds")[1] == ["animals", "vehicles"]
    tree(tmp_path / "nested", "cat/images", "dog/images", "dog/more")
    assert read(tmp_path / "nested")[1] == ["cat", "dog"]
    tree(tmp_path / "one", "train/face", "dev/face")
    assert read(tmp_path / "one") == ("train", ["face"], {"train/face/0.png": 0, "train/face/1.png": 0})
    tree(tmp_path / "inside", "train/test", "train/other", "dev/test", "dev/other")
    assert read(tmp_path / "inside")[1] == ["other", "test"]


def test_splits_inside_class_folders_are_kept_apart(tmp_path):
    tree(tmp_path, "cat/train", "cat/test", "dog/train", "dog/test", each=1)
    assert read(tmp_path) == ("train", ["cat", "dog"], {"cat/train/0.png": 0, "dog/train/0.png": 1})
    assert read(tmp_path, "test")[2] == {"cat/test/0.png": 0, "dog/test/0.png": 1}


@pytest.mark.parametrize(
    "folders, said",
    [
        (("train/cat", "train/dog", "pool"), r"train \(cat, dog\), |pool \(pictures\)"),
        (("train", "test", "car"), r"splits \(test, train\) and other pictures \(car\)"),
        (("seen/cat", "seen/dog", "unseen/cat", "unseen/dog", "misc"), "may be splits or classes"),
        (("all/cat", "all/dog", "few/cat"), r"may be splits or classes: all \(cat, dog\), few \(cat\)"),
        (("images", "masks"), "no classes by their names"),
        (("covid/images", "covid/masks", "normal/images", "normal/masks"), "no classes by their names"),
        (("training_set", "mine"), r"splits \(training_set\) and other pictures \(mine\)"),
        (
            ("fold_1/train/cat", "fold_1/test/cat", "fold_2/train/cat", "fold_2/test/cat"),
            r"own: fold_1 \(test, train\)",
        ),
        (("sets/train/cat", "sets/test/cat", "more"), r"splits of their own: more \(pictures\), sets \(test, train\)"),
        (("train/known/cat", "train/known/dog", "train/new/cat", "test/cat", "test/dog"), r"known \(cat, dog\), new"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_lists_what_was_found(tmp_path, folders, said):
    tree(tmp_path, *folders)
    with pytest.raises(PixseqError, match=said) as caught:
        open_source(str(tmp_path))
    assert "--split" in caught.value.hint or f"name the folder that you mean, such as {tmp_path}" in caught.value.hint


def test_lopsided_classes_are_said(tmp_path):
    tree(tmp_path, "train/cat", "train/dog", "dev/cat", "dev/dog", "dev/bird")
    assert read(tmp_path)[1] == ["bird", "cat", "dog"] and min(read(tmp_path)[2].values()) == 1
    assert "class 0 is empty" in notes(tmp_path) and "in one split only: bird (dev)" in notes(tmp_path)
    (tmp_path / "set/b").mkdir(parents=True)
    (tmp_path / "set/c").mkdir()
    tree(tmp_path / "set", "a")
    assert read(tmp_path / "set")[1] == ["a", "b", "c"]
    assert "only one of 3 classes has pictures" in notes(tmp_path / "set")


def test_folders_without_pictures_are_no_classes(tmp_path):
    tree(tmp_path / "yolo", "images", "labels/1.txt")
    assert read(tmp_path / "yolo") == ("all", None, {"images/0.png": None, "images/1.png": None})
    tree(tmp_path / "textures", "images/wood", "images/stone", "labels/a.txt", "meta/b.txt")
    assert read(tmp_path / "textures")[1] == ["stone", "wood"]
    assert "only images holds pictures, not labels, meta" in notes(tmp_path / "textures")
    tree(tmp_path / "coco", "images/train2017", "images/val2017", "annotations/a.txt")
    assert read(tmp_path / "coco", "val")[2] == {"images/val2017/0.png": None, "images/val2017/1.png": None}
    tree(tmp_path / "beside", "cat", "dog", "notes/a.txt")
    assert read(tmp_path / "beside")[1] == ["cat", "dog"] and "notes holds no pictures: no class" in notes(
        tmp_path / "beside"
    )
    tree(tmp_path / "videos", "cat", "dog/a.txt")
    assert "only one of 2 folders, cat, has pictures" in notes(tmp_path / "videos")
    tree(tmp_path / "flat", "1.png", "notes/a.txt")
    assert read(tmp_path / "flat")[1] is None


# ----------------------------------------------------------------------------------------------- sets that are known


def test_tiny_imagenet(tmp_path):
    tree(tmp_path, "train/n02/images", "train/n01/images", "val/images", "test/images")
    (tmp_path / "train/n01/n01_boxes.txt").write_text("x")
    (tmp_path / "val/val_annotations.txt").write_text("0.png\tn02\t0\t0\t1\t1\n1.png\tn01\t0\t0\t1\t1\n")
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    assert read(tmp_path)[1:] == (
        ["n01", "n02"],
        {f"train/n0{i}/images/{j}.png": i - 1 for i in (1, 2) for j in (0, 1)},
    )
    assert read(tmp_path, "val") == ("val", ["n01", "n02"], {"val/images/1.png": 0, "val/images/0.png": 1})
    assert read(tmp_path, "test")[1] is None
    (tmp_path / "val/val_annotations.txt").write_text("0.png n02\n1.png n01\n")
    with pytest.raises(PixseqError, match=r"names 0\.png n02 without its class"):
        open_source(str(tmp_path), "val")
    (tmp_path / "val/val_annotations.txt").write_text("0.png\tn02\n1.png\tn01\n")
    (tmp_path / "val/images/1.png").unlink()
    with pytest.raises(PixseqError, match=r"lacks 1 pictures that the set's list names, such as 1\.png"):
        open_source(str(tmp_path), "val")


def test_tiny_imagenet_whose_val_was_sorted_into_class_folders(tmp_path):
    tree(tmp_path, "train/n01", "train/n02", "val/n01", "val/n02", "val/val_annotations.txt")
    assert list(read(tmp_path, "val")[2].values()) == [0, 0, 1, 1]


def test_ilsvrc_with_its_flat_val(tmp_path):
    place = "ILSVRC/Data/CLS-LOC"
    tree(tmp_path, f"{place}/train/n01", f"{place}/train/n02", "ILSVRC/ImageSets/CLS-LOC/a.txt")
    tree(tmp_path, *(f"{place}/val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)))
    for root in (tmp_path, tmp_path / place):
        assert read(root)[1] == ["n01", "n02"]
        assert read(root, "val")[1] is None and "LOC_val_solution.csv" in notes(root, "val")
    rows = "ImageId,PredictionString\nILSVRC2012_val_00000002,n01 1 2 3 4 \nILSVRC2012_val_00000001,n02 1 2 3 4 \n,\n"
    (tmp_path / "LOC_val_solution.csv").write_text(rows)
    for root in (tmp_path, tmp_path / place):
        assert list(read(root, "val")[2].values()) == [0, 1] and read(root, "val")[1] == ["n01", "n02"]


def test_cub_and_food_follow_their_own_lists(tmp_path):
    cub, food = tmp_path / "CUB", tmp_path / "food-101"
    tree(cub, "images/001.Auk", "images/002.Jay", "segmentations/001.Auk", "segmentations/002.Jay", "parts/parts.txt")
    files = ["001.Auk/0.png", "001.Auk/1.png", "002.Jay/0.png", "002.Jay/1.png"]
    (cub / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(files, start=1)))
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n4 1\n")
    assert read(tmp_path / "CUB") == (
        "train",
        ["001.Auk", "002.Jay"],
        {"images/001.Auk/0.png": 0, "images/002.Jay/1.png": 1},
    )
    assert read(cub, "test")[2] == {"images/001.Auk/1.png": 0, "images/002.Jay/0.png": 1}
    tree(food, "images/pie/1.jpg", "images/pie/2.jpg", "images/rice/3.jpg", "images/rice/4.jpg")
    (food / "meta").mkdir()
    (food / "meta/train.txt").write_text("pie/1\nrice/3\n")
    (food / "meta/test.txt").write_text("pie/2\nrice/4\n")
    assert read(food, "test")[2] == {"images/pie/2.jpg": 0, "images/rice/4.jpg": 1}


def test_lists_that_do_not_fit_their_set_or_stand_in_a_folder_beside_others(tmp_path):
    cub = tmp_path / "CUB"
    tree(tmp_path, "CUB/images/001.Auk", "masks/001.Auk")
    (cub / "images.txt").write_text("1 001.Auk/0.png\n2 001.Auk/1.png\n")
    for flags, said in (("1 1\n2 2\n", "holds 2, but"), ("1 1\n", "names 2 pictures, train_test_split.txt 1 of them")):
        (cub / "train_test_split.txt").write_text(flags)
        with pytest.raises(PixseqError, match=said):
            open_source(str(cub))
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n")
    with pytest.raises(PixseqError, match="sets with splits of their own: CUB") as caught:
        open_source(str(tmp_path))
    assert f"such as {cub}" in caught.value.hint


# ---------------------------------------------------------------------------------------- what systems leave behind

DEBRIS = [
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    ".thumbnails/0.png",
    "._0.png",
    "__MACOSX/._0.png",
    "#recycle/0.png",
    "lost+found/0.png",
    "$RECYCLE.BIN/0.png",
    ".@__thumb/0.png",
    "Thumbs/0.png",
    ".ipynb_checkpoints/0.png",
    "thumbnails/0.png",
    "@Recycle/0.png",
]


def test_what_a_folder_passes_over_counts_where_it_is_read(tmp_path):
    """Whether it was looked into before or not."""
    tree(tmp_path, "a/cat", "a/cat/.x.png")
    earlier = DiskTree()
    earlier.listing(str(tmp_path / "a/cat"))
    for read_on in (DiskTree(), DiskTree(earlier.listings)):
        assert read_on.folders(str(tmp_path / "a")) == ["cat"] and not read_on.debris
        assert len(list(read_on.walk(str(tmp_path / "a"), [], []))) == len(read_on.debris) == 1


def test_hidden_names_thumbnails_and_debris_are_passed_over_and_counted(tmp_path):
    flat, classes = tmp_path / "flat", tmp_path / "classes"
    tree(flat, "0.png", *DEBRIS)
    tree(classes, "cat", "dog", *DEBRIS, *(f"cat/{name}" for name in DEBRIS))
    assert read(flat) == ("all", None, {"0.png": None})
    assert f"passed over {len(DEBRIS)} names" in notes(flat) and "such as" in notes(flat)
    assert read(classes)[1] == ["cat", "dog"] and len(read(classes)[2]) == 4
    assert f"passed over {2 * len(DEBRIS)} names" in notes(classes)
    tree(tmp_path / ".hidden/thumbnails", "0.png")  # the folder that is named is read whatever it is called
    assert len(read(tmp_path / ".hidden/thumbnails")[2]) == 1
    tree(tmp_path / "hands", "thumb", "@home", "#1")
    assert read(tmp_path / "hands")[1] == ["#1", "@home", "thumb"]


def test_splits_as_they_are_packed_twice_and_more_beside_them(tmp_path):
    folders = [f"seg_{split}/seg_{split}/{name}" for split in ("train", "test") for name in ("sea", "forest")]
    tree(tmp_path / "intel", *folders, "seg_pred/seg_pred", each=1)
    found = {"seg_train/seg_train/forest/0.png": 0, "seg_train/seg_train/sea/0.png": 1}
    assert read(tmp_path / "intel") == ("train", ["forest", "sea"], found)
    assert "other folders hold pictures: seg_pred" in notes(tmp_path / "intel")
    assert read(tmp_path / "intel", "seg_pred")[2] == {"seg_pred/seg_pred/0.png": None}
    again = [f"chest/{split}/{name}" for split in ("train", "test") for name in ("ill", "well")]
    tree(tmp_path / "chests", *again, *(f"chest/{folder}" for folder in again), each=1)
    assert read(tmp_path / "chests")[1] == ["ill", "well"]
    assert "passed over chest, which holds splits of its own" in notes(tmp_path / "chests")
    tree(tmp_path / "faces", "aligned/aligned", "parts.txt")
    assert read(tmp_path / "faces")[1] is None
    tree(tmp_path / "cats", "train/train", "test/test", each=1)
    assert read(tmp_path / "cats") == ("train", None, {"train/train/0.png": None})
    tree(
        tmp_path / "versions", *(f"v{i}/{split}/{name}" for i in (1, 2) for split in ("train", "test") for name in "ab")
    )
    with pytest.raises(PixseqError, match=r"sets with splits of their own: v1 \(test, train\), v2"):
        open_source(str(tmp_path / "versions"))


def test_folders_inside_classes_are_said_not_to_be_classes(tmp_path):
    inner = ("animals/cat", "animals/dog", "vehicles/car", "vehicles/van/big", "vehicles/van/small")
    tree(tmp_path / "set", *inner, "plants")
    assert open_source(str(tmp_path / "set")).class_names == ["animals", "plants", "vehicles"]
    said = notes(tmp_path / "set")
    assert "3 classes (animals, plants, vehicles)" in said and all(name in said for name in inner)
    tree(tmp_path / "two" / "train", *inner)
    tree(tmp_path / "two" / "test", *inner)
    assert "animals/dog" in notes(tmp_path / "two", "test")
    tree(tmp_path / "flat", "cat/images", "dog/images", "cow")  # one folder inside loses nothing
    assert "told apart" not in notes(tmp_path / "flat")
