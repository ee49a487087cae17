import json

import numpy as np
import pytest
from conftest import write_tokens
from PIL import Image

from pixseq import progress
from pixseq.artifacts import manifest
from pixseq.artifacts.palette import load_palette, palette_id, save_palette
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.quantize import palette_bytes
from pixseq.stages import palette as stage

COLORS = np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float32).astype(np.float64)


def saved(path, colors=COLORS):
    save_palette(path, colors, "palette fit", {"seed": 0}, {}, {"colors": len(colors)})
    return path


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_palette_comes_back_bit_for_bit(tmp_path):
    colors = np.random.default_rng(1).uniform(-1, 1, (600, 3))
    loaded = load_palette(saved(tmp_path / "p.json", colors))
    assert loaded.colors.tobytes() == colors.tobytes() and loaded.size == 600
    assert loaded.id == palette_id(colors) == manifest.read(tmp_path / "p.json")["id"]


def test_the_same_colours_have_the_same_id_in_every_form(tmp_path):
    np.save(tmp_path / "kmeans_centers.npy", COLORS.astype(np.float32))
    (tmp_path / "hub").mkdir()
    config = tmp_path / "hub" / "preprocessor_config.json"
    config.write_text(json.dumps({"clusters": COLORS.tolist(), "do_resize": True, "size": 32}))
    np.save(tmp_path / "wide.npy", COLORS)
    forms = [saved(tmp_path / "p.json"), tmp_path / "kmeans_centers.npy", config, config.parent, tmp_path / "wide.npy"]
    loaded = [load_palette(form) for form in forms]
    assert {each.id for each in loaded} == {palette_id(COLORS)}
    assert [each.form for each in loaded] == [
        "pixseq palette",
        "npy float32",
        "json clusters",
        "json clusters",
        "npy float64",
    ]


def test_an_imported_palette_keeps_its_order_and_repeated_colours(tmp_path):
    colors = np.array([[0.9, 0.9, 0.9], [-1, -1, -1], [0.9, 0.9, 0.9]])
    np.save(tmp_path / "p.npy", colors)
    np.testing.assert_array_equal(load_palette(tmp_path / "p.npy").colors, colors)


