"""One owner of a target, from begin to publish: kills at every step, two at once, strangers' files, links."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from pixseq.artifacts import disk, layout, locking, owning, publishing, targets
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.errors import PixseqError, UsageError
from pixseq.stages import decode, encode, evaluate, features, finetune, importing, palette, pretrain, sample


def child(code, *args):
    """Run `code` in another process, where the folder `here` is at hand too; returns what it left behind."""
    head = "import os, signal, sys\nfrom pathlib import Path\nhere = Path(sys.argv[1])\n"
    head += "from pixseq.artifacts import disk, locking, owning, publishing\n"
    return subprocess.run([sys.executable, "-c", head + code, *map(str, args)], capture_output=True, text=True)


DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def store(path, text):
    """A folder that passes for an artifact."""
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(text)
    return path


def read(path):
    return (path / "zarr.json").read_text()


def test_two_writers_of_one_target_are_told_who_works_there(tmp_path):
    with owning.own(tmp_path / "x", False, "encode", resumable=True):
        other = child("with owning.own(here / 'x', False, 'import'): pass", tmp_path)
    assert "another process is writing" in other.stderr and f"encode, process {os.getpid()} on" in other.stderr
    assert names(tmp_path) == []


def test_a_stage_owns_its_targets_while_it_computes(tmp_path):
    @owning.owns("measure", "out", "plot")
    def run(out, plot=None, overwrite=False):
        other = child("with owning.writing(here / 'x') as new: new.write_text('theirs')", tmp_path)
        assert "another process is writing" in other.stderr
        with owning.writing(out, overwrite, "measure") as new:
            new.write_text("ours")

    run(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "ours" and names(tmp_path) == ["x"]


def test_no_command_replaces_what_it_reads(tmp_path, checkpoints, tokens):
    model, store = shutil.copytree(checkpoints["ar"], tmp_path / "m"), shutil.copytree(tokens, tmp_path / "t.zarr")
    (tmp_path / "link").symlink_to(model)
    for run in (
        lambda: sample.run(model, tmp_path / "link", overwrite=True),
        lambda: sample.run(model, None, prompt=str(store), tokens_out=store, overwrite=True),
        lambda: evaluate.run(model, store, model, overwrite=True),
        lambda: features.run(model, store, store, overwrite=True),
        lambda: encode.run(str(store), store, palette=None, overwrite=True),
        lambda: pretrain.run(store, store, effective(PretrainFile), overwrite=True),
        lambda: finetune.run(model, store, model, effective(FinetuneFile), overwrite=True),
        lambda: importing.run("hf", model / "model.safetensors", model, overwrite=True),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match="what this command reads"):
            run()
        assert sorted(tmp_path.rglob("*")) == before


def test_no_target_is_a_part_of_an_artifact(tmp_path, checkpoints, tokens):
    model, store = shutil.copytree(checkpoints["ar"], tmp_path / "m"), shutil.copytree(tokens, tmp_path / "t.zarr")
    (tmp_path / "link").symlink_to(store)
    for run in (
        lambda: evaluate.run(model, store, by_position=store / "zarr.json", overwrite=True),
        lambda: evaluate.run(model, store, tmp_path / "link" / "tokens" / "zarr.json", overwrite=True),
        lambda: sample.run(model, store / "tokens" / "c" / "0" / "0", overwrite=True),
        lambda: sample.run(model, None, tokens_out=model / "model.safetensors", overwrite=True),
        lambda: encode.run("digits", model / "best.safetensors", palette=None, scheme="gray", size=8),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match=r"which would be broken|what this command reads"):
            run()
        assert sorted(tmp_path.rglob("*")) == before
    targets.check_target(model / "evaluated.json", False)  # a file of one's own, beside the artifact's


def test_what_stands_in_a_folder_that_is_read_is_not_replaced(tmp_path, checkpoints, tokens):
    theirs, plan = tmp_path / "hf", tmp_path / "plan"
    for path in (theirs / "weights.bin", plan / "manifest.json", plan / "cells" / "a" / "result.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
    numbers = tmp_path / "numbers.json"
    evaluate.run(checkpoints["ar"], tokens, numbers)
    for target, read in ((theirs / "weights.bin", theirs), (numbers, [numbers]), (plan / "cells/a/result.json", plan)):
        with pytest.raises(UsageError, match="what this command reads"):
            targets.check_apart([target], [read])
    targets.check_apart([numbers, tmp_path / "new"], [tmp_path])  # an artifact in a folder of pictures is made again
    shutil.copy(numbers, plan / "fit.json")
    targets.check_apart([plan / "fit.json"], [plan])  # so is a fit beside the cells it is made of


def test_labels_beside_a_file_are_read_too(tmp_path):
    np.save(tmp_path / "cats.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "cats_labels.npy", np.arange(2))
    for run in (
        lambda out: encode.run(str(tmp_path / "cats.npy"), out, scheme="gray", size=8, overwrite=True),
        lambda out: palette.run_fit(str(tmp_path / "cats.npy"), out, colors=2, size=8, overwrite=True),
    ):
        with pytest.raises(UsageError, match="what this command reads"):
            run(tmp_path / "cats_labels.npy")
    assert names(tmp_path) == ["cats.npy", "cats_labels.npy"]


def test_a_folder_where_one_may_write_and_not_look(tmp_path, monkeypatch):
    opened = os.open

    def refused(path, *more):
        if str(path) == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *more)

    monkeypatch.setattr(os, "open", refused)
    with owning.writing(tmp_path / "x") as new:
        new.write_text("whole")
    assert names(tmp_path) == ["x"]


def test_numbered_pictures_of_others_stay(tmp_path, tokens):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "000000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(PixseqError, match="theirs is a folder that pixseq did not make"):
        decode.run(tokens, tmp_path / "x.png", images_dir=theirs, overwrite=True)
    assert names(theirs) == ["000000.png"]
    for _ in range(2):
        decode.run(tokens, tmp_path / "x.png", images_dir=ours, overwrite=True, first=0, count=2)
    assert names(ours) == ["000000.png", "000001.png"]


def test_the_names_of_unfinished_targets_are_no_targets(tmp_path):
    with pytest.raises(KeyboardInterrupt), owning.own(tmp_path / "x.zarr", False, "encode", resumable=True) as partial:
        store(partial / "tokens", "{}")
        raise KeyboardInterrupt
    before = names(tmp_path / "x.zarr.partial")
    with pytest.raises(UsageError, match="has the name of what is unfinished"):
        encode.run("digits", tmp_path / "x.zarr.partial", palette=None, scheme="gray", size=8, overwrite=True)
    assert names(tmp_path / "x.zarr.partial") == before


@pytest.mark.parametrize("command, resumable", [("import", False), ("encode", True)])
def test_a_command_refuses_what_another_one_can_go_on_with(tmp_path, command, resumable):
    partial = tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt), owning.own(tmp_path / "x", False, "pretrain", resumable=True):
        (partial / "log.jsonl").write_text("{}")
        raise KeyboardInterrupt
    told = f"holds an interrupted pretrain, and this is {command}"
    for overwrite in (False, True):
        with pytest.raises(PixseqError, match=told), owning.own(tmp_path / "x", overwrite, command, resumable):
            pass
    assert (partial / "log.jsonl").exists()
    with owning.own(tmp_path / "x", False, "pretrain", resumable=True):  # its own goes on
        assert (partial / "log.jsonl").exists()


def test_what_a_killed_command_left_that_cannot_go_on_is_no_hindrance(tmp_path):
    child(f"with owning.writing(here / 'x') as new: new.write_text('half'); {DIE}", tmp_path)
    assert names(tmp_path) == ["x.partial"]
    with owning.writing(tmp_path / "x", command="probe") as new:
        assert not new.exists()
        new.write_text("whole")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "whole"


@pytest.mark.parametrize(
    "name", [".tmppHDqV3", "features/zarr.{}.partial", "zarr.{}.partial", "features/c/0/0.{}.partial"]
)
def test_what_a_killed_library_was_writing_is_no_hindrance_and_not_published(tmp_path, name):
    with owning.own(tmp_path / "x", False, "pretrain", resumable=True) as partial:
        (partial / "log.jsonl").write_text("{}")
        debris = partial / name.format("2fec1b26c6d54235907ad20546d05614")
        debris.parent.mkdir(parents=True, exist_ok=True)
        debris.write_bytes(b"half a")
    with owning.resuming(tmp_path / "x", False, "pretrain") as partial:
        assert (partial / "log.jsonl").exists() and not debris.exists()


def test_safetensors_and_zarr_write_first_under_names_that_are_known(tmp_path):
    """A reader of the folder meanwhile sees them; they are what a kill leaves."""
    code = """
