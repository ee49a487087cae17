"""A signal ends a run soon, with nothing lost: answered, saved, gone on from as if it had never come."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from pixseq import progress, signals
from pixseq.artifacts.checkpoint import has_state
from pixseq.artifacts.metrics import read_log
from pixseq.config import PretrainFile, effective
from pixseq.cores import threads
from pixseq.engine import training
from pixseq.engine.stopping import Stopping
from pixseq.engine.training import Limits
from pixseq.errors import Interrupted, Stop
from pixseq.runtime import Machine
from pixseq.stages import pretrain

CONFIG = effective(PretrainFile, sets=[*TINY, "train.log_every=1", "train.ema=0.9"])
LIMITS = Limits(micro_batch=2)


def go(tokens, out, **given):
    given = {"limits": LIMITS, "val_fraction": 0.1, "device": "cpu", "keep": "every:5", **given}
    return pretrain.run(tokens, out, CONFIG, **given)


def losses(path):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in read_log(path)]


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return SimpleNamespace(record=go(tokens, folder / "m"), log=losses(folder / "m" / "log.jsonl"))


def on_call(monkeypatch, name, number, act):
    """`act` when the function of pretrain is called for that time; returns a list of its calls."""
    real, calls = getattr(pretrain, name), []

    def called(*args):
        calls.append(name)
        if len(calls) == number:
            act()
        return real(*args)

    monkeypatch.setattr(pretrain, name, called)
    return calls


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_step_is_cut_short_and_made_again(tokens, whole, tmp_path, monkeypatch, capsys, name):
    calls = on_call(monkeypatch, "losses", 3 * 4 + 2, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(Interrupted, match=f"{name} after 3 of 12") as stop:
        go(tokens, tmp_path / "m")
    assert len(calls) == 3 * 4 + 2 and stop.value.code == 130 and "--resume" in stop.value.hint
    assert f"pretrain: {name}: stopping" in capsys.readouterr().err
    monkeypatch.undo()
    assert go(tokens, tmp_path / "m", resume=True)["id"] == whole.record["id"]
    assert losses(tmp_path / "m" / "log.jsonl") == whole.log


def test_a_validation_is_cut_short_and_made_again(tokens, whole, tmp_path, monkeypatch):
    """Each step has two: of the weights, and of their average. What is kept of a step is kept all the same."""
    calls = on_call(monkeypatch, "generative_loss", 5 * 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after 5 of 12"):
        go(tokens, tmp_path / "m")
    assert len(calls) == 5 * 2 and not (tmp_path / "m-step5").exists()
    assert [row["step"] for row in read_log(tmp_path / "m.partial" / "log.jsonl") if "val_loss" in row] == [1, 2, 3, 4]
    monkeypatch.undo()
    again = go(tokens, tmp_path / "m", resume=True)
    assert again["id"] == whole.record["id"] and again["summary"]["best"] == whole.record["summary"]["best"]
    assert losses(tmp_path / "m" / "log.jsonl") == whole.log and (tmp_path / "m-step5").is_dir()


def test_the_state_is_saved_while_a_library_call_keeps_python_waiting(tokens, tmp_path, monkeypatch):
    """As a long backward pass does: no handler of Python's can run before it returns."""
    saved = threading.Event()

    def from_outside():
        time.sleep(0.5)  # until the other thread waits
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not has_state(tmp_path / "m.partial") and time.monotonic() < deadline:
            time.sleep(0.01)
        if has_state(tmp_path / "m.partial"):
            saved.set()
        returned.set()

    returned = threading.Event()

    def long_call():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # so that the wait below is not interrupted
        threading.Thread(target=from_outside).start()
        returned.wait()

    on_call(monkeypatch, "losses", 3, long_call)
    try:
        with pytest.raises(Interrupted, match="after 0 of 12"):
            go(tokens, tmp_path / "m")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert saved.is_set()


def test_a_second_signal_does_not_break_the_save(capsys):
    saved, heard = [], []

    def save():
        if saved:
            return
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while "not cut short" not in "".join(heard) and time.monotonic() < deadline:
            time.sleep(0.01)
            heard.append(capsys.readouterr().err)
        saved.append(True)

    stop = Stopping("pretrain", Machine(torch.device("cpu"), "fp32"), save)
    with stop.listening():
        with pytest.raises(Stop), stop.may_be_cut():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        stop.save()
    assert saved == [True] and stop.asked == "SIGTERM"
    assert "SIGINT: the state is being saved, which is not cut short" in "".join(heard)


