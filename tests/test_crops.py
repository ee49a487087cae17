"""Models see squares of larger pictures: random parts of them in training, the published centre everywhere else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import AIM, write_pixels
from PIL import Image

from pixseq.artifacts.arrays import open_store, verify
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.config import PretrainFile, TrainConfig, effective, read_preset
from pixseq.data.pictures import Pictures, centres, cropped, joined, resized_side
from pixseq.engine.augment import augment_pixels, crop_boxes, drawn_boxes
from pixseq.engine.image_store import image_batches, open_images, read_all
from pixseq.engine.images import Images
from pixseq.engine.training import Limits
from pixseq.errors import Interrupted, PixseqError, UsageError
from pixseq.stages import check, encode, evaluate, features, finetune, pretrain

SIDE = 8
SIZES = [(13, 10), (10, 22), (16, 16), (9, 40), (8, 8), (11, 6)]  # widths and heights; the last is smaller than SIDE


def smooth(size, rng):
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Class folders of pictures of many sizes, and of 16x16 pictures."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for name, sizes in (("mixed", SIZES * 6), ("squares", [(16, 16)] * 24)):
        for i, size in enumerate(sizes):
            path = folder / name / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            smooth(size, rng).save(path)
    return folder


@pytest.fixture(scope="module")
def stores(sources, tmp_path_factory):
    """{"whole": pictures of many sizes, "squares": 16x16}, both larger than a model of SIDE."""
    folder = tmp_path_factory.mktemp("stores")
    encode.run(str(sources / "mixed"), folder / "whole", size=12, scheme="pixels", resize="whole", filter="bicubic")
    encode.run(str(sources / "squares"), folder / "squares", size=16, scheme="pixels")
    return {"whole": folder / "whole", "squares": folder / "squares"}


def recipe(*sets):
    crops = ("train.augment=resized-crop-jitter", f"model.image_size={SIDE}")
    return effective(PretrainFile, sets=[*AIM, *crops, *sets])


@pytest.fixture(scope="module")
def models(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, path in stores.items():
        pretrain.run(path, folder / name, recipe(), val_fraction=0.2, device="cpu", precision="fp32")
    return {name: folder / name for name in stores}


def pictures_of(path):
    """The pictures of a store, one by one."""
    store = open_store(path, "pixels")
    if not store.whole:
        return list(store.read("pixels"))
    pixels, shapes = store.read("pixels"), store.read("shapes")
    return [part.reshape(*shape, 3) for part, shape in zip(np.split(pixels, shapes.prod(1).cumsum()[:-1]), shapes)]


def published(picture, side):
    """Resize(ceil(side / 0.875), bicubic) and CenterCrop(side) of torchvision on a Pillow picture, as documented."""
    image, short = Image.fromarray(picture), -(-side * 8 // 7)
    (width, height), longer = image.size, max(image.size)
    if min(image.size) != short:
        new = int(short * longer / min(image.size))
        image = image.resize((short, new) if width <= height else (new, short), Image.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


# ---- pictures


def test_the_centre_is_the_published_one():
    assert resized_side(224) == 256 and resized_side(64) == 74 and resized_side(336) == 384
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in [*SIZES, (37, 37), (38, 64), (64, 39)]]
    for side in (8, 32):
        ours = centres(pictures, side)
        assert ours.shape == (len(pictures), side, side, 3) and ours.dtype == np.uint8
        assert all(np.array_equal(mine, published(picture, side)) for mine, picture in zip(ours, pictures))


def test_crops_are_resized_as_by_pillow_down_and_up():
    rng = np.random.default_rng(2)
    pictures = Pictures(*joined(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES * 5))
    height, width = np.array([picture.shape[:2] for picture in pictures]).T
    boxes = drawn_boxes(0, 3, height, width, 0.4)
    for ours, picture, (left, top, w, h) in zip(cropped(pictures, boxes, SIDE), pictures, boxes.T.tolist()):
        box = (left, top, left + w, top + h)
        assert 0 <= left < box[2] <= picture.shape[1] and 0 <= top < box[3] <= picture.shape[0]
        assert np.array_equal(ours, Image.fromarray(picture).resize((SIDE, SIDE), Image.BICUBIC, box))


def test_boxes_in_pictures_of_many_sizes_are_those_of_each_size():
    heights, widths = np.array([64, 8, 20, 64] * 50), np.array([8, 64, 32, 64] * 50)
    boxes = crop_boxes(np.random.default_rng(0), 200, heights, widths, 0.4)
    for i in range(4):
        alone = crop_boxes(np.random.default_rng(0), 200, int(heights[i]), int(widths[i]), 0.4)
        assert np.array_equal(boxes[:, i::4], alone[:, i::4])


# ---- stores


def test_every_reader_sees_the_same_centres_whatever_the_batch(stores):
    codec = Codec("pixels", SIDE, SIDE, None)
    for path in stores.values():
        store, pictures = open_images(path, "pixels"), pictures_of(path)
        expected = np.stack([published(picture, SIDE) for picture in pictures])
        held = Images(read_all(store), store.labels(), (SIDE, SIDE, 3))
        assert np.array_equal(held.batch(range(len(store)))[0], expected)
        for batch in (1, 5, 64):
            seen = [images for _, images in image_batches(store, batch, codec=codec)]
            assert max(map(len, seen)) <= batch and np.array_equal(np.concatenate(seen), expected)


def test_pictures_of_the_models_size_are_seen_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    encode.run(str(tmp_path / "x.npy"), tmp_path / "whole", size=12, scheme="pixels", resize="whole")
    store = open_images(tmp_path / "whole", "pixels")
    held = Images(read_all(store), None, (SIDE, SIDE, 3))
    assert np.array_equal(held.batch(range(7))[0], images)
    config = TrainConfig(augment="resized-crop", seed=3)
    cut, _ = held.training_batch(np.arange(7), config, 5)
    assert torch.equal(cut, augment_pixels(torch.from_numpy(images), 0.4, True, None, 3, 5))


def test_training_cuts_from_all_of_the_stored_picture(stores):
    config = TrainConfig(augment="resized-crop", seed=3)
    for path in stores.values():
        store, pictures = open_images(path, "pixels"), pictures_of(path)
        held = Images(read_all(store), store.labels(), (SIDE, SIDE, 3)).subset(np.arange(1, len(store)))
        rows = np.array([5, 0, 5, 11, 20])
        images, labels = held.training_batch(rows, config, 7)
        chosen = [pictures[row + 1] for row in rows]
        height, width = np.array([picture.shape[:2] for picture in chosen]).T
        cut = cropped(chosen, drawn_boxes(3, 7, height, width, 0.4), SIDE)
        assert torch.equal(images, augment_pixels(torch.from_numpy(cut), 1.0, True, None, 3, 7))
        assert labels.tolist() == store.labels()[rows + 1].tolist()
        for other in (TrainConfig(augment="none"), TrainConfig(augment="resized-crop", crop_scale=1.0)):
            seen, centre = held.training_batch(rows, other, 7)[0], held.batch(rows)[0]
            assert ((seen == centre) | (seen == centre.flip(2))).flatten(1).all()


def test_detail_survives_in_what_is_trained_on(tmp_path):
    """Crops of a square of the model's side are enlarged and blurred, those of the picture itself are not."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    config = TrainConfig(augment="resized-crop", crop_scale=0.4)
    small = np.stack([np.asarray(Image.fromarray(x).resize((24, 24), Image.BICUBIC)) for x in images])

    def sharpness(batch):
        x = batch.numpy().astype(float).mean(-1)
        return np.square(
            4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:]
        ).mean()

    before, after, seen = (
        sharpness(x)
        for x in (
            Images(small, None, (24, 24, 3)).training_batch(np.arange(20), config, 0)[0],
            Images(images, None, (24, 24, 3)).training_batch(np.arange(20), config, 0)[0],
            Images(images, None, (24, 24, 3)).batch(np.arange(20))[0],
        )
    )
    assert before < 0.6 * seen < seen < 1.5 * after and after > 2 * before