import threading, numpy as np, torch, zarr
from pixseq.artifacts import layout
from pixseq.artifacts.checkpoint import save_weights
seen, done = set(), threading.Event()
def look():
    while not done.is_set():
        for folder, _, files in os.walk(here):
            seen.update(files)
watch = threading.Thread(target=look, daemon=True)
watch.start()
(here / "z").mkdir()
for i in range(3000):
    save_weights(here / "model.safetensors", {"x": torch.zeros(300_000)})
    zarr.save_array(here / "z" / str(i), np.zeros(300_000))
    if i > 30 and any(layout.DEBRIS.fullmatch(name) for name in seen):  # the watch may get no turn for long
        break
done.set()
watch.join()
print(*seen)
"""
    done = child(code, tmp_path)
    known = {"model.safetensors", "model.safetensors.new", "zarr.json", "0"}
    others = set(done.stdout.split()) - known
    assert not done.returncode and others and all(layout.DEBRIS.fullmatch(name) for name in others), done


def test_a_link_is_never_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    (tmp_path / "x.partial").symlink_to(precious)
    for resumable in (False, True):
        with pytest.raises(PixseqError, match="is a link"), owning.own(tmp_path / "x", True, "encode", resumable):
            pass
    assert names(precious) == ["thesis.txt"]


@pytest.mark.parametrize("where", ["thesis.txt", "photos/a.jpg", "tokens/c/0/notes"])
def test_files_of_others_stay_and_are_named(tmp_path, where):
    for folder in (tmp_path / "x.partial", store(tmp_path / "y", "{}")):
        (folder / where).parent.mkdir(parents=True, exist_ok=True)
        (folder / where).write_text("x")
        layout.delete(folder)
        assert (folder / where).exists()
    for name, overwrite in (("x", False), ("y", True)):
        store(tmp_path / "y2", "{}")
        os.replace(tmp_path / "y2" / "zarr.json", tmp_path / "y" / "zarr.json")
        (tmp_path / "y2").rmdir()
        with pytest.raises(PixseqError, match=where), owning.writing(tmp_path / name, overwrite):
            pass
        assert any(tmp_path.rglob(os.path.basename(where)))


def test_a_partial_that_is_a_file_or_tells_no_owner_is_left(tmp_path):
    (tmp_path / "x.partial").write_text("a download")
    with pytest.raises(PixseqError, match="is a file"), owning.writing(tmp_path / "x"):
        pass
    store(tmp_path / "y.partial", "old")
    with pytest.raises(PixseqError, match="does not tell which command"), owning.writing(tmp_path / "y"):
        pass
    assert (tmp_path / "x.partial").read_text() == "a download" and read(tmp_path / "y.partial") == "old"


STEPS = ["locking.write_owner", "disk.flush", "publishing._exchange", "disk.fsync", "publishing.delete"]
STEPS += ["locking.forget_owner"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_of_publishing_leaves_the_old_or_the_new(tmp_path, step, late):
    """Before and after each step: the target is whole all the time, and the next command finishes or begins anew."""
    store(tmp_path / "x", "old")
    code = f"""
