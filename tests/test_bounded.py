"""Bytes by strangers: no small file takes a gigabyte, and whatever it holds is refused by a line."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bombs import BOMBS, edit

from pixseq.artifacts import manifest
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.palette import load_palette
from pixseq.bounded.files import check_holes, open_regular, open_small, read_bytes
from pixseq.bounded.saved import load_saved
from pixseq.bounded.structure import parse_json, parse_yaml
from pixseq.bounded.unfolding import unfolded_size
from pixseq.config import PretrainFile, effective
from pixseq.errors import MOST_SHOWN, PixseqError, UsageError


@pytest.fixture(scope="module")
def burst(tmp_path_factory):
    """Name: what was said of each bomb, met in one process that may take a gigabyte beside itself."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("bombs.py"), str(tmp_path_factory.mktemp("bombs"))],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows} | {None: done.stderr[-2000:]}


@pytest.mark.parametrize("name", BOMBS)
def test_no_small_file_takes_a_gigabyte(burst, name):
    assert name in burst, burst[None]
    assert not burst[name]["burst"], burst[name]


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 100_000, "without end"),
        ('{"a":' * 200 + "1" + "}" * 200, "deeper than"),
        ("9" * 400, "400 digits"),
        ("9" * 5000, "5,000 digits"),
        ("[1e999]", "too large"),
        ("[NaN]", "NaN"),
        ('["\\ud800"]', "surrogate"),
        (b'["\xff"]', "utf-8"),
    ],
    ids=["endless", "deep", "digits", "more digits", "infinite", "nan", "half", "not text"],
)
def test_json_by_strangers(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 5000, "nested"),
        ("a: " + "9" * 400, "400 digits"),
        ("a: &a [*a]", "holds itself"),
        ("a: !!timestamp 2001-13-45", "month"),
        ("a: !!timestamp x", "."),
        ("a: !!python/object:os.system {}", "constructor"),
        ("a: !!int 1" + ":1" * 50_000, "digits"),
        ("? [a]\n: b", "unhashable"),
    ],
)
def test_yaml_by_strangers(text, why):
    with pytest.raises(ValueError, match=why) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_keeps_what_aliases_and_merges_mean():
    text = "a: &a {lr: 1.0e-3, steps: 3}\nb: {<<: *a, steps: 4}\nc: [*a, *a]"
    assert parse_yaml(text)["b"] == {"lr": 1e-3, "steps": 4}


def test_yaml_means_what_it_looks_like():
    texts = ("1:30", "1:30.5", "017", "0o17", "2001-01-01", "2001-13-45", "yes", "no", "on", "off", "1e3")
    values = {text: text for text in texts} | {"1_000": 1000, "-3": -3, "0x1F": 31, "1.5e-3": 1.5e-3, ".5": 0.5, "0": 0}
    values |= {"true": True, "False": False, "null": None, "~": None, "4.": 4.0, "-1_0.5": -10.5, "-.inf": -math.inf}
    found = parse_yaml("\n".join(f"- {text}" for text in values))
    assert found == list(values.values()) and list(map(type, found)) == list(map(type, values.values()))
    assert parse_yaml("on: 1") == {"on": 1}


def test_a_long_value_is_shown_short():
    with pytest.raises(UsageError) as caught:
        effective(PretrainFile, sets=["train.lr=" + "x" * 100_000])
    assert len(caught.value.message) <= MOST_SHOWN


@pytest.mark.parametrize(
    "read",
    [
        manifest.read,
        load_palette,
        lambda path: effective(PretrainFile, file=path),
        open_regular,
        lambda path: open_small(path, 1 << 20),
    ],
)
def test_nobody_waits_for_a_pipe(tmp_path, read):
    os.mkfifo(tmp_path / "p.json")
    with pytest.raises(PixseqError, match="is a pipe, not a file"):
        read(tmp_path / "p.json")
    with pytest.raises(PixseqError, match="is a device"):
        read("/dev/zero")


def test_small_files_are_read_at_once_and_large_ones_are_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with open_small(tmp_path / "a", 99) as file:
        assert file.fileno() and file.read() == bytes(range(100))
    read = os.read
    monkeypatch.setattr(os, "read", lambda handle, size: read(handle, min(size, 40)))  # as a network may give it
    with open_small(tmp_path / "a", 100) as file:
        assert isinstance(file, io.BytesIO) and file.read() == bytes(range(100))


