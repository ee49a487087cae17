"""Several views of an image: every split is by image, and the two parts of a source never share one."""

import io
import tarfile

import numpy as np
import pytest
from conftest import TINY, write_tokens
from PIL import Image

from pixseq.artifacts.arrays import open_store, verify
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.engine.opening import read_images, split_rows
from pixseq.engine.parts import check_disjoint
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.labelled import Labelled, held_out_split
from pixseq.numerics.linear_probe import Solver, low_data_probe, one_blas_thread
from pixseq.stages import encode, features, finetune, pretrain, probe

IMAGES, VIEWS, CLASSES = 400, 8, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 pictures that mean nothing, with labels that mean nothing, as 8 views each; their features; other ones."""
    root, rng = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    for name, count in (("train", IMAGES), ("test", 200)):
        shades = rng.integers(0, 256, (count, 3, 3)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
        np.savez(root / f"{name}.npz", images=shades, labels=rng.integers(0, CLASSES, count))
        views = VIEWS if name == "train" else 0
        encode.run(str(root / f"{name}.npz"), root / f"{name}.zarr", scheme="gray", size=4, views=views)
        features.run("pixels", root / f"{name}.zarr", root / f"{name}.features.zarr", device="cpu")
    return root


def test_a_row_knows_its_image_only_where_there_are_several(folder, tmp_path):
    store = open_store(folder / "train.zarr", "tokens")
    np.testing.assert_array_equal(store.images(), np.repeat(np.arange(IMAGES), VIEWS))
    made = open_store(folder / "train.features.zarr", "features")
    np.testing.assert_array_equal(made.images(), store.images())
    assert made.manifest["summary"]["images"] == IMAGES and made.manifest["summary"]["rows"] == IMAGES * VIEWS
    assert open_store(folder / "test.zarr", "tokens").images() is None
    encode.run(str(folder / "test.npz"), tmp_path / "one.zarr", scheme="gray", size=4, views=1)
    assert open_store(tmp_path / "one.zarr", "tokens").images() is None
    assert verify(folder / "train.zarr") == []


def test_no_image_lies_on_both_sides_of_a_split(folder):
    store = open_store(folder / "train.zarr", "tokens")
    shows = store.images()
    for seed in range(3):
        for fit, held in (
            split_rows(store, 0.1, seed),
            held_out_split(store.labels(), 0.1, seed, shows),
        ):
            assert not set(shows[fit]) & set(shows[held]) and len(fit) + len(held) == len(shows)
            assert len(held) % VIEWS == 0 and 30 <= len(held) // VIEWS <= 50
    _, images, held, _ = read_images(folder / "train.zarr", "tokens", None, 0.04, 0)
    assert images.count() == {"images": 384, "rows": 384 * VIEWS}
    assert held.count() == {"images": 16, "rows": 16 * VIEWS}
    assert not set(shows[images.chosen]) & set(shows[held.chosen])


def test_training_counts_images_and_holds_out_whole_ones(folder, tmp_path):
    tiny = [*TINY, "train.steps=2"]
    record = pretrain.run(
        folder / "train.zarr", tmp_path / "m", effective(PretrainFile, sets=tiny), val_fraction=0.1, device="cpu"
    )
    assert record["summary"]["images"] == 360 and record["summary"]["rows"] == 360 * VIEWS
    config = effective(FinetuneFile, sets=["finetune.steps=2", "finetune.batch_size=8"])
    record = finetune.run(tmp_path / "m", folder / "train.zarr", tmp_path / "f", config, device="cpu")
    assert record["summary"]["images"] == 360


@pytest.mark.parametrize("method", ["knn", "logistic"])
def test_labels_that_mean_nothing_are_not_read_from_other_views(folder, method):
    numbers = probe.run(folder / "train.features.zarr", folder / "test.features.zarr", method=method, c=[0.1])
    assert numbers["val_accuracy"] < 0.25 and numbers["test_accuracy"] < 0.25  # chance is 0.1
    assert (numbers["n_train"], numbers["train_views"], numbers["n_test"]) == (IMAGES, IMAGES * VIEWS, 200)
    assert "test_views" not in numbers


def test_the_attentive_probe_and_bert_split_by_image_too(tmp_path, checkpoints):
    rng = np.random.default_rng(1)
    shown = np.repeat(np.arange(60), 4)
    for name, seed in (("train", 0), ("test", 5)):
        tokens = rng.integers(0, 16, (60, 36))[shown]
        write_tokens(tmp_path / f"{name}.zarr", 240, seed=seed, tokens=tokens, images=shown, labels=shown % 4)
        for model, options in (("ar", {"pool": "none"}), ("bert", {"masks": 3})):
            out = tmp_path / f"{name}.{model}.zarr"
            features.run(checkpoints[model], tmp_path / f"{name}.zarr", out, device="cpu", **options)
    store = open_store(tmp_path / "train.bert.zarr", "features")
    np.testing.assert_array_equal(store.images(), np.repeat(shown, 3))
    for model, method in (("bert", "logistic"), ("ar", "attentive")):
        options = {"c": [0.1]} if method == "logistic" else {"lr": [1e-2], "epochs": 12, "batch_size": 32}
        paths = (tmp_path / f"{name}.{model}.zarr" for name in ("train", "test"))
        numbers = probe.run(*paths, method=method, layers=[2], **options)
        assert numbers["val_accuracy"] < 0.7 and numbers["n_train"] == 60  # chance is 0.25, leaked it is 1
        assert numbers["test_views"] == 240


def test_labels_per_class_count_images(folder):
    paths = folder / "train.features.zarr", folder / "test.features.zarr"
    store = open_store(paths[0], "features")
    fewest = np.bincount(store.labels()[::VIEWS]).min()
    with pytest.raises(PixseqError, match=f"has {fewest} images"):
        probe.run(*paths, labels_per_class=int(fewest) + 1, c=[0.1])
    taken = []

    class Seen(Labelled):
        def take(self, views):
            taken.append(self.shows[views])
            return super().take(views)

    X = store.read("features", 0)
    train = Seen(X, store.labels(), 1, store.images())
    test = Labelled(X[:50], store.labels()[:50])
    with one_blas_thread():
        low_data_probe(train, test, 4, 2, [0.1, 1.0], solver=Solver(max_iter=20))
    for shows in taken[:1]:
        assert len(np.unique(shows)) == 4 * CLASSES and len(shows) == 4 * CLASSES * VIEWS


def test_folds_keep_the_views_of_an_image_together(monkeypatch):
    rng, splits = np.random.default_rng(0), []
    shows = np.repeat(rng.permutation(40), 3)
    y = np.repeat(np.arange(4), 30)
    data = Labelled(rng.standard_normal((120, 5)).astype(np.float32), y, 1, shows)
    real = Labelled.take

    def take(self, views):
        part = real(self, views)
        if len(self.y) == 5 * 4 * 3:
            splits.append(part)
        return part

    monkeypatch.setattr(Labelled, "take", take)
    with one_blas_thread():
        low_data_probe(data, data, 5, 1, [0.1, 1.0], solver=Solver(max_iter=20))
    assert len(splits) == 10
    for fit, held in zip(splits[::2], splits[1::2]):
        assert not set(fit.shows) & set(held.shows) and fit.n_images + held.n_images == 20


# ---- the two parts of a source


def write_tar(path, count, labels):
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            data = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(data, "PNG")
            for name, content in ((f"{i:04}.png", data.getvalue()), (f"{i:04}.cls", str(labels[i]).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def parts_of(source, tmp_path, name="", **options):
    """Stores of the train part, with views, and of the val part."""
    made = []
    for part, views in (("train", 3), ("val", 0)):
        out = tmp_path / f"{name}{part}.zarr"
        encode.run(str(source), out, scheme="gray", size=4, views=views, val_fraction=0.1, part=part, **options)
        made.append(open_store(out, "tokens"))
    return made


@pytest.mark.parametrize("kind", ["folder", "flat", "tar", "npz"])
def test_the_two_parts_never_share_an_image_and_hold_all(tmp_path, kind):
    labels = np.repeat(np.arange(4), 20)
    if kind == "tar":
        write_tar(tmp_path / "s.tar", 80, labels)
        source = tmp_path / "s.tar"
    elif kind == "npz":
        source = tmp_path / "s.npz"
        images = np.arange(80, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
        np.savez(source, images=images, labels=labels)
    else:
        source = tmp_path / "s"
        for i in range(80):
            path = source / ("abcd"[labels[i]] if kind == "folder" else "") / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 8), i, np.uint8)).save(path)
    train, val = parts_of(source, tmp_path)
    shades = np.unique(train.read("tokens")), np.unique(val.read("tokens"))
    assert len(train) == 72 * 3 and len(val) == 8 and not set(shades[0]) & set(shades[1])
    assert set(shades[0]) | set(shades[1]) == set(range(80))
    np.testing.assert_array_equal(train.images(), train.read("tokens")[:, 0])  # the number in the source
    if kind != "flat":
        np.testing.assert_array_equal(np.bincount(val.labels()), [2, 2, 2, 2])
    record = val.manifest["summary"]["part"]
    how = "spread" if kind == "flat" else "stratified"
    assert record.pop("held_out") == train.manifest["summary"]["part"]["held_out"]
    assert record == {"of": 80, "taken": 8, "how": how, "part": "val", "val_fraction": 0.1, "seed": 0}
    _, other = parts_of(source, tmp_path, "other", seed=1)
    assert set(np.unique(other.read("tokens"))) != set(shades[1])
    some = encode.run(
        str(source), tmp_path / "l.zarr", scheme="gray", size=4, val_fraction=0.1, part="train", limit=12
    )["summary"]["part"]
    assert some["taken"] == 12
    assert set(open_store(tmp_path / "l.zarr", "tokens").read("tokens")[:, 0]) <= set(shades[0])


def test_pictures_of_one_digit_are_held_out_together_and_the_manifest_tells_their_recipe(tmp_path):
    """digits-placed shows each digit of its training part several times: never on both sides of a split."""
    stores = {}
    for part in ("train", "val", None):
        options = {"val_fraction": 0.1, "part": part} if part else {}
        encode.run("digits-placed", tmp_path / f"{part}.zarr", size=12, scheme="gray", **options)
        stores[part] = open_store(tmp_path / f"{part}.zarr", "tokens")
    shown = {part: store.images() for part, store in stores.items()}
    assert set(np.bincount(shown[None])) == {3} and len(shown[None]) == 4311
    assert len(shown["val"]) == 3 * len(set(shown["val"])) and len(set(shown["val"])) == pytest.approx(144, abs=1)
    assert not set(shown["train"]) & set(shown["val"])
    assert sorted([*shown["train"], *shown["val"]]) == sorted(shown[None])
    train, val = split_rows(stores[None], 0.1, 0)
    assert not set(shown[None][train]) & set(shown[None][val])
    source = stores[None].manifest["inputs"]["source"]
    assert source["recipe"] == {"canvas": 12, "placements": 3, "seed": 0}
    assert source["id"].startswith("digits-placed:4311:")


def test_parts_of_palette_ids(tmp_path):
    ids, classes = np.arange(60)[:, None].repeat(16, 1), np.arange(60) % 3
    np.save(tmp_path / "x_trX.npy", ids)
    np.save(tmp_path / "x_trY.npy", np.eye(3)[classes])
    made = []
    for part in ("train", "val"):
        encode.run(str(tmp_path / "x_trX.npy"), tmp_path / f"{part}.zarr", size=4, val_fraction=0.2, part=part)
        made.append(open_store(tmp_path / f"{part}.zarr", "tokens"))
    train, val = (store.read("tokens")[:, 0] for store in made)
    assert sorted([*train, *val]) == list(range(60)) and len(val) == 12
    np.testing.assert_array_equal(made[1].labels(), val % 3)
    np.testing.assert_array_equal(np.bincount(val % 3), [4, 4, 4])


def test_a_part_that_was_interrupted_goes_on_to_the_same_id(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 7 * 16)
    monkeypatch.setattr(encode, "BATCH_BYTES", 12 * 4 * 4 * 3)
    settings = {"scheme": "gray", "size": 4, "views": 3, "val_fraction": 0.1, "part": "train", "limit": 50}
    whole = encode.run(str(folder / "train.npz"), tmp_path / "whole.zarr", **settings)
    append = encode.Tally.plus
    for most in (3, 9, 1000):
        calls = []

        def plus(self, *given, most=most, calls=calls):
            calls.append(1)
            if len(calls) > most:
                raise KeyboardInterrupt
            return append(self, *given)

        monkeypatch.setattr(encode.Tally, "plus", plus)
        try:
            record = encode.run(str(folder / "train.npz"), tmp_path / "t.zarr", resume=True, **settings)
        except KeyboardInterrupt:
            continue
    assert record["id"] == whole["id"] and verify(tmp_path / "t.zarr") == []


def test_misuse_of_parts_is_named(folder, tmp_path):
    source = str(folder / "train.npz")
    for options in ({"part": "val"}, {"val_fraction": 0.1}, {"val_fraction": 1.0, "part": "val"}):
        with pytest.raises(UsageError):
            encode.run(source, tmp_path / "t.zarr", scheme="gray", **options)
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(PixseqError, match="1 image:"):
        encode.run(str(tmp_path / "one.npy"), tmp_path / "t.zarr", scheme="gray", val_fraction=0.1, part="val")


def test_stores_that_share_pictures_do_not_validate_or_test_each_other(folder, tmp_path):
    train, val = (store.path for store in parts_of(folder / "train.npz", tmp_path))
    _, other = parts_of(folder / "train.npz", tmp_path, "other", seed=1)
    config = effective(PretrainFile, sets=[*TINY, "train.steps=2"])
    record = pretrain.run(train, tmp_path / "m", config, val=val, device="cpu")
    assert record["summary"]["images"] == 360
    for wrong in (other.path, folder / "train.zarr", train):
        with pytest.raises(PixseqError, match=r"same (source|images)") as fault:
            pretrain.run(train, tmp_path / "n", config, val=wrong, device="cpu")
        assert "another split" in fault.value.hint
    made = []
    for name, store in (("a", train), ("b", val), ("c", other.path)):
        made.append(tmp_path / f"{name}.zarr")
        features.run("pixels", store, made[-1], device="cpu")
    assert probe.run(made[0], made[1], c=[0.1])["n_test"] == 40
    with pytest.raises(PixseqError, match="same source"):
        probe.run(made[0], made[2], c=[0.1])


def test_parts_that_were_drawn_with_other_labels_do_not_pass_as_one_split(folder, tmp_path):
    source = folder / "train.npz"
    (train, val), (bare, _) = parts_of(source, tmp_path), parts_of(source, tmp_path, "bare", label_column="none")
    named, _ = parts_of(source, tmp_path, "named", label_column="labels")
    check_disjoint(train, val, "why")
    check_disjoint(named, val, "why")  # other options, but the same pictures are held out
    with pytest.raises(PixseqError, match="same source that were drawn apart") as fault:
        check_disjoint(bare, val, "why")
    assert "both parts with the same options" in fault.value.hint
    made = []
    for store in (bare, val):
        made.append(store.path.with_suffix(".features"))
        features.run("pixels", store.path, made[-1], device="cpu")
    with pytest.raises(PixseqError, match="drawn apart"):
        probe.run(*made, c=[0.1])


def test_parts_of_a_source_that_changed_between_them_are_refused(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(source / f"{i:02}.png")
    train, val = parts_of(source, tmp_path)
    check_disjoint(train, val, "why")
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(source / "00a.png")
    _, later = parts_of(source, tmp_path, "later")
    with pytest.raises(PixseqError, match="changed between") as fault:
        check_disjoint(train, later, "why")
    assert "encode both again" in fault.value.hint