with owning.own(here / 'x', True, 'pretrain', resumable=True) as partial:
    (partial / 'zarr.json').write_text('new')
    step = {step}
    def killed(*args, **kwargs):
        if {late}: step(*args, **kwargs)
        {DIE}
    {step} = killed
    publishing.publish(partial, here / 'x', True)
"""
    run = child(code, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert read(tmp_path / "x") in ("old", "new")
    swapped = read(tmp_path / "x") == "new"
    with owning.own(tmp_path / "x", True, "pretrain", resumable=True) as partial:
        # what is left to go on with is the new one, never what it replaced
        assert not layout.holds_work(partial) if swapped else read(partial) == "new"
        if not swapped:
            publishing.publish(partial, tmp_path / "x", True)
    assert read(tmp_path / "x") == "new" and names(tmp_path) == ["x"] and names(tmp_path / "x") == ["zarr.json"]


@pytest.mark.parametrize("killed", [1, 2, 3])
@pytest.mark.parametrize("resumable", [False, True])
def test_a_swap_without_help_of_the_system_is_finished_or_undone(tmp_path, killed, resumable):
    """Two renames in place of one step: the next command gives the target its name back, or deletes the old one."""
    store(tmp_path / "x", "old")
    interrupted = tmp_path / "x.old.partial"  # of another target, x.old
    interrupted.mkdir()
    (interrupted / "log.jsonl").write_text("{}")
    child(
        f"""
rename, renames = os.rename, [1]
def counted(a, b):
    if len(renames) == {killed}: {DIE}
    renames.append(rename(a, b))
with owning.own(here / 'x', True, 'pretrain', resumable={resumable}) as partial:
    made = partial if {resumable} else partial / 'made'
    made.mkdir(exist_ok=True)
    (made / 'zarr.json').write_text('new')
    publishing._renamed = lambda *how: False
    os.rename = counted
    if {killed} == 3: publishing.delete = lambda path: {DIE}
    publishing.publish(made, here / 'x', True)
