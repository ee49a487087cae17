"""Pictures as files: what their names may say, and text chunks by other hands."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from program import good

from pixseq.artifacts import manifest
from pixseq.artifacts.picture import save_png
from pixseq.errors import PixseqError, UsageError
from pixseq.stages import decode, evaluate, palette, probe, sample, show
from pixseq.studies import fit, forecast

COMMANDS = {
    "sample": lambda path: sample.run("m", path),
    "decode": lambda path: decode.run("t.zarr", path),
    "palette show": lambda path: palette.run_show("p.json", path),
    "show --plot": lambda path: show.run("m", plot=path),
    "probe --plot": lambda path: probe.run("a.zarr", "b.zarr", plot=path),
    "evaluate --pictures": lambda path: evaluate.run("m", "t.zarr", pictures=path),
    "scaling fit --plot": lambda path: fit.run("runs.csv", plot=path),
    "scaling forecast --plot": lambda path: forecast.run("fit.json", 4.5, 1e21, "32", plot=path),
    "anything else": lambda path: save_png(path, np.zeros((4, 4, 3), np.uint8), "x", {}, {}),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.pdf", "x.json"])
def test_a_name_of_another_format_is_refused_before_any_work(tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{name} ends in .*written as PNG") as fault:
        COMMANDS[command](name)
    assert "x.png" in fault.value.hint and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x"])
def test_a_name_of_png_or_of_nothing_is_taken(tmp_path, name):
    made = save_png(tmp_path / name, np.zeros((4, 4, 3), np.uint8), "x", {}, {})
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "PNG"
    assert show.run(tmp_path / name, verify=True) == made


@pytest.mark.parametrize("text", ["hello", "{", "[" * 100_000, "7", "[1]", '{"kind": []}', "NaN"], ids=lambda x: x[:9])
def test_a_text_chunk_by_another_hand_is_no_artifact(tmp_path, text):
    info = PngInfo()
    info.add_text("pixseq", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(PixseqError, match="is not a pixseq artifact"):
        show.run(tmp_path / "x.png")


@pytest.mark.parametrize("key", manifest.KEYS)
def test_a_manifest_of_other_types_is_none(tmp_path, key):
    record = manifest.build("metrics", "sha256:0", "x", {}, {}, {})
    for value in (["a"] if key != "argv" else {}, None):
        (tmp_path / "x.json").write_text(json.dumps({"pixseq": {**record, key: value}}))
        with pytest.raises(PixseqError, match="is not a pixseq artifact"):
            manifest.read(tmp_path / "x.json")


def test_a_manifest_with_odd_contents_is_shown(tmp_path):
    record = manifest.build("metrics", "sha256:0", "x", {}, {}, {})
    (tmp_path / "x.json").write_text(json.dumps({"pixseq": {**record, "argv": [{}, 7], "made": {}}}))
    assert "sha256:0" in good("show", tmp_path / "x.json")
    for parent in ("m", {"id": 1}, {"id": "sha256:0", "path": 1}):
        (tmp_path / "x.json").write_text(json.dumps({"pixseq": {**record, "inputs": {"model": parent}}}))
        with pytest.raises(PixseqError, match="is not a pixseq artifact"):
            manifest.read(tmp_path / "x.json")


def test_json_nested_without_end_is_damage(tmp_path):
    (tmp_path / "x.json").write_text('{"pixseq": ' + "[" * 100_000)
    with pytest.raises(PixseqError, match="not readable as JSON"):
        show.run(tmp_path / "x.json")
