"""Directories of weights as they are met in the wild, and as nobody should make them."""

import ast
import io
import json
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import edit_config, make_hf
from safetensors.torch import load_file, save_file
from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification

from pixseq import interop, progress
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.errors import PixseqError
from pixseq.interop.files import load_tensors
from pixseq.stages import exporting, importing


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "hf"
    make_hf(folder, ImageGPTForCausalImageModeling, n_layer=2, width=16, heads=2, side=4)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def weights(original):
    return load_file(original / "model.safetensors")


def imported(folder, name="m"):
    importing.run("hf", folder, folder.parent / name)
    return open_checkpoint(folder.parent / name)


def refused(folder, *words):
    with pytest.raises(PixseqError) as caught:
        importing.run("hf", folder, folder.parent / "m")
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint and sorted(p.name for p in folder.parent.iterdir()) == ["hf"]


def pickled(folder, content):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin")


def sharded(folder, first, second, table):
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


# --- files


def test_safetensors_go_before_pickles(folder, original, weights):
    torch.save({name: 2 * x for name, x in weights.items()}, folder / "pytorch_model.bin")
    assert imported(folder).manifest["id"] == imported(original.parent / "hf", "n").manifest["id"]


def test_a_snapshot_of_links_is_read(folder, original, tmp_path):
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(list(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert imported(folder).manifest["summary"]["notes"] == []


def test_the_index_decides_which_shard_a_tensor_is_from(folder, weights):
    want = imported(folder, "whole").manifest["id"]
    names = sorted(weights)
    first, second = ({n: weights[n] for n in part} for part in (names[:9], names[9:]))
    table = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    sharded(folder, first, {**second, names[0]: weights[names[0]] + 1}, table)
    assert imported(folder).manifest["id"] == want


def test_shards_and_index_that_disagree(folder, weights):
    names = sorted(weights)
    table = dict.fromkeys(names, "a.safetensors")
    sharded(folder, {n: weights[n] for n in names[1:]}, {}, table)
    refused(folder, "a.safetensors lacks", names[0], "index.json")
    sharded(folder, weights, {"surplus": torch.ones(1)}, {**table, "surplus": "b.safetensors"})
    refused(folder, "has not: surplus")
    sharded(folder, {**weights, "unlisted": torch.ones(1)}, {}, table)
    refused(folder, "has not: unlisted")
    sharded(folder, weights, {}, {})
    refused(folder, "no weight_map")


def test_weights_that_share_memory_come_apart(folder, weights):
    want = imported(folder, "apart").weights()
    flat = torch.cat([x.flatten() for x in weights.values()])
    sizes = [x.numel() for x in weights.values()]
    together = {n: part.view(x.shape) for (n, x), part in zip(weights.items(), flat.split(sizes))}
    pickled(folder, together)
    found = imported(folder).weights()
    assert all(torch.equal(want[name], x) for name, x in found.items())
    weights["transformer.h.1.ln_1.weight"] = weights["transformer.h.0.ln_1.weight"]
    pickled(folder, weights)
    found = imported(folder, "tied").weights()
    assert torch.equal(found["blocks.1.ln_1.weight"], want["blocks.0.ln_1.weight"])


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": {}},
        {"epoch": 3},
        {3: torch.ones(1)},
        {"x": torch.eye(3).to_sparse()},
        {"x": torch.empty(3, device="meta")},
        {"x": torch._nested_view_from_buffer(torch.ones(4), *torch.tensor([[[2, 2]], [[2, 1]]]), torch.tensor([0]))},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_a_pickle_of_more_than_plain_tensors_is_refused_by_name(folder, weights, change):
    pickled(folder, {**weights, **change})
    refused(folder, repr(next(iter(change))), "no plain tensor")


@pytest.mark.parametrize("old", [True, False])
def test_a_storage_of_more_numbers_than_the_file_has_is_refused_before_room_is_made(tmp_path, old):
    class Declares:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (1,), False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, each):  # as torch writes it, with another length
            return ("storage", torch.FloatStorage, "0", "cpu", 1 << 40, None)[: 6 if old else 5] * (
                each is storage
            ) or None

    buffer, storage = io.BytesIO(), object()
    Pickler(buffer, 2).dump({"x": Declares()})
    torch.save({"x": torch.zeros(2)}, tmp_path / "w.bin", _use_new_zipfile_serialization=not old)
    if old:
        first = io.BytesIO((tmp_path / "w.bin").read_bytes())
        parts = [pickle.load(first) for _ in range(3)]
        data = (
            b"".join(pickle.dumps(part, 2) for part in parts) + buffer.getvalue() + pickle.dumps(["0"], 2) + bytes(16)
        )
        (tmp_path / "w.bin").write_bytes(data)
    else:
        with zipfile.ZipFile(tmp_path / "w.bin") as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, buffer.getvalue() if name.endswith("data.pkl") else data)
    with pytest.raises(PixseqError, match="it declares 1,099,511,627,776 stored numbers"):
        load_tensors(tmp_path / "w.bin")