@pytest.fixture
def copied(tokens, tmp_path):
    import shutil

    return Path(shutil.copytree(tokens, tmp_path / "t.zarr"))


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("labels", ("shape",), [5]),
        ("labels", ("shape",), [-1]),
        ("tokens", ("shape",), "96"),
        ("tokens", ("shape",), [96, 35]),
        ("tokens", ("chunk_grid", "configuration", "chunk_shape"), [0, 36]),
        ("tokens", ("chunk_grid",), 7),
        ("tokens", ("data_type",), {"name": "numpy.datetime64"}),
        ("tokens", ("codecs",), [{"name": "sharding_indexed"}]),
        (".", ("attributes", "height"), "six"),
        (".", ("attributes", "height"), 0),
        (".", ("attributes", "n_vocab"), 1e300),
        (".", ("attributes", "palette"), [[1, 2]]),
        (".", ("attributes", "class_names"), {"a": 1}),
        (".", ("attributes", "pixseq", "inputs"), {"tokens": 3}),
        (".", ("attributes", "pixseq", "kind"), ["tokens"]),
        (".", ("attributes", "pixseq", "format"), -3),
        (".", ("attributes",), []),
    ],
)
def test_a_store_of_odd_structure_is_refused_on_opening(copied, file, key, value):
    def change(found):
        for each in key[:-1]:
            found = found[each]
        found[key[-1]] = value

    edit(copied / file / "zarr.json", change)
    with pytest.raises(PixseqError):
        open_store(copied, "tokens")


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("codec.json", "height", -1),
        ("codec.json", "palette", "red"),
        ("codec.json", "class_names", [1, 2]),
        ("codec.json", "scheme", ["rgb"]),
        ("manifest.json", "summary", {"weights": {"model": "x"}}),
        ("manifest.json", "summary", {"shape": {}, "weights": {"model": 3}}),
        ("manifest.json", "summary", 3),
    ],
)
def test_a_checkpoint_of_odd_structure_is_refused_on_opening(checkpoints, tmp_path, file, key, value):
    import shutil

    path = Path(shutil.copytree(checkpoints["ar"], tmp_path / "m"))
    edit(path / file, lambda found: found.__setitem__(key, value))
    with pytest.raises(PixseqError):
        open_checkpoint(path)


def test_a_zip_whose_member_has_no_name_is_damaged(tmp_path):
    import zipfile

    from pictures import pngs

    from pixseq.data.sources import open_source

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/0.png", pngs(1)[0])
        archive.writestr("b", b"")
        archive.filelist[1].filename = ""
    with pytest.raises(PixseqError, match="is damaged"):
        open_source(str(tmp_path / "a.zip"))


