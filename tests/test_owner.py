"""One owner of a target, from begin to publish: kills at every step, two at once, strangers' files, links."""

import json
import os
import signal
import subprocess
import sys

import pytest

from pixseq.artifacts import atomic, layout
from pixseq.errors import PixseqError


def child(code, *args):
    """Run `code` in another process, where `atomic` and the folder `here` are at hand; returns what it left behind."""
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom pixseq.artifacts import atomic\n"
    head += "here = Path(sys.argv[1])\n"
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
    with atomic.own(tmp_path / "x", False, "encode", resumable=True):
        other = child("with atomic.own(here / 'x', False, 'import'): pass", tmp_path)
    assert "another process is writing" in other.stderr and f"encode, process {os.getpid()} on" in other.stderr
    assert names(tmp_path) == []


def test_a_stage_owns_its_targets_while_it_computes(tmp_path):
    @atomic.owns("measure", "out", "plot")
    def run(out, plot=None, overwrite=False):
        other = child("with atomic.writing(here / 'x') as new: new.write_text('theirs')", tmp_path)
        assert "another process is writing" in other.stderr
        with atomic.writing(out, overwrite, "measure") as new:
            new.write_text("ours")

    run(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "ours" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("command, resumable", [("import", False), ("encode", True)])
def test_a_command_refuses_what_another_one_can_go_on_with(tmp_path, command, resumable):
    partial = tmp_path / "x.partial"
    with pytest.raises(KeyboardInterrupt), atomic.own(tmp_path / "x", False, "pretrain", resumable=True):
        (partial / "log.jsonl").write_text("{}")
        raise KeyboardInterrupt
    told = f"holds an interrupted pretrain, and this is {command}"
    for overwrite in (False, True):
        with pytest.raises(PixseqError, match=told), atomic.own(tmp_path / "x", overwrite, command, resumable):
            pass
    assert (partial / "log.jsonl").exists()
    with atomic.own(tmp_path / "x", False, "pretrain", resumable=True):  # its own goes on
        assert (partial / "log.jsonl").exists()


def test_what_a_killed_command_left_that_cannot_go_on_is_no_hindrance(tmp_path):
    child(f"with atomic.writing(here / 'x') as new: new.write_text('half'); {DIE}", tmp_path)
    assert names(tmp_path) == ["x.partial"]
    with atomic.writing(tmp_path / "x", command="probe") as new:
        assert not new.exists()
        new.write_text("whole")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "whole"


def test_a_link_is_never_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    (tmp_path / "x.partial").symlink_to(precious)
    for resumable in (False, True):
        with pytest.raises(PixseqError, match="is a link"), atomic.own(tmp_path / "x", True, "encode", resumable):
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
        with pytest.raises(PixseqError, match=where), atomic.writing(tmp_path / name, overwrite):
            pass
        assert any(tmp_path.rglob(os.path.basename(where)))


def test_a_partial_that_is_a_file_or_tells_no_owner_is_left(tmp_path):
    (tmp_path / "x.partial").write_text("a download")
    with pytest.raises(PixseqError, match="is a file"), atomic.writing(tmp_path / "x"):
        pass
    store(tmp_path / "y.partial", "old")
    with pytest.raises(PixseqError, match="does not tell which command"), atomic.writing(tmp_path / "y"):
        pass
    assert (tmp_path / "x.partial").read_text() == "a download" and read(tmp_path / "y.partial") == "old"


STEPS = ["_write_owner", "flush", "_exchange", "_fsync", "delete", "_forget_owner"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_of_publishing_leaves_the_old_or_the_new(tmp_path, step, late):
    """Before and after each step: the target is whole all the time, and the next command finishes or begins anew."""
    store(tmp_path / "x", "old")
    code = f"""
with atomic.own(here / 'x', True, 'pretrain', resumable=True) as partial:
    (partial / 'zarr.json').write_text('new')
    step = atomic.{step}
    def killed(*args, **kwargs):
        if {late}: step(*args, **kwargs)
        {DIE}
    atomic.{step} = killed
    atomic.publish(partial, here / 'x')
"""
    run = child(code, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert read(tmp_path / "x") in ("old", "new")
    swapped = read(tmp_path / "x") == "new"
    with atomic.own(tmp_path / "x", True, "pretrain", resumable=True) as partial:
        # what is left to go on with is the new one, never what it replaced
        assert not atomic.holds_work(partial) if swapped else read(partial) == "new"
        if not swapped:
            atomic.publish(partial, tmp_path / "x")
    assert read(tmp_path / "x") == "new" and names(tmp_path) == ["x"] and names(tmp_path / "x") == ["zarr.json"]


def test_a_swap_without_help_of_the_system_is_undone(tmp_path, monkeypatch):
    store(tmp_path / "x", "old")
    renames = iter([os.rename])

    def rename(a, b):
        next(renames, sys.exit)(a, b)

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(atomic.os, "rename", rename)
    with pytest.raises(TypeError), atomic.writing(tmp_path / "x", True) as new:
        store(new, "new")
    monkeypatch.undo()
    assert not (tmp_path / "x").exists()
    atomic.check_target(tmp_path / "x", True)
    assert read(tmp_path / "x") == "old"


def test_owner_records_of_any_form_are_read_or_left(tmp_path):
    for text in ("", "[", "[]", "{}", '{"command": 1}', "[" * 100_000, '{"command": "a", "resumable": "yes"}'):
        (tmp_path / "owner.json").write_text(text)
        assert atomic.read_owner(tmp_path) is None
    (tmp_path / "owner.json").write_text(json.dumps({"command": "a", "resumable": True}))
    assert atomic.read_owner(tmp_path)["command"] == "a"
