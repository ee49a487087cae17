"""Palette ids in .npy files, as OpenAI published its data: what is taken for them, and what they become."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_tokens

from pixseq import progress
from pixseq.artifacts import layout
from pixseq.artifacts.arrays import open_store, verify
from pixseq.artifacts.palette import palette_id, save_palette
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import TokenSource, open_any, open_source
from pixseq.data.token_files import TokenReader
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.parts import choose_rows
from pixseq.stages import decode, encode, evaluate, features, palette, sample

COLORS = np.random.default_rng(0).uniform(-1, 1, (16, 3))
IDS = np.random.default_rng(1).integers(0, 16, (30, 64))
CLASSES = np.random.default_rng(2).integers(0, 10, 30)
ONE_HOT = np.eye(10, dtype=np.float32)[CLASSES]
WHOLE_TYPES = ["int16", "<i4", ">i4", "int64", "uint32", ">u8"]


def save_set(folder, name="cifar10", split="te", ids=IDS, labels=ONE_HOT):
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}_{split}X.npy"
    np.save(file, ids)
    if labels is not None:
        np.save(folder / f"{name}_{split}Y.npy", labels)
    return file


@pytest.fixture
def colors(tmp_path):
    save_palette(tmp_path / "p.json", COLORS, "palette fit", {}, {}, {})
    return tmp_path / "p.json"


def stored(source, tmp_path, name="t.zarr", **options):
    """The manifest and the store that encode makes of a source of 8x8 pictures."""
    record = encode.run(str(source), tmp_path / name, **{"size": 8, **options})
    return record, open_store(tmp_path / name, "tokens")


def heard(capsys, source, tmp_path, **options):
    progress.enable()
    try:
        stored(source, tmp_path, **options)
    finally:
        progress.enable(False)
    return capsys.readouterr().err


def refuses(source, match, hint="", split="train", n_vocab=16):
    with pytest.raises(PixseqError, match=match) as caught:
        list(TokenReader(open_any(str(source), split), n_vocab))
    assert hint in (caught.value.hint or "")


def pixels_in(file):
    assert not isinstance(open_any(str(file)), TokenSource)
    return np.concatenate([batch.images for batch in Reader(open_source(str(file)), Preparation(size=32))])


# ------------------------------------------------------------------------------------------------------ recognising


@pytest.mark.parametrize("dtype", ["uint8", "int8", "<u2", ">u2", *WHOLE_TYPES])
def test_ids_of_every_whole_type_become_tokens(tmp_path, colors, dtype):
    record, store = stored(save_set(tmp_path / "d", ids=IDS.astype(dtype)), tmp_path, palette=colors)
    assert store.dtype("tokens") == np.uint16
    np.testing.assert_array_equal(store.read("tokens"), IDS)
    np.testing.assert_array_equal(store.labels(), CLASSES)
    assert record["config"]["split"] == "test" and record["summary"]["rows"] == 30


@pytest.mark.parametrize("dtype", WHOLE_TYPES)
def test_whole_types_that_no_pixels_have_are_ids_under_any_name(tmp_path, colors, capsys, dtype):
    np.save(tmp_path / "ids.npy", IDS.astype(dtype))
    assert "read as palette ids, not as pixels" in heard(capsys, tmp_path / "ids.npy", tmp_path, palette=colors)
    store = open_store(tmp_path / "t.zarr", "tokens")
    np.testing.assert_array_equal(store.read("tokens"), IDS)
    assert store.labels() is None and store.manifest["config"]["split"] == "all"


def test_pixels_stay_pixels(tmp_path):
    grey = np.random.default_rng(3).integers(0, 256, (5, 1024), dtype=np.uint8)
    for name in ("x.npy", "teX.npy", "x_testX.npy", "x_tex.npy"):
        np.save(tmp_path / name, grey)
        np.testing.assert_array_equal(pixels_in(tmp_path / name)[..., 0], grey.reshape(5, 32, 32))
        np.save(tmp_path / name, grey.astype(np.uint16) * 257)
        np.testing.assert_array_equal(pixels_in(tmp_path / name)[..., 0], grey.reshape(5, 32, 32))
    np.save(tmp_path / "x_teX.npy", grey.reshape(5, 32, 32))  # named so, but no rows
    np.testing.assert_array_equal(pixels_in(tmp_path / "x_teX.npy")[..., 0], grey.reshape(5, 32, 32))


@pytest.mark.parametrize(
    "array", [IDS.astype(np.float32), IDS[:, :50], IDS[:, :1], IDS.astype(np.int8), IDS[0], IDS.reshape(30, 8, 8)]
)
def test_other_arrays_are_refused_as_before(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(PixseqError, match="but pixels are uint8"):
        open_any(str(tmp_path / "x.npy"))


def test_ids_are_no_pictures(tmp_path, colors, checkpoints):
    file = save_set(tmp_path / "d")
    calls = (
        lambda: palette.run_fit(str(file), tmp_path / "out"),
        lambda: palette.run_fit(str(tmp_path / "d"), tmp_path / "out", "test"),
        lambda: sample.run(checkpoints["ar"], tmp_path / "out", prompt=str(file), device="cpu"),
    )
    for call in calls:
        with pytest.raises(PixseqError, match=r"cifar10_teX\.npy holds int64 \[30, 64\]: palette ids") as caught:
            call()
        assert "pixseq encode" in caught.value.hint
    assert not (tmp_path / "out").exists()
    refuses(tmp_path / "d" / "cifar10_teY.npy", "holds the labels of a set", hint="cifar10_teX.npy")


# ----------------------------------------------------------------------------------------------------- splits, sets


def test_a_folder_is_one_set_with_splits(tmp_path, colors):
    folder = tmp_path / "d"
    for i, split in enumerate(("tr", "va", "te")):
        save_set(folder, "imagenet", split, IDS[i:], ONE_HOT[i:])
    shutil.copy(colors, folder / "palette.json")
    np.save(folder / "kmeans_centers.npy", COLORS)
    for i, split in enumerate(("train", "val", "test")):
        record, store = stored(folder, tmp_path, f"{split}.zarr", palette=colors, split=split)
        np.testing.assert_array_equal(store.read("tokens"), IDS[i:])
        assert record["config"]["split"] == split
    (folder / "imagenet_trX.npy").unlink()
    refuses(folder, "has the splits test, val, not train", hint="--split")


def test_two_sets_in_a_folder_must_be_told_apart(tmp_path):
    save_set(tmp_path / "d")
    save_set(tmp_path / "d", "imagenet")
    refuses(tmp_path / "d", "holds 2 sets of palette ids: cifar10, imagenet", hint="cifar10_teX.npy", split="test")
    source = open_any(str(tmp_path / "d" / "imagenet_teX.npy"), "test")
    assert source.has_labels and source.count == 30


def test_a_set_beside_pictures_is_not_guessed(tmp_path):
    save_set(tmp_path / "d")
    (tmp_path / "d" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refuses(tmp_path / "d", r"holds palette ids \(cifar10_teX\.npy\) and pictures", split="test")


def test_a_file_is_of_the_split_in_its_name(tmp_path):
    for letters, split in (("tr", "train"), ("va", "val"), ("te", "test")):
        file = save_set(tmp_path / "d", split=letters)
        for wanted in ("train", split):
            assert open_any(str(file), wanted).split == split
    refuses(tmp_path / "d" / "cifar10_trX.npy", "has the split train, not test", split="test")
    np.save(tmp_path / "ids.npy", IDS)
    refuses(tmp_path / "ids.npy", "has no splits, but split test was asked for", split="test")


# ---------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("labels", [ONE_HOT.astype(np.float64), ONE_HOT.astype(np.int8), ONE_HOT == 1])
def test_one_hot_labels_of_any_type(tmp_path, colors, labels):
    _, store = stored(save_set(tmp_path / "d", labels=labels), tmp_path, palette=colors)
    assert store.labels().dtype == np.int32
    np.testing.assert_array_equal(store.labels(), CLASSES)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32"])
def test_plain_labels_of_any_type(tmp_path, colors, dtype):
    for name, labels in (("a.zarr", CLASSES), ("b.zarr", CLASSES[:, None])):
        _, store = stored(save_set(tmp_path / "d", labels=labels.astype(dtype)), tmp_path, name, palette=colors)
        np.testing.assert_array_equal(store.labels(), CLASSES)


def test_without_labels_it_is_said(tmp_path, colors, capsys):
    file = save_set(tmp_path / "d", labels=None)
    assert "no labels: there is no cifar10_teY.npy" in heard(capsys, file, tmp_path, palette=colors)
    assert open_store(tmp_path / "t.zarr", "tokens").labels() is None


def altered(array, where, value):
    array = array.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    "labels, match",
    [
        (ONE_HOT[:29], r"cifar10_teX\.npy has 30 rows, but .*cifar10_teY\.npy is float32 \[29, 10\]"),
        (ONE_HOT[None], r"is float32 \[1, 30, 10\]"),
        (ONE_HOT[:, :0], r"is float32 \[30, 0\]"),
        (CLASSES.astype(str), r"is <U\d+ \[30\]"),
        (altered(ONE_HOT, 21, 0), r"cifar10_teY\.npy: row 21 is not one-hot"),
        (altered(ONE_HOT, 21, 1), "row 21 is not one-hot"),
        (altered(ONE_HOT, 21, np.nan), "row 21 is not one-hot"),
        (altered(ONE_HOT, slice(3, None), 0.1), "row 3 is not one-hot"),
        (2 * ONE_HOT, "row 0 is not one-hot"),
        (altered(CLASSES, 4, -1), "row 4 is not a class number"),
        (altered(CLASSES.astype(float), 4, 1.5), "row 4 is not a class number"),
        (altered(CLASSES, 4, 2**31), "row 4 is not a class number"),
    ],
)
def test_labels_that_are_not_clear_are_refused(tmp_path, labels, match):
    refuses(save_set(tmp_path / "d", labels=labels), match)


# ------------------------------------------------------------------------------------------------------- bad content


def test_pictures_of_another_size(tmp_path, colors):
    ids = np.zeros((3, 48 * 48), np.int64)
    with pytest.raises(PixseqError, match=r"cifar10_teX\.npy holds pictures of 48x48, but --size is 32") as caught:
        stored(save_set(tmp_path / "d", ids=ids, labels=None), tmp_path, size=32, palette=colors)
    assert caught.value.hint == "--size 48"
    refuses(save_set(tmp_path / "d", ids=IDS[:, :63]), "rows of 63 ids, which is no square picture")
    refuses(save_set(tmp_path / "d", ids=IDS[:0]), "is empty")


@pytest.mark.parametrize("value", [16, -1, 2**40])
def test_ids_outside_the_palette(tmp_path, colors, value):
    file = save_set(tmp_path / "d", ids=altered(altered(IDS, (17, 5), value), (20, 0), -3))
    with pytest.raises(PixseqError, match=rf"cifar10_teX\.npy: row 17 holds the id {value}, but .* 0 to 15"):
        stored(file, tmp_path, palette=colors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "p.json"]
    save_set(tmp_path / "d", ids=altered(IDS, (17, 5), 65535).astype(np.uint16))
    with pytest.raises(PixseqError, match="row 17 holds the id 65535, but ids go from 0 to 65534"):
        stored(file, tmp_path)


def test_a_header_of_negative_lengths_is_damage(tmp_path):
    file = save_set(tmp_path / "d", labels=None)
    file.write_bytes(file.read_bytes().replace(b"(30, 64), ", b"(-30,-64),"))
    refuses(file, r"cifar10_teX\.npy is damaged: it has the shape \[-30, -64\]")


def test_truncated_files_are_named(tmp_path):
    for part in "XY":
        for length in (0, 7, 90, 1000):
            save_set(tmp_path / "d")
            damaged = tmp_path / "d" / f"cifar10_te{part}.npy"
            damaged.write_bytes(damaged.read_bytes()[:length])
            refuses(tmp_path / "d" / "cifar10_teX.npy", f"cifar10_te{part}.npy is damaged")
            refuses(tmp_path / "d", f"cifar10_te{part}.npy is damaged", split="test")
    save_set(tmp_path / "d", split="tr")  # a split that is whole is read
    assert open_any(str(tmp_path / "d"), "train").count == 30


# ----------------------------------------------------------------------------------------------------------- encoding


def test_a_store_says_what_it_holds(tmp_path, colors):
    file = save_set(tmp_path / "d")
    record, store = stored(file, tmp_path, palette=colors, limit=20)
    assert store.meta == {
        "scheme": "palette",
        "height": 8,
        "width": 8,
        "n_vocab": 16,
        "palette": COLORS.tolist(),
        "palette_id": palette_id(COLORS),
        "class_names": None,
    }
    rows = choose_rows(30, 20, CLASSES)
    np.testing.assert_array_equal(store.read("tokens"), IDS[rows])
    np.testing.assert_array_equal(store.labels(), CLASSES[rows])
    config, summary = record["config"], record["summary"]
    assert config == {**config, "size": 8, "split": "test", "limit": 20, "scheme": "palette"}
    assert all(config[key] is None for key in ("resize", "filter", "background", "views", "on_error"))
    assert {"images": 20, "rows": 20, "tokens_per_row": 64, "mse": None, "psnr_db": None}.items() <= summary.items()
    assert summary["part"] == {"of": 30, "taken": 20, "how": "stratified"}
    assert record["inputs"].keys() == {"palette", "source", "labels"}
    assert record["inputs"]["source"]["path"] == str(file) and verify(tmp_path / "t.zarr") == []


def test_the_same_tokens_as_of_the_pictures(tmp_path, colors):
    pictures = stored("digits", tmp_path, "a.zarr", palette=colors, split="test")[1]
    file = save_set(tmp_path / "d", ids=pictures.read("tokens"), labels=np.eye(10)[pictures.labels()])
    record, store = stored(file, tmp_path, "b.zarr", palette=colors)
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(store.read(name), pictures.read(name))
    for key in ("rows", "distinct_tokens", "unigram_nats_per_token"):
        assert record["summary"][key] == pictures.manifest["summary"][key]
    decode.run(tmp_path / "b.zarr", tmp_path / "b.png")


def test_options_that_need_pictures_are_usage_errors(tmp_path, colors):
    file = save_set(tmp_path / "d")
    for options in (
        {"views": 2, "palette": colors},
        {"scheme": "rgb"},
        {"scheme": "gray"},
        {"resize": "squash", "palette": colors},
        {"on_error": "skip", "palette": colors},
        {"background": "black", "palette": colors},
    ):
        with pytest.raises(UsageError, match=r"needs pictures, but .*cifar10_teX\.npy holds palette ids"):
            stored(file, tmp_path, **options)
    assert not list(tmp_path.glob("t.zarr*"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_interrupted_anywhere_and_resumed_it_reaches_the_same_id(tmp_path, colors, monkeypatch, order):
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 7 * 64)  # chunks of 7 rows, batches of 4: they seldom end together
    monkeypatch.setattr(encode, "BATCH_BYTES", 4 * 8 * 8 * 3)
    file = save_set(tmp_path / "d", ids=np.asarray(IDS, order=order), labels=np.asarray(ONE_HOT, order=order))
    for name, options in (("a", {"palette": colors}), ("b", {"limit": 23})):
        whole, _ = stored(file, tmp_path, f"whole-{name}.zarr", **options)
        append, out, record, interruptions = StoreWriter.append, tmp_path / f"{name}.zarr", None, 0
        while record is None:
            done = []

            def interrupted(self, rows, state, done=done, append=append):
                append(self, rows, state)
                done.append(1)
                if len(done) == 3:  # two may fill no chunk, and nothing new is written
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(StoreWriter, "append", interrupted)
                try:
                    record, store = stored(file, tmp_path, out.name, resume=True, **options)
                except KeyboardInterrupt:
                    interruptions += 1
                    assert not out.exists() and layout.partial_path(out).exists()
        assert interruptions and record["id"] == whole["id"] and record["summary"] == whole["summary"]
        np.testing.assert_array_equal(store.read("tokens"), IDS[choose_rows(30, options.get("limit", 30), CLASSES)])


def test_labels_that_appear_between_two_runs_are_another_recipe(tmp_path, colors, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 7 * 64)
    file = save_set(tmp_path / "d", labels=None)
    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stored(file, tmp_path, palette=colors)
    save_set(tmp_path / "d")
    with pytest.raises(PixseqError, match=r"another recipe \(it differs in: labels\)"):
        stored(file, tmp_path, palette=colors, resume=True)


def test_blocks_are_read_as_they_are_needed(tmp_path, colors, monkeypatch):
    file = save_set(tmp_path / "d", ids=np.repeat(IDS, 100, axis=0), labels=np.repeat(CLASSES, 100))
    source = open_any(str(file))
    batches = list(TokenReader(source, 16, start=10, limit=2500, batch_size=1000))
    assert [len(batch.tokens) for batch in batches] == [1000, 1000, 500]
    assert [batch.stop for batch in batches] == [1010, 2010, 2510]
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), np.repeat(CLASSES, 100)[10:2510])


# ---------------------------------------------------------------------------------------------- without a palette


def test_without_a_palette_the_vocabulary_is_openais(tmp_path, capsys):
    file = save_set(tmp_path / "d")
    assert "pair only with models that were imported without one" in heard(capsys, file, tmp_path)
    store = open_store(tmp_path / "t.zarr", "tokens")
    assert (store.meta["scheme"], store.meta["n_vocab"]) == ("palette", 512)
    assert store.meta["palette"] is None and store.meta["palette_id"] is None
    save_set(tmp_path / "d", ids=altered(IDS, (3, 3), 600))
    record, store = stored(file, tmp_path, "u.zarr")
    assert store.meta["n_vocab"] == record["summary"]["n_vocab"] == 601 and "palette" not in record["inputs"]


def test_pictures_still_need_a_palette(tmp_path):
    with pytest.raises(UsageError, match="--scheme palette needs a --palette") as caught:
        stored("digits", tmp_path)
    assert "pixseq palette fit" in caught.value.hint and not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_told(tmp_path, checkpoints):
    ids = np.random.default_rng(4).integers(0, 16, (20, 36))
    stored(save_set(tmp_path / "d", ids=ids, labels=None), tmp_path, size=6)
    model = tmp_path / "m"
    shutil.copytree(checkpoints["ar"], model)
    codec = json.loads((model / "codec.json").read_text())
    (model / "codec.json").write_text(json.dumps({**codec, "palette": None, "palette_id": None}))
    calls = {
        "encode again with --palette": (
            lambda: decode.run(tmp_path / "t.zarr", tmp_path / "out"),
            lambda: features.run("pixels", tmp_path / "t.zarr", tmp_path / "out", device="cpu"),
        ),
        "import it again with --palette kmeans_centers.npy": (
            lambda: sample.run(model, tmp_path / "out", device="cpu"),
            lambda: sample.run(model, tmp_path / "out", prompt=str(tmp_path / "t.zarr"), device="cpu"),
            lambda: sample.run(model, tmp_path / "out", prompt="digits", device="cpu"),
        ),
    }
    for hint, group in calls.items():
        for call in group:
            with pytest.raises(PixseqError, match="has no palette: the colours of its tokens are not known") as caught:
                call()
            assert caught.value.hint == hint
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(PixseqError, match="has the palette sha256:one"):
        evaluate.run(checkpoints["ar"], tmp_path / "t.zarr", device="cpu")
    with pytest.raises(PixseqError, match=r"has a vocabulary of 16, .* one of 512"):
        evaluate.run(model, tmp_path / "t.zarr", device="cpu")
    unnamed = write_tokens(tmp_path / "u.zarr", palette=None, palette_id=None, count=20)
    assert evaluate.run(model, unnamed, device="cpu")["images"] == 20