""",
        tmp_path,
    )
    with pytest.raises(PixseqError, match="already exists"), owning.own(tmp_path / "x", False, "pretrain", resumable):
        pass
    with owning.own(tmp_path / "x", True, "pretrain", resumable):
        assert read(tmp_path / "x") == ("new" if killed == 3 else "old")
    assert names(tmp_path / "x") == ["zarr.json"] and names(interrupted) == ["log.jsonl"]


def test_a_swap_that_fails_in_its_middle_is_undone(tmp_path, monkeypatch):
    store(tmp_path / "x", "old")
    monkeypatch.setattr(publishing, "_renamed", lambda *how: False)
    with pytest.raises(FileNotFoundError), owning.writing(tmp_path / "x", True):
        monkeypatch.setattr(disk, "flush", lambda path: None)  # nothing was made, and nobody notices before
    assert read(tmp_path / "x") == "old" and names(tmp_path) == ["x"]


def test_what_was_published_in_between_is_not_replaced(tmp_path, monkeypatch):
    """Both found no target; the second waited for the first's lock to go, or wrote without any."""
    taken = owning._locked

    def late(target, partial):
        (tmp_path / "x").write_text("theirs")
        return taken(target, partial)

    monkeypatch.setattr(owning, "_locked", late)
    with pytest.raises(PixseqError, match="already exists"), owning.writing(tmp_path / "x"):
        pass
    monkeypatch.undo()
    for resumable in (False, True):
        with (
            pytest.raises(PixseqError, match="appeared while"),
            owning.own(tmp_path / "y", False, "encode", resumable) as partial,
        ):
            made = partial if resumable else partial / "made"
            store(made / "a", "ours") if resumable else made.write_text("ours")
            (tmp_path / "y").write_text("theirs")
            publishing.publish(made, tmp_path / "y", False)
        assert (tmp_path / "y").read_text() == "theirs"
        (tmp_path / "y").unlink()
    assert (tmp_path / "y.partial" / "a" / "zarr.json").exists()  # to go on with


def test_a_file_put_into_the_old_one_meanwhile_stays(tmp_path):
    store(tmp_path / "x", "old")
    with pytest.raises(PixseqError, match="thesis"), owning.writing(tmp_path / "x", True) as new:
        store(new, "new")
        (tmp_path / "x" / "thesis.txt").write_text("x")
    assert read(tmp_path / "x") == "old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "000001.png", "notes"])
def test_names_of_other_kinds_of_folders_are_foreign(tmp_path, name):
    """A README.md is pixseq's in an exported model, and the user's in a checkpoint or a store."""
    for kind, files in (("store", ["zarr.json"]), ("checkpoint", ["manifest.json", "codec.json", "model.safetensors"])):
        folder = tmp_path / kind
        folder.mkdir()
        for made in (*files, name):
            (folder / made).write_text("{}")
        with pytest.raises(PixseqError, match=name), owning.writing(folder, True):
            pass
        assert (folder / name).exists()


def test_fifos_are_foreign_and_hang_nothing(tmp_path):
    for folder, name in ((tmp_path / "x.partial", "owner.json"), (store(tmp_path / "y", "{}"), "zarr.json.new")):
        folder.mkdir(exist_ok=True)
        os.mkfifo(folder / name)
    for target in ("x", "y"):
        with pytest.raises(PixseqError, match="which pixseq did not make"), owning.writing(tmp_path / target, True):
            pass


def test_a_resumable_and_another_run_of_one_command_are_two(tmp_path):
    """Steps that pretrain keeps have targets of their own; an interrupted run of that very name is not theirs."""
    with owning.own(tmp_path / "x", False, "pretrain", resumable=True) as partial:
        (partial / "log.jsonl").write_text("{}")
    with pytest.raises(PixseqError, match="interrupted pretrain"), owning.writing(tmp_path / "x", True, "pretrain"):
        pass
    assert (partial / "log.jsonl").exists()


def test_a_full_disk_is_named(tmp_path):
    for making in (owning.own(tmp_path / "x", False, "pretrain", resumable=True), owning.writing(tmp_path / "x")):
        with pytest.raises(PixseqError, match=f"disk is full: {tmp_path}/x"), making:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_owner_records_of_any_form_are_read_or_left(tmp_path):
    record = {"command": "a", "resumable": True, "process": 1, "host": "b"}
    wrong = [json.dumps({**record, key: None}) for key in record]
    for text in ("", "[", "[]", "{}", '{"command": 1}', "[" * 100_000, *wrong):
        (tmp_path / "owner.json").write_text(text)
        assert locking.read_owner(tmp_path) is None
    (tmp_path / "owner.json").write_text(json.dumps(record))
    assert locking.read_owner(tmp_path)["command"] == "a"


def test_a_folder_that_takes_no_names_is_told(tmp_path, monkeypatch):
    """As /proc does, which says that there is no such file."""

    def none(self, *args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    target = tmp_path / "x.json"
    with monkeypatch.context() as patch:
        patch.setattr(type(target), "mkdir", lambda self, *a, **k: none(self) if self.suffix == ".partial" else None)
        told = pytest.raises(PixseqError, match=r"cannot make .*x\.json\.partial: No such file")
        with told, owning.own(target, False, "x"):
            pass