def test_several_ranks_end_together_and_the_first_saves_at_once():
    """None may leave a step before the others: it goes on, while what was done before it is saved."""
    saved = threading.Event()
    for rank in (0, 1):
        saved.clear()
        stop = Stopping("pretrain", Machine(torch.device("cpu"), "fp32", rank, 2), saved.set)
        with stop.listening():
            with stop.may_be_cut():
                os.kill(os.getpid(), signal.SIGTERM)
                assert saved.wait(60 if rank == 0 else 0.2) == (rank == 0)
            assert stop.asked == "SIGTERM"


def test_handlers_are_those_of_before_again(tokens, tmp_path):
    before = [signal.getsignal(number) for number in signals.STOPPING]
    go(tokens, tmp_path / "m")
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(signals.STOPPING) - set(signals.to_heed()) == {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_state_is_saved_early_and_resume_says_where_it_begins(tokens, tmp_path, monkeypatch, capsys):
    def killed():
        raise KeyboardInterrupt

    progress.enable()
    try:
        on_call(monkeypatch, "losses", 3 * 4, killed)
        with pytest.raises(KeyboardInterrupt):
            go(tokens, tmp_path / "m")
        assert not has_state(tmp_path / "m.partial")
        monkeypatch.undo()
        monkeypatch.setattr(training, "FIRST_SAVE_MINUTES", 0.0)
        on_call(monkeypatch, "losses", 3 * 4, killed)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            go(tokens, tmp_path / "m", resume=True)
        assert "no saved state in" in (said := capsys.readouterr().err) and "beginning at step 0" in said
        monkeypatch.undo()
        on_call(monkeypatch, "losses", 1, killed)
        with pytest.raises(KeyboardInterrupt):
            go(tokens, tmp_path / "m", resume=True)
        said = capsys.readouterr().err
        assert "going on from" in said and "no saved state" not in said
    finally:
        progress.enable(False)


def test_a_run_says_at_once_what_it_trains(tokens, tmp_path, monkeypatch, capsys):
    def killed():
        raise KeyboardInterrupt

    on_call(monkeypatch, "losses", 1, killed)
    progress.enable()
    try:
        with pytest.raises(KeyboardInterrupt):
            go(tokens, tmp_path / "m", val_fraction=None)
    finally:
        progress.enable(False)
    said = capsys.readouterr().err
    for part in ("2 layers of width 16", "parameters", "96 images of 36", "12 steps of 8 images (1 epochs)"):
        assert part in said
    for part in ("on cpu in fp32", "about ", f"it will be {tmp_path / 'm'}", "step 0 has begun"):
        assert part in said


def test_the_first_line_of_progress_does_not_wait_for_a_whole_step(monkeypatch, capsys):
    now = iter([0.0, *[5.0] * 20])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    progress.enable()
    try:
        bar = progress.Bar("pretrain", 100, "steps")
        bar.advance(0.05)
    finally:
        progress.enable(False)
    assert capsys.readouterr().err == "pretrain: 0.05/100 steps, 0.01/s, 2h46m left\n"


COMPUTING = """
import os, signal, sys, threading, time
import torch
from pixseq import cli, progress
torch.set_num_threads(1)
x = torch.randn(300, 300)
def compute():
    while True:
        x @ x
def insist():  # as a scheduler may
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGTERM)
def stage(path, **given):
    for _ in range(4):
        threading.Thread(target=compute, daemon=True).start()
    time.sleep(0.1)
    threading.Thread(target=insist, daemon=True).start()
    time.sleep(60)
from pixseq.stages import show
show.run = stage
sys.argv = ["pixseq", "show", "x"]
cli.main()
"""


def test_a_stopped_process_ends_with_its_own_code_whatever_its_threads_do(tmp_path):
    """The interpreter aborts where it must end threads that are in C++."""
    ended = subprocess.run([sys.executable, "-c", COMPUTING], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.count("error: stopped by SIGTERM") == 1 and "Traceback" not in ended.stderr


def test_a_signal_after_the_work_does_not_change_how_it_ended():
    code = "import os, signal, atexit; from pixseq import signals\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"  # run after those registered later
    code += "signals.heed()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_failure_in_a_thread_waits_for_what_the_others_do():
    begun, ended = threading.Barrier(2), []

    def work(number):
        begun.wait()
        if number == 0:
            raise ValueError("damaged")
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ValueError, match="damaged"), threads(2) as pool:
        list(pool.imap(work, range(2)))
    assert ended == [1]