def test_numbers_that_are_no_weights_are_refused(folder, weights):
    for kind, word in ((torch.int8, "int8"), (torch.complex64, "complex64")):
        save_file({name: x.to(kind) for name, x in weights.items()}, folder / "model.safetensors")
        refused(folder, "wte.weight", f"holds {word}, not weights")
    too_large = {name: x.double() * (1e300 if "lm_head" in name else 1) for name, x in weights.items()}
    save_file(too_large, folder / "model.safetensors")
    refused(folder, "lm_head.weight", "non-finite")


def test_a_compressed_archive_is_not_unfolded(folder, weights):
    pickled(folder, weights)
    plain = folder / "pytorch_model.bin"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    (folder / "new").replace(plain)
    refused(folder, "pytorch_model.bin", "compressed archive")


@pytest.mark.parametrize(
    "text", ["[" * 100000, "[]", "\xff", f'"{" " * (1 << 24)}"'], ids=["deep", "a list", "no utf-8", "large"]
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_that_is_none_of_theirs(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, name)


# --- what the configuration says


@pytest.mark.parametrize(
    "size, heard",
    [
        (4, None),
        ({"height": 4, "width": 4}, None),
        ({"height": 4, "width": 4, "shortest_edge": None}, None),
        (None, None),
        (32, "size 32, the model's are 4x4"),
        ({"height": 256, "width": 256}, '{"height": 256, "width": 256}'),
        ({"shortest_edge": 4}, '{"shortest_edge": 4}'),
        ("\x1b[31m", r'"\u001b[31m"'),
        (["x" * 1000], "x" * 90),
    ],
    ids=str,
)
def test_the_processors_size_in_every_form(folder, size, heard):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": size}))
    notes = imported(folder).manifest["summary"]["notes"]
    assert (heard is None) == (notes == [])
    assert heard is None or (heard in notes[0] and len(notes[0]) < 200)


def test_our_own_note_is_not_trusted(tmp_path):
    make_hf(tmp_path / "hf", ImageGPTForImageClassification, n_layer=1, width=16, heads=2, side=4, classes=3)
    for number, note in enumerate(({"class_names": {"a": 1}, "shifted": "no"}, {"class_names": [1, 2, 3]}, 7)):
        edit_config(tmp_path / "hf", pixseq=note)
        found = imported(tmp_path / "hf", str(number))
        assert found.codec.class_names is None and found.shape["shifted"] is False


def test_escapes_in_foreign_names_do_not_reach_the_terminal(capsys):
    progress.enable()
    try:
        progress.say("note: a\x1b[31mb\x07\x9b\nnext")
    finally:
        progress.enable(False)
    assert capsys.readouterr().err == "note: a?[31mb??\nnext\n"


# --- ways out


@pytest.mark.parametrize("path", sorted(Path(interop.__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_every_fault_of_a_foreign_file_comes_with_a_way_out(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PixseqError":
            assert len(node.args) == 2, f"{path.name} line {node.lineno} has no hint"


@pytest.fixture
def no_room():
    """No file can grow beyond what the small ones need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_cannot_be_written_are_told_and_leave_nothing(folder, request):
    imported(folder)
    request.getfixturevalue("no_room")
    for call in (
        lambda: importing.run("hf", folder, folder.parent / "n"),
        lambda: exporting.run(folder.parent / "m", folder.parent / "x"),
    ):
        with pytest.raises(PixseqError, match="cannot write") as caught:
            call()
        assert "make room" in caught.value.hint
    assert sorted(p.name for p in folder.parent.iterdir()) == ["hf", "m"]


def test_a_palette_of_nonsense_beside_the_weights_is_told(folder):
    file = folder / "preprocessor_config.json"
    for clusters in (None, "x", [[0, 0]], [[2.0, 0, 0]] * 512, np.zeros((511, 3)).tolist()):
        file.write_text(json.dumps({"clusters": clusters}))
        refused(folder, "preprocessor_config.json")
