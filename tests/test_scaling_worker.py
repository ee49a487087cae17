"""The processes that run cells: several cells each, one device each, and what a dead one takes with it."""

import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import write_tokens

from pixseq import signals
from pixseq.errors import INTERRUPTED, Interrupted
from pixseq.runtime import JOBS, devices_for, machine
from pixseq.studies import plan, run, worker
from pixseq.studies.study import open_study
from pixseq.studies.worker import STOPPED, Worker


@pytest.mark.parametrize(
    "device, count, jobs, devices",
    [
        ("auto", 0, 3, ["auto"] * 3),
        ("auto", 1, 2, ["auto"] * 2),
        ("auto", 2, 5, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 8, 8, [f"cuda:{i}" for i in range(8)]),
        ("cuda:1", 8, 2, ["cuda:1"] * 2),
        ("cpu", 8, 2, ["cpu"] * 2),
    ],
)
def test_jobs_go_round_the_devices(monkeypatch, device, count, jobs, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert devices_for(device, jobs) == devices


@pytest.fixture
def study(tmp_path):
    write_tokens(tmp_path / "t.zarr", count=96)
    write_tokens(tmp_path / "v.zarr", count=48, seed=1, labels=False)
    (tmp_path / "g.yaml").write_text(
        f"data: {{train: {tmp_path}/t.zarr, val: {tmp_path}/v.zarr}}\nbudgets: [1.0e+9]\n"
        "batch: {steps: 12, smallest: 4}\ncompletions: {count: 0}\n"
    )
    plan.run(tmp_path / "g.yaml", tmp_path / "plan", timed=False)
    return open_study(tmp_path / "plan")


def wait(process):
    while (answer := process.answer()) is None:
        time.sleep(0.02)
    return answer


def test_one_process_runs_cell_after_cell_and_says_what_failed(study):
    ours = Worker.start(study, ["cpu"], "cpu", "fp32")
    for cell, error in (
        (study.cells[0], None),
        (replace(study.cells[0], id="r6-b9-s9"), "no cell 'r6-b9-s9'"),
        (study.cells[1], None),
    ):
        ours.give(cell)
        answer = wait(ours)
        assert answer == {"error": None} if error is None else error in answer["error"]
    assert ours.alive and [one.status for one in study.results()[:3]] == ["done", "done", "waiting"]
    ours.close()
    assert not ours.alive


def test_a_process_that_dies_says_so_and_one_that_is_stopped_ends(study):
    killed, stopped = (Worker.start(study, ["cpu"] * 2, "cpu", "fp32") for _ in range(2))
    killed.give(study.cells[0])
    killed.process.send_signal(signal.SIGKILL)
    assert "its process ended with -9" in wait(killed)["error"] and not killed.alive
    worker.stop([stopped])
    assert not stopped.alive
    for each in (killed, stopped):
        each.close()


def test_a_process_that_waits_answers_every_signal_that_asks_it_to_end(study):
    ours = [Worker.start(study, ["cpu"] * 2, "cpu", "fp32") for _ in signals.STOPPING]
    for each in ours:
        each.give(replace(study.cells[0], id="r6-b9-s9"))
    for each, number in zip(ours, signals.STOPPING):
        assert "no cell" in wait(each)["error"]
        each.process.send_signal(number)
        assert each.process.wait() == INTERRUPTED
        each.close()


def test_jobs_on_one_device_divide_its_memory(study, monkeypatch):
    monkeypatch.delenv(JOBS, raising=False)
    with machine("cpu") as where:
        alone = where.memory_bytes()
    told = []
    monkeypatch.setattr(worker.subprocess, "Popen", lambda *args, env, **more: told.append(env[JOBS]))
    for devices, device in ((["cpu"] * 3, "cpu"), (["cuda:0", "cuda:1", "cuda:0"], "cuda:0"), (["auto"], "auto")):
        Worker.start(study, devices, device, "fp32").errors.close()
    assert told == ["3", "2", "1"]
    monkeypatch.setenv(JOBS, "3")
    with machine("cpu") as where:
        assert where.memory_bytes() == alone // 3


def test_a_process_that_alone_is_stopped_has_not_failed(study, monkeypatch):
    study.rewrite(study.cells[:2])
    first, give = study.cells[0].id, Worker.give

    def give_and_stop(self, cell):
        give(self, cell)
        if cell.id == first:
            self.process.send_signal(signal.SIGTERM)

    monkeypatch.setattr(Worker, "give", give_and_stop)
    with pytest.raises(Interrupted, match=f"1 cells were stopped .* first {first}") as caught:
        run.run(study.path, device="cpu", precision="fp32")
    assert "run it again" in caught.value.hint
    assert study.results()[0].status != "done" and study.results()[1].status == "done"
    ours = Worker.start(study, ["cpu"], "cpu", "fp32")
    Worker.give(ours, study.cells[0])
    assert wait(ours) == {"error": STOPPED}
    assert run._rows(study, [], {first: STOPPED})[0][3] == "stopped"
    assert "stopped after" in run._line(study, ours, {first: STOPPED})
    ours.close()