def test_where_the_pages_of_parquet_lie_is_what_pyarrow_says_of_sound_files(tmp_path):
    """It is read here: pyarrow's own view ends the process where statistics of a damaged file do not fit its levels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pixseq.bounded import pages

    image = [{"bytes": bytes([i]) * 50, "path": f"{i}.png"} for i in range(40)]
    table = pa.table({"image": image, "label": list(range(40)), "a.b": ["x"] * 40, "tags": [[1, 2]] * 40})
    for options in ({}, {"use_dictionary": False}, {"data_page_version": "2.0", "compression": "zstd"}):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=16, **options)
        told = pq.ParquetFile(tmp_path / "a.parquet").metadata
        for names in (["image", "label"], ["a.b"], ["tags"]):
            for group in range(3):
                found = [told.row_group(group).column(i) for i in range(told.num_columns)]
                found = [c for c in found if any(c.path_in_schema.startswith(name) for name in names)]
                starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in found]
                wanted = [(start, start + c.total_compressed_size) for start, c in zip(starts, found)]
                assert pages._chunks(tmp_path / "a.parquet", names, group) == wanted
            assert len(pages._chunks(tmp_path / "a.parquet", names, None)) == 3 * len(wanted)


def test_shapes_of_whole_pictures_are_those_of_the_pixels(tmp_path):
    import numpy as np

    from pixseq.artifacts import owning
    from pixseq.artifacts.specs import PICTURE_SHAPES, Spec
    from pixseq.artifacts.store_writer import StoreWriter
    from pixseq.engine.image_store import read_all

    codec = {"scheme": "pixels", "height": None, "width": None, "n_vocab": None, "palette": None, "palette_id": None}
    with owning.writing(tmp_path / "t.zarr") as partial:
        specs = {"pixels": Spec("uint8", (None, 3), True), PICTURE_SHAPES: Spec("int32", (None, 2))}
        writer = StoreWriter(partial, specs, {}, 8)
        writer.append({"pixels": np.zeros((40, 3), np.uint8), PICTURE_SHAPES: np.full((2, 2), (4, 5), np.int32)}, {})
        writer.finish("pixels", "encode", {}, {}, {}, codec | {"class_names": None, "shorter_side": 4})
    edit(tmp_path / "t.zarr" / PICTURE_SHAPES / "zarr.json", lambda found: found["shape"].__setitem__(0, 1))
    edit(tmp_path / "t.zarr" / "zarr.json", lambda found: found.pop("consolidated_metadata", None))
    with pytest.raises(PixseqError, match="holds 40 pixels, its shapes declare 20"):
        read_all(open_store(tmp_path / "t.zarr", "pixels"))


def test_archives_that_are_cut_or_declare_more_than_they_have(tmp_path):
    from pictures import pngs, write_tar, write_zip

    from pixseq.data.sources import open_source

    write_zip(tmp_path / "a.zip", [("a/0.png", pngs(1)[0])])
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.rindex(b"PK\1\2") + 20
    data[place : place + 4] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(PixseqError, match=r"a/0\.png declares 2,147,483,648 bytes in a zip of"):
        open_source(str(tmp_path / "a.zip"))
    write_tar(tmp_path / "cifar-10-binary.tar.gz", [("batches.meta.txt", b"a\nb\n")], "w:gz")
    with pytest.raises(PixseqError):
        open_source(str(tmp_path / "cifar-10-binary.tar.gz"))


@pytest.mark.parametrize("packing", ["zlib", "gzip", "bz2", "lzma", "lz4", "blosc", "zstd"])
def test_what_is_packed_tells_its_size_before_it_is_unfolded(packing):
    import numcodecs

    packed = bytes(numcodecs.get_codec({"id": packing}).encode(bytes(50 << 20)))
    assert unfolded_size(packing, packed, 1 << 30) == 50 << 20
    assert unfolded_size(packing, packed, 1000) > 1000
    if packing not in ("lz4", "blosc", "zstd"):
        assert unfolded_size(packing, packed * 2, 1 << 30) in (50 << 20, 100 << 20)  # some take one stream alone
        with pytest.raises(ValueError, match="damaged"):
            unfolded_size(packing, b"none of that", 1000)


@pytest.mark.parametrize("left", [3, 12, 16, -1])
def test_blosc_is_not_asked_to_unfold_what_is_cut_short(left):
    """It would read on behind it."""
    import numcodecs

    packed = bytes(numcodecs.Blosc().encode(bytes(1000)))
    with pytest.raises(ValueError, match=r"it has \d+ bytes of"):
        unfolded_size("blosc", packed[:left], 1 << 20)


def test_holes_are_told_from_data(tmp_path):
    (tmp_path / "whole").write_bytes(bytes(65 << 20))
    with open_regular(tmp_path / "whole") as file:
        check_holes(file)
    with (tmp_path / "hollow").open("wb") as file:
        file.write(b"x")
        file.truncate(128 << 20)
    with open_regular(tmp_path / "hollow") as file, pytest.raises(ValueError, match="without its holes"):
        check_holes(file)


def test_room_is_made_for_what_a_file_has_and_not_for_what_it_may_have(tmp_path):
    (tmp_path / "x").write_bytes(b"few")
    assert read_bytes(tmp_path / "x", 1 << 60) == b"few"


def test_the_end_of_an_archive_that_spans_disks_is_damage(tmp_path):
    """Zips of several disks, of which Python's module complains where it is only asked whether it is a zip."""
    (tmp_path / "w.pth").write_bytes(b"PK\6\7" + bytes(12) + b"\5\0\0\0" + b"PK\5\6" + bytes(18))
    with pytest.raises(ValueError, match="span"):
        load_saved(tmp_path / "w.pth")


def test_members_of_a_zip_do_not_declare_more_than_it_has(tmp_path):
    """Its module makes room for what is declared before it reads."""
    import zipfile

    from pixseq.bounded.files import check_members
    from pixseq.interop.torch_export import open_exported

    with zipfile.ZipFile(tmp_path / "w.pt2", "w") as archive:
        archive.writestr("w/models/model.json", "{}")
    whole = (tmp_path / "w.pt2").read_bytes()
    for place in (20, 24):  # how long it is packed, and unfolded
        data = bytearray(whole)
        at = data.rindex(b"PK\1\2") + place
        data[at : at + 4] = (1 << 31).to_bytes(4, "little")
        (tmp_path / "w.pt2").write_bytes(data)
        with zipfile.ZipFile(tmp_path / "w.pt2") as archive, pytest.raises(ValueError, match="declares 2,147,483,648"):
            check_members(archive, len(data), 10)
        with pytest.raises(PixseqError, match="declares 2,147,483,648"):
            open_exported(tmp_path / "w.pt2")
