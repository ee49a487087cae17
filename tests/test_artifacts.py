"""A target that exists is complete; ids name content; damage is found."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from conftest import write_tokens

from pixseq.artifacts import arrays, disk, manifest, owning, targets
from pixseq.artifacts.arrays import open_store, verify
from pixseq.artifacts.layout import DRAWN
from pixseq.artifacts.metrics import Log, read_log, write_metrics
from pixseq.artifacts.picture import save_png
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.errors import PixseqError
from pixseq.stages import show


def chunks(path, name="tokens"):
    return sorted(p for p in (path / name / "c").rglob("*") if p.is_file())


def test_an_error_leaves_no_target_and_no_partial(tmp_path):
    with pytest.raises(RuntimeError), owning.writing(tmp_path / "x") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_overwrite_loses_nothing_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "000001.png").write_bytes(DRAWN)  # as of decode --images
    with pytest.raises(RuntimeError), owning.writing(target, overwrite=True) as partial:
        partial.mkdir()
        raise RuntimeError
    assert (target / "000001.png").exists()
    with owning.writing(target, overwrite=True) as partial:
        partial.mkdir()
        (partial / "000002.png").touch()
    assert [p.name for p in target.iterdir()] == ["000002.png"] and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_overwrite_never_replaces_a_foreign_folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").touch()
    with pytest.raises(PixseqError, match="did not make"), owning.writing(photos, overwrite=True):
        pass
    assert (photos / "holiday.jpg").exists()


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(PixseqError, match="already exists"):
        targets.check_target(tmp_path / "x", overwrite=False)
    with pytest.raises(PixseqError, match="cannot make"):
        targets.check_target(tmp_path / "x" / "y" / "z", overwrite=False)


@pytest.mark.parametrize("flags, why", [(os.ST_RDONLY, "its file system is read-only"), (0, "permission denied")])
def test_why_a_folder_takes_no_targets_is_said(tmp_path, monkeypatch, flags, why):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    with pytest.raises(PixseqError, match=f"cannot write in .*: {why}"):
        targets.check_target(tmp_path / "x", overwrite=False)


def test_a_full_disk_is_said_in_one_line(tmp_path):
    with pytest.raises(PixseqError, match="disk is full"), owning.writing(tmp_path / "x") as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full", ["open", "fsync", "replace"])
def test_a_small_file_that_the_disk_has_no_space_for_is_named_and_stays_as_it_was(tmp_path, monkeypatch, full):
    """Of a plan that stands, say, which nobody owns while it is changed."""

    def failing(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    disk.write_text(tmp_path / "manifest.json", "old")
    monkeypatch.setattr(Path if full == "open" else os, full, failing)
    with pytest.raises(PixseqError, match=r"^the disk is full: .*/manifest.json could not be written$"):
        disk.write_text(tmp_path / "manifest.json", "new")
    monkeypatch.undo()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_ids_name_content_not_files(tmp_path):
    a, b = write_tokens(tmp_path / "a.zarr", chunk_rows=32), write_tokens(tmp_path / "b.zarr", chunk_rows=7)
    c = write_tokens(tmp_path / "c.zarr", seed=1)
    ids = [manifest.read(path)["id"] for path in (a, b, c)]
    assert ids[0] == ids[1] != ids[2]
    assert manifest.read(write_tokens(tmp_path / "d.zarr", class_names=list("wxyz")))["id"] != ids[0]


def test_content_id_is_the_stated_hash():
    import hashlib

    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    head = b'{"kind":"k","meta":{"m":1}}' + b'{"dtype":"<i4","name":"x","shape":[2,3]}'
    want = "sha256:" + hashlib.sha256(head + x.tobytes()).hexdigest()
    assert manifest.content_id("k", {"x": manifest.whole(x)}, {"m": 1}) == want
    blocks = manifest.Content(x.dtype, x.shape, [x[:1], x[1:]])
    assert manifest.content_id("k", {"x": blocks}, {"m": 1}) == want


@pytest.mark.parametrize("at_once", [1, 700, 1 << 20])
@pytest.mark.parametrize(
    "shape, chunks",
    [((23, 5), (4, 5)), ((2, 23, 5), (1, 4, 5)), ((23,), (4,)), ((0, 5), (4, 5)), ((5, 0), (4, 1))],
)
def test_what_is_read_back_is_all_of_it_in_order_however_many_chunks_at_once(
    tmp_path, monkeypatch, at_once, shape, chunks
):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", at_once)
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    array = zarr.create_array(tmp_path / "x", data=x, chunks=chunks)
    assert b"".join(block.tobytes() for block in arrays._blocks(array)) == x.tobytes()


def test_all_of_a_folder_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """Each file and each folder; a folder after what is in it."""
    flushed = []
    monkeypatch.setattr(disk, "FLUSHED_SOON", 7)
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    with owning.writing(tmp_path / "x") as partial:
        (partial / "a" / "b").mkdir(parents=True)
        files = [partial / "a" / "b" / str(n) for n in range(30)] + [partial / "zarr.json"]
        for file in files:
            file.write_text("x")
        flushed.clear()
    at = {path: flushed.index(path) for path in (*files, partial, partial / "a", partial / "a" / "b")}
    assert all(at[file] < at[file.parent] for file in files) and flushed[-1] == tmp_path


def test_names_of_a_large_folder_are_not_all_held(tmp_path, monkeypatch):
    """Of a store of a million chunks they would take a gigabyte."""
    read, waiting, below = set(), [], disk._below

    def noted(folder):
        for entry in below(folder):
            read.add(entry.path)
            yield entry

    monkeypatch.setattr(disk, "FLUSHED_SOON", 4)
    monkeypatch.setattr(disk, "_below", noted)
    monkeypatch.setattr(disk, "fsync", lambda path: waiting.append(len(read) - len(waiting)))
    for n in range(60):
        (tmp_path / str(n)).write_text("x")
    disk.flush(tmp_path)
    assert len(waiting) == 61 and max(waiting) <= 4


def test_a_file_that_cannot_be_flushed_is_not_published(tmp_path, monkeypatch):
    with pytest.raises(PixseqError, match="disk is full"), owning.writing(tmp_path / "x") as partial:
        partial.mkdir()
        (partial / "zarr.json").write_text("x")
        monkeypatch.setattr(os, "fsync", lambda handle: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert list(tmp_path.iterdir()) == []


def test_plain_zarr_reads_what_we_write(tokens):
    group = zarr.open_group(tokens, mode="r")
    assert group["tokens"].dtype == np.uint16 and group["labels"].dtype == np.int32
    assert group.attrs["pixseq"].keys() == {
        *("kind", "format", "id", "stage", "version", "config", "inputs", "summary", "made", "argv")
    }


@pytest.mark.parametrize("damage", ["delete", "empty", "truncate", "flip"])
def test_every_damage_to_a_chunk_is_found_and_named(tokens, tmp_path, damage):
    path = tmp_path / "t.zarr"
    shutil.copytree(tokens, path)
    victim = chunks(path)[1]
    data = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    assert any("tokens/c/1/0" in fault for fault in verify(path))
    with pytest.raises(PixseqError, match="tokens/c/1/0"):
        show.run(path, verify=True)
    with pytest.raises(PixseqError, match="tokens"):
        open_store(path, "tokens").read("tokens")


@pytest.mark.parametrize("damage", ["no array", "cut metadata", "no metadata"])
def test_damaged_metadata_is_told(tokens, tmp_path, damage):
    path = tmp_path / "t.zarr"
    shutil.copytree(tokens, path)
    if damage == "no array":
        shutil.rmtree(path / "tokens")
    elif damage == "cut metadata":
        (path / "tokens" / "zarr.json").write_text('{"shape": ')
    else:
        (path / "tokens" / "zarr.json").unlink()
    for check in (lambda: open_store(path, "tokens"), lambda: show.run(path, verify=True)):
        with pytest.raises(PixseqError, match=r"no array tokens|does not open"):
            check()


def test_changed_content_with_valid_checksums_is_found(tokens, tmp_path):
    path = tmp_path / "t.zarr"
    shutil.copytree(tokens, path)
    assert verify(path) == []
    group = zarr.open_group(path, mode="r+")
    group["tokens"][3, 3] = (group["tokens"][3, 3] + 1) % 16
    assert "does not match its id" in verify(path)[0]


def test_resumed_store_equals_an_uninterrupted_one(tmp_path):
    specs = {"x": Spec("float32", (2, None, 3)), "labels": Spec("int32", (None,))}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 25, 3)).astype("float32"), np.arange(25, dtype=np.int32)

    def write(partial, start, stop, step, resume):
        writer = StoreWriter(partial, specs, {"r": 1}, 8, resume)
        assert writer.rows == start and writer.state == ({"at": start} if start else {})
        for i in range(start, stop, step):
            rows = {"x": x[:, i : i + step], "labels": y[i : i + step]}
            writer.append(rows, {"at": min(i + step, 25)})
        return writer

    a = write(tmp_path / "a", 0, 25, 8, False).finish("features", "s", {}, {}, {}, {})
    write(tmp_path / "b", 0, 16, 4, False)
    b = write(tmp_path / "b", 16, 25, 4, True).finish("features", "s", {}, {}, {}, {})
    assert a["id"] == b["id"]
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "b", mode="r")["x"][:], x)
    write(tmp_path / "c", 0, 16, 8, False)
    with pytest.raises(PixseqError, match=r"another recipe.*r"):
        StoreWriter(tmp_path / "c", specs, {"r": 2}, 8, resume=True)


@pytest.mark.parametrize("step", [1, 3, 5, 20])
def test_a_store_goes_on_from_its_last_state_whatever_the_chunks(tmp_path, step):
    """Appends of any size, cut off again and again: rows that are written already are passed over."""
    x, specs, path = np.arange(41, dtype=np.int32), {"labels": Spec("int32", (None,))}, tmp_path / "t"

    def write(path, most):
        writer = StoreWriter(path, specs, {}, 8, resume=True)
        start = writer.state.get("at", 0)
        assert start == writer.covered <= writer.rows and writer.rows % 8 == 0
        for i in list(range(start, 41, step))[:most]:
            writer.append({"labels": x[i : i + step]}, {"at": min(i + step, 41)})
        return writer

    whole = write(tmp_path / "whole", None).finish("features", "s", {}, {}, {}, {})
    met = set()
    for _ in range(9):
        met.add(write(path, max(2, 16 // step)).covered)
    assert met != {0} and write(path, None).finish("features", "s", {}, {}, {}, {})["id"] == whole["id"]
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["labels"][:], x)


@pytest.mark.parametrize("left", [None, 0, 9])
def test_a_partial_whose_chunks_did_not_reach_the_disk_is_begun_anew(tmp_path, left):
    """As the power cut leaves it: the record tells of rows whose file is not there, or empty, or cut short."""
    x, specs, path = np.arange(24, dtype=np.int32), {"labels": Spec("int32", (None,))}, tmp_path / "t"
    StoreWriter(path, specs, {}, 8).append({"labels": x[:16]}, {"at": 16})
    assert StoreWriter(path, specs, {}, 8, resume=True).rows == 16
    chunk = path / "labels/c/0"
    chunk.unlink() if left is None else os.truncate(chunk, left)
    writer = StoreWriter(path, specs, {}, 8, resume=True)
    assert (writer.rows, writer.state) == (0, {})
    writer.append({"labels": x}, {})
    writer.finish("features", "s", {}, {}, {}, {})
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["labels"][:], x)


def test_a_partial_of_an_older_version_goes_on(tmp_path):
    """It does not tell after how many rows its state is: the state itself does, or it is of all that are written."""
    x, specs = np.arange(24, dtype=np.int32), {"labels": Spec("int32", (None,))}
    for name, state, start in (("encode", {"rows": 6}, 6), ("features", {}, 8)):
        writer = StoreWriter(tmp_path / name, specs, {}, 8)
        writer.append({"labels": x[:8]}, {})
        group = zarr.open_group(tmp_path / name, mode="r+")
        group.attrs["pixseq_unfinished"] = {"recipe": {}, "rows": 8, "state": state}
        writer = StoreWriter(tmp_path / name, specs, {}, 8, resume=True)
        writer.append({"labels": x[start:]}, {})
        writer.finish("features", "s", {}, {}, {}, {})
        np.testing.assert_array_equal(zarr.open_group(tmp_path / name, mode="r")["labels"][:], x)


def test_a_partial_that_declares_rows_without_end_is_damaged(tmp_path):
    """Cutting it back would list every chunk that its shape declares."""
    specs, path = {"labels": Spec("int32", (None,))}, tmp_path / "t"
    StoreWriter(path, specs, {}, 8).append({"labels": np.arange(8, dtype=np.int32)}, {})
    metadata = path / "labels" / "zarr.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "shape": [1 << 31]}))
    with pytest.raises(PixseqError, match="does not tell how far it came"):
        StoreWriter(path, specs, {}, 8, resume=True)


def test_foreign_unfinished_and_newer_files_are_told_apart(tmp_path, tokens):
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text('{"pixseq": ')
    (tmp_path / "z.partial").mkdir()
    (tmp_path / "folder").mkdir()
    cases = {"x.json": "not a pixseq artifact", "cut.json": "not readable as JSON", "folder": "not a pixseq artifact"}
    cases |= {"none": "does not exist", "z": "unfinished z.partial", "z.partial": "is unfinished"}
    for name, words in cases.items():
        with pytest.raises(PixseqError, match=words):
            manifest.read(tmp_path / name)
    record = manifest.read(tokens) | {"format": 99, "version": "9.9"}
    (tmp_path / "new.json").write_text(json.dumps({"pixseq": record}))
    with pytest.raises(PixseqError, match="format 99") as fault:
        manifest.read(tmp_path / "new.json")
    assert "9.9" in fault.value.hint
    with pytest.raises(PixseqError, match="kind tokens, where palette is needed"):
        manifest.expect(tokens, "palette")


def test_metrics_and_pictures_carry_verifiable_manifests(tmp_path):
    write_metrics(tmp_path / "m.json", "probe", {}, {}, {"accuracy": 0.5})
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    save_png(tmp_path / "p.png", image, "sample", {"seed": 1}, {})
    assert show.run(tmp_path / "m.json", verify=True)["kind"] == "metrics"
    assert show.run(tmp_path / "p.png", verify=True)["config"] == {"seed": 1}
    changed = json.loads((tmp_path / "m.json").read_text()) | {"accuracy": 0.6}
    (tmp_path / "m.json").write_text(json.dumps(changed))
    with pytest.raises(PixseqError, match="does not match"):
        show.run(tmp_path / "m.json", verify=True)


def test_log_drops_what_a_resumed_run_makes_again(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in range(4):
            log.write({"step": step, "loss": 1.0})
        log.write({"step": 2, "val_loss": 2.0})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with Log(path, resume_step=2):
        pass
    assert read_log(path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0}, {"step": 2, "val_loss": 2.0}]