@pytest.mark.parametrize(
    "values, says",
    [
        (np.zeros((4, 4)) - 0.5, r"shape \[4, 4\]"),
        (np.zeros(3), r"shape \[3\]"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        (np.array([[0.1, np.nan, -0.2], [-1, 0, 0]]), "1 of its values are not finite"),
        (np.array([[0, 128, 255], [3, 4, 5]], np.uint8), "values from 0 to 255"),
        (np.array([[0.0, 0.5, 1.0], [0.2, 0.3, 0.4]]), "in 0..1"),
        (np.array([[-1.5, 0, 0]]), "values from -1.5"),
        (np.array([["red", "green", "blue"]]), "not numbers"),
    ],
)
def test_values_that_are_no_colours_are_refused(tmp_path, values, says):
    np.save(tmp_path / "p.npy", values)
    with pytest.raises(PixseqError, match=says) as fault:
        load_palette(tmp_path / "p.npy")
    assert fault.value.hint


def test_damaged_and_foreign_files_are_refused(tmp_path):
    cases = {
        "cut.json": (b'{"pixseq": ', "not readable as JSON"),
        "ragged.json": (b'{"clusters": [[0, 0, 0], [1, 1]]}', "not numbers"),
        "other.json": (b'{"weights": 1}', "not a pixseq artifact"),
        "words.txt": (b"red green blue", "not a pixseq artifact"),
        "cut.npy": (b"\x93NUMPY\x01\x00", r"not a readable \.npy"),
        "bytes.json": (b"{\xff\xfe", "not readable as JSON"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PixseqError, match=says):
            load_palette(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PixseqError, match=r"not a readable \.npy"):
        load_palette(tmp_path / "objects.npy")
    with pytest.raises(PixseqError, match="does not exist"):
        load_palette(tmp_path / "nowhere.json")


def test_a_changed_colour_is_noticed_by_the_id(tmp_path):
    path = edited(saved(tmp_path / "p.json"), lambda content: content["colors"][3].__setitem__(0, 0.25))
    with pytest.raises(PixseqError, match=r"have the id sha256:\w+, its manifest says sha256:"):
        load_palette(path)


def test_a_failing_self_check_is_refused(tmp_path):
    path = edited(saved(tmp_path / "p.json"), lambda content: content["self_check"][5].update(code=39))
    with pytest.raises(PixseqError, match="fails its self-check: 1 of 32"):
        load_palette(path)
    path = edited(saved(tmp_path / "q.json"), lambda content: content.pop("self_check"))
    with pytest.raises(PixseqError, match="no usable self_check"):
        load_palette(path)


def test_a_palette_of_a_newer_format_is_refused_by_version(tmp_path):
    path = edited(saved(tmp_path / "p.json"), lambda content: content["pixseq"].update(format=99))
    with pytest.raises(PixseqError, match="format 99"):
        load_palette(path)


def test_the_palette_inside_tokens_is_read_only_where_that_is_meant(tmp_path):
    store = write_tokens(tmp_path / "t.zarr", count=8)
    with pytest.raises(PixseqError, match="is of kind tokens, where palette is needed"):
        load_palette(store)
    assert load_palette(store, inside=True).size == 16
    with pytest.raises(PixseqError, match="scheme rgb, which needs no palette"):
        load_palette(write_tokens(tmp_path / "rgb.zarr", count=8, scheme="rgb"), inside=True)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    """Eight classes of ten pictures, each class in a hue of its own."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(2)
    for label in range(8):
        (root / f"class{label}").mkdir()
        for i in range(10):
            pixels = np.clip(rng.normal([30 * label, 255 - 30 * label, 128], 4, (9, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root


def test_fit_records_its_recipe_and_figures(class_folders, tmp_path):
    record = stage.run_fit(str(class_folders), tmp_path / "p.json", colors=24, size=8, seed=3)
    assert record == manifest.expect(tmp_path / "p.json", "palette")
    config, summary = record["config"], record["summary"]
    assert (config["colors"], config["size"], config["resize"], config["filter"], config["seed"], config["split"]) == (
        24,
        8,
        "crop",
        "bilinear",
        3,
        "all",
    )
    assert (summary["images"], summary["pixels"], summary["colors"]) == (80, 80 * 64, 24)
    assert summary["mse"] > 0 and 20 < summary["psnr_db"] < 60
    source = record["inputs"]["source"]
    assert source["path"] == str(class_folders) and source["id"].startswith("folder:80:")
    again = stage.run_fit(str(class_folders), tmp_path / "q.json", colors=24, size=8, seed=3)
    assert again["id"] == record["id"] and load_palette(tmp_path / "q.json").id == record["id"]


def test_a_sample_of_a_folder_comes_from_all_over_it(class_folders, tmp_path):
    record = stage.run_fit(str(class_folders), tmp_path / "p.json", colors=16, size=8, max_images=16)
    assert record["summary"]["images"] == 16
    reds = palette_bytes(load_palette(tmp_path / "p.json").colors)[:, 0]
    assert reds.min() < 20 and reds.max() > 200  # the first and the last class are both in it


def test_a_palette_that_shrinks_says_so(tmp_path, capsys):
    progress.enable()
    try:
        record = stage.run_fit("digits", tmp_path / "p.json", colors=64, size=8)
    finally:
        progress.enable(False)
    assert record["summary"]["colors"] == record["summary"]["distinct_colors"] == 17
    assert record["summary"]["mse"] == 0 and record["summary"]["psnr_db"] is None
    assert "only 17 distinct colours" in capsys.readouterr().err


def test_fit_faults_leave_no_target(class_folders, tmp_path):
    out = tmp_path / "p.json"
    for fault in ({"colors": 0}, {"max_images": 0}, {"refine_steps": -1}, {"size": 0}, {"resize": "stretch"}):
        with pytest.raises(UsageError):
            stage.run_fit(str(class_folders), out, **fault)
    with pytest.raises(PixseqError, match="nowhere does not exist"):
        stage.run_fit(str(tmp_path / "nowhere"), out)
    assert list(tmp_path.iterdir()) == []
    saved(out)
    with pytest.raises(PixseqError, match="already exists"):
        stage.run_fit(str(class_folders), out)


def test_show_draws_every_colour_in_order(tmp_path):
    record = stage.run_show(saved(tmp_path / "p.json"), tmp_path / "swatch.png", columns=8)
    picture = np.asarray(Image.open(tmp_path / "swatch.png"))
    cell = picture.shape[1] // 8
    centres = picture[cell // 2 :: cell, cell // 2 :: cell].reshape(-1, 3)
    np.testing.assert_array_equal(centres, palette_bytes(COLORS))
    assert manifest.read(tmp_path / "swatch.png") == record
    assert record["inputs"]["palette"]["id"] == palette_id(COLORS)
