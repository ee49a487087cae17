"""Text and codecs of another hand: quoted in cards and on terminals, and never run."""

import json
import os
import re
import sys

import numpy as np
import pytest
import zarr

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.foreign import open_foreign
from pixseq.cli import output
from pixseq.engine import image_store
from pixseq.errors import PixseqError
from pixseq.interop.model_card import model_card
from pixseq.numerics.knn import knn_predict
from pixseq.numerics.labelled import Labelled

EVIL = "x\n```\n# heading\n<script>alert(1)</script>\x1b[31m\x9b2J\u202e````"
SHAPE = {"n_vocab": 4, "n_ctx": 4, "n_layer": 1, "d_model": 4, "n_head": 1, "head": True, "n_classes": 0}


def test_a_card_quotes_what_others_wrote():
    summary = {
        "shape": {"n_classes": 0},
        "weights": {"ema": EVIL},
        "steps": EVIL,
        "images": 3,
        "best": {"step": EVIL, "val_loss": EVIL},
    }
    manifest = {"stage": EVIL, "version": EVIL, "id": EVIL, "inputs": {EVIL: {"path": EVIL, "id": EVIL}}}
    card = model_card(
        "m", SHAPE | {"shifted": True}, 2, False, manifest | {"summary": summary}, "ema", 1,
        EVIL, [(EVIL, {EVIL: 1.0, "nats": 0.5})],
    )  # fmt: skip
    text = card.split("---", 2)[2]
    assert all(c.isprintable() or c == "\n" for c in card)
    plain, fence = [], None
    for line in text.split("\n"):
        ticks = re.match("`{3,}", line)
        if fence is None and ticks:
            fence = ticks[0]
        elif line == fence:
            fence = None
        elif fence is None:
            plain.append(re.sub(r"(?<![`\\])(`+)(?!`).+?(?<!`)\1(?!`)", "", line))  # code spans go
    assert fence is None and plain.count("# m") == 1 and "## Metrics" in plain
    assert not [line for line in plain if re.search(r"(?<!\\)[<`]", line) or line.startswith("# h")]


def test_json_and_terminals_are_not_steered(capsys, monkeypatch):
    value = {"a": EVIL, "b": "grün 模型 \U0001f600\U000e0001", "c": os.fsdecode(b"\xff")}
    line = output.to_json(value)
    assert line.isprintable() and json.loads(line) == value and "grün 模型 \U0001f600" in line
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        output.emit("a\x9b2J\u202eb")
        assert capsys.readouterr().out == ("a?2J?b\n" if terminal else "a\x9b2J\u202eb\n")


@pytest.mark.parametrize(
    "key, value", [("filters", [{"id": "pickle"}]), ("compressor", {"id": "json2"}), ("dtype", "|O")]
)
def test_foreign_arrays_ask_for_known_codecs_alone(tmp_path, key, value):
    zarr.create_array(tmp_path / "a", shape=(4, 4), dtype="uint16", zarr_format=2)[:] = 3
    assert (np.asarray(open_foreign(tmp_path / "a")) == 3).all()
    path = tmp_path / "a" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for where in (tmp_path / "a", tmp_path):
        (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
        with pytest.raises(PixseqError, match=r"asks for the codec|Python objects"):
            open_foreign(where)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("packer", ["blosc", "zstd", "gzip", "lz4", "bz2", None])
def test_foreign_arrays_read_as_they_were_written(tmp_path, version, packer):
    import numcodecs
    from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

    written = np.random.default_rng(0).normal(size=(50, 6)).astype("float32")
    options = {"chunks": (20, 6)}
    if version == 2:
        options |= {"compressors": packer and numcodecs.get_codec({"id": packer}), "filters": [numcodecs.Delta("<f4")]}
    else:
        made = {"blosc": [BloscCodec()], "zstd": [ZstdCodec(), Crc32cCodec()], "gzip": [GzipCodec()], None: None}
        if packer not in made:
            pytest.skip("zarr has no such codec of version 3")
        options |= {"compressors": made[packer], "shards": (40, 6)}
    zarr.create_array(tmp_path / "a", shape=(50, 6), dtype="float32", zarr_format=version, **options)[:] = written
    assert np.allclose(open_foreign(tmp_path / "a")[:], written, atol=1e-5)
    (tmp_path / (".zgroup" if version == 2 else "zarr.json")).write_text(
        json.dumps({"zarr_format": version} | ({} if version == 2 else {"node_type": "group", "attributes": {}}))
    )
    assert open_foreign(tmp_path).shape == (50, 6)


def test_codecs_of_zarr_3_are_known_ones_too(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(8, 4), chunks=(2, 4), shards=(4, 4), dtype="uint16")[:] = 3
    assert (np.asarray(open_foreign(tmp_path / "a")) == 3).all()
    text = (tmp_path / "a" / "zarr.json").read_text()
    (tmp_path / "a" / "zarr.json").write_text(text.replace('"zstd"', '"vlen-bytes"'))
    with pytest.raises(PixseqError, match="codec 'vlen-bytes'"):
        open_foreign(tmp_path / "a")


def test_images_too_many_for_memory_are_mapped_where_the_result_will_be(tmp_path, monkeypatch):
    class Tokens(Store):
        def __init__(self):
            self.path, self.names, self.manifest = tmp_path / "read-only" / "x", ["tokens"], {"kind": "tokens"}

        def shape(self, name):
            return (10, 4)

    monkeypatch.setattr(image_store, "host_memory_bytes", lambda: 0)
    (tmp_path / "out").mkdir()
    assert image_store._allocated(Tokens(), tmp_path / "out").shape == (10, 4) and not any((tmp_path / "out").iterdir())
    with pytest.raises(PixseqError, match="has no room for a copy"):
        image_store._allocated(Tokens(), tmp_path / "nowhere")


def test_knn_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr("pixseq.numerics.knn.CELLS_AT_ONCE", 60)
    rng = np.random.default_rng(0)
    known = Labelled(rng.normal(size=(30, 3)).astype(np.float32), np.arange(30) % 2)
    heard = []
    knn_predict(known, known.X[:9], advance=heard.append)
    assert heard == [2, 2, 2, 2, 1]