# ---- stages


@pytest.mark.parametrize("name", ["whole", "squares"])
def test_a_model_smaller_than_its_pictures_goes_through_every_stage(stores, models, tmp_path, name):
    store, model = stores[name], models[name]
    checkpoint = open_checkpoint(model)
    assert checkpoint.shape["height"] == checkpoint.shape["width"] == SIDE and "image_size" not in checkpoint.shape
    codec = replace(open_store(store, "pixels").codec, height=SIDE, width=SIDE, shown=0.875, shorter_side=None)
    assert checkpoint.codec == codec
    exact = {"device": "cpu", "precision": "fp32"}
    seen = np.stack([published(picture, SIDE) for picture in pictures_of(store)])
    write_pixels(
        tmp_path / "seen",
        side=SIDE,
        count=len(seen),
        pixels=seen,
        class_names=["a", "b"],
    )
    losses = [evaluate.run(model, path, **exact)["normalized_mse"] for path in (store, tmp_path / "seen")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for path, out in ((store, "f"), (tmp_path / "seen", "g")):
        record = features.run(model, path, tmp_path / out, batch_size=5, **exact)
        assert record["summary"]["images"] == len(seen)
    f, g = (open_store(tmp_path / out, "features") for out in "fg")
    assert np.array_equal(f.read("features"), g.read("features")) and f.meta["height"] == g.meta["height"] == SIDE
    evaluate.run(model, store, pictures=tmp_path / "p.png", **exact)
    checks = check.run(model, store, device="cpu")
    assert checks["ok"] and any(one["name"] == "pairing" for one in checks["checks"])
    config = effective(
        finetune.FinetuneFile, sets=["finetune.steps=4", "finetune.batch_size=4", "finetune.augment=resized-crop"]
    )
    finetune.run(model, store, tmp_path / "tuned", config, val=tmp_path / "seen", **exact)
    assert open_checkpoint(tmp_path / "tuned").codec == codec
    assert "accuracy" in evaluate.run(tmp_path / "tuned", store, **exact)


def test_a_whole_store_is_validated_on_squares_or_whole_pictures(stores, tmp_path):
    record = pretrain.run(stores["whole"], tmp_path / "m", recipe(), val=stores["squares"], device="cpu")
    assert record["summary"]["best"]["val_loss"] > 0


def test_pictures_smaller_than_the_recipes_are_not_enlarged_and_it_is_said(pixels, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pretrain.progress, "say", said.append)
    pretrain.run(pixels, tmp_path / "m", recipe("model.image_size=12", "train.steps=1"), device="cpu")
    codec = json.loads((tmp_path / "m" / "codec.json").read_text())
    assert (codec["height"], codec["width"]) == (8, 8)
    assert any("holds pictures of 8x8, not of model.image_size 12" in line for line in said)


def test_a_resumed_run_sees_the_same_crops(stores, tmp_path, monkeypatch):
    settings = {"val_fraction": 0.2, "device": "cpu", "precision": "fp32"}
    whole = pretrain.run(stores["whole"], tmp_path / "one", recipe(), **settings)
    with pytest.raises(Interrupted):
        pretrain.run(stores["whole"], tmp_path / "two", recipe(), limits=Limits(time_limit_minutes=0), **settings)
    again = pretrain.run(stores["whole"], tmp_path / "two", recipe(), resume=True, **settings)
    assert again["id"] == whole["id"]


def test_the_models_side_is_the_recipes(stores, pixels, tmp_path):
    plan = pretrain.plan(stores["whole"], recipe("model.image_size=4", "model.patch_size=1"), device="cpu")
    assert plan["tokens_seen"] == 12 * 8 * 16
    same = effective(PretrainFile, sets=[*AIM, "model.image_size=8", "train.steps=1"])
    usual = effective(PretrainFile, sets=[*AIM, "train.steps=1"])
    ids = [pretrain.run(pixels, tmp_path / f"{i}", c, device="cpu")["id"] for i, c in enumerate((same, usual))]
    assert ids[0] == ids[1]  # pictures of the model's size are what they were
    for name, side in {"aim-0.6b": 224, "aim-1b": 224, "aim-3b": 224, "aim-7b": 224, "aim-64": 64}.items():
        assert read_preset(name)["model"]["image_size"] == side


def test_crops_that_are_enlarged_are_told(stores, pixels, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pretrain.progress, "say", said.append)
    for i, (path, sets) in enumerate([(pixels, ()), (pixels, ("train.augment=flip",)), (stores["squares"], ())]):
        pretrain.run(path, tmp_path / f"{i}", recipe("train.steps=1", *sets), device="cpu")
        assert any("crops of them are enlarged" in line for line in said) == (i == 0)
        said.clear()


def test_what_does_not_fit_is_told(stores, models, aim, pixels, tmp_path):
    none = effective(PretrainFile, sets=[*AIM])
    with pytest.raises(UsageError, match=r"holds whole pictures.*side that is not given"):
        pretrain.run(stores["whole"], tmp_path / "x", none, device="cpu")
    with pytest.raises(UsageError, match=r"model.image_size is 0"):
        recipe("model.image_size=0")
    with pytest.raises(PixseqError, match=r"of 8x8 pictures, .* holds 16x16"):  # it was trained on all of its pictures
        evaluate.run(aim["prefix"], stores["squares"], device="cpu")
    with pytest.raises(PixseqError, match=r"of 8x8 pictures, .* holds 4x4"):
        evaluate.run(models["whole"], write_pixels(tmp_path / "small", side=4), device="cpu")
    with pytest.raises(UsageError, match="holds whole pictures"):
        features.run("pixels", stores["whole"], tmp_path / "f", device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_damaged_or_lost_chunk_of_whole_pictures_is_named(stores, tmp_path):
    import shutil

    shutil.copytree(stores["whole"], tmp_path / "w")
    assert verify(tmp_path / "w") == []
    (tmp_path / "w" / "shapes" / "c" / "0" / "0").unlink()
    with pytest.raises(PixseqError, match="shapes/c/0/0"):
        open_images(tmp_path / "w", "pixels")


def test_the_manifest_says_which_layout(stores, pixels):
    assert open_store(stores["whole"], "pixels").manifest["format"] == 2
    assert open_store(pixels, "pixels").manifest["format"] == 1
    assert json.loads((stores["whole"] / "zarr.json").read_text())["attributes"]["shorter_side"] == 12
