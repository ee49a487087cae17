"""bench: what is timed is what stages run, figures follow from times, and only what is here and fits is timed."""

import importlib.util
import json
import os
import platform
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from program import called

from pixseq.artifacts.metrics import read_metrics
from pixseq.bench import alone, ceilings, cost, drawn, models, peers, probing, reading, rounds, run
from pixseq.bench.settings import US, Copy, Product, Settings, Task, Work
from pixseq.cli.bench import _share, _table
from pixseq.engine.state import TrainState
from pixseq.engine.step import accumulate, share_of_batch
from pixseq.engine.training import Training
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.schedule import learning_rate, warmup_steps
from pixseq.runtime import Machine
from pixseq.stages import encode, palette, sample
from pixseq.stages import features as extraction
from pixseq.stages.pretrain import losses

TINY = Settings(
    sets=("model.n_layer=2", "model.d_model=16", "model.n_head=2"), size=4, colors=8, classes=3, count=60, batch_size=2
)
TINY_FLAGS = ["--size", "4", "--colors", "8", "--classes", "3", "--count", "60", "--batch-size", "2", "--rounds", "2"]
TINY_FLAGS += [word for each in TINY.sets for word in ("--set", each)]


# ---- figures


def test_rounds_take_turns_until_the_time_is_up():
    done = []
    calls = [lambda: done.append("a"), lambda: done.append("b")]
    times = rounds.interleaved(calls, 3, 60.0, lambda: done.append("settled"))
    assert done == ["a", "settled", "b", "settled"] * 3 and [len(each) for each in times] == [3, 3]
    assert [len(each) for each in rounds.interleaved(calls, 3, 0.0)] == [1, 1]  # one is always done


def test_a_ratio_is_of_times_of_one_round():
    """Where the machine slows down during the second round, both slow down."""
    assert rounds.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0
    assert rounds.spread([1.0, 2.0, 1.5]) == pytest.approx(1 / 1.5)


def test_figures_of_a_row():
    works = [Work(by, precision, lambda: None) for precision in ("fp32", "bf16") for by in (US, "transformers")]
    task = Task("", 100, "tokens", Product(1, 1, 1), 50.0, tuple(works))
    times = [[4.0, 4.0, 5.0], [8.0, 8.0, 8.0], [2.0, 2.0, 2.0], [3.0, 5.0, 4.0]]
    found = run.compared(task, times, {"fp32": 25.0, "bf16": 100.0}, "bf16")
    assert [row["ratio"] for row in found] == [1.0, 2.0, 1.0, 2.0]
    assert [row["ratio_to_auto"] for row in found] == [2.0, 4.0, 1.0, 2.0]
    assert [row["median_seconds"] for row in found] == [4.0, 8.0, 2.0, 4.0]
    assert [row["rate"] for row in found] == [25.0, 12.5, 50.0, 25.0]
    assert [row["share_of_ceiling"] for row in found] == [0.5, 0.25, 0.25, 0.125]
    assert found[3]["spread"] == 0.5 and found[3]["rounds"] == 3
    alone = run.compared(Task("", 1, "", Copy(), 1.0, (works[1],)), [[1.0]], {"fp32": 1.0}, "fp32")
    assert alone[0]["ratio"] is None and alone[0]["ratio_to_auto"] is None  # nothing of ours was timed


@pytest.mark.parametrize(
    ("load", "spreads", "said"),
    [
        (0.1, {"a": 0.02, "b": 0.2}, []),
        (1.5, {"a": 0.02}, ["before it began, 1.5 jobs were running on 2 cores"]),
        (0.1, {"a": 0.3, "b": 0.9, "c": 0.1}, ["rounds of 2 of 3 rows differ, of b by 90 %"]),
    ],
)
def test_whether_a_machine_is_calm(load, spreads, said):
    assert rounds.unrest(load, 2, spreads) == said


def test_shares_are_plain_numbers():
    told = [_share(share) for share in (None, 0.000049, 0.057, 0.57, 0.997, 1.2)]
    assert told == ["", "0.0049 %", "5.7 %", "57 %", "100 %", "120 %"]


def test_powers_are_those_of_the_large_end():
    """A fixed second hides the square of small sizes."""
    rows = [{"value": n, "median_seconds": 1 + (n / 100) ** 2, "peak_bytes": 7 * n} for n in (10, 1000, 10000)]
    found = cost.law("features", "pixels", rows)
    assert found["time_power"] == pytest.approx(2, abs=0.01) and found["memory_power"] == pytest.approx(1)
    assert found["said"].startswith("more than linear: every position attends")
    rows = [{"value": n, "median_seconds": 3.0 * n, "peak_bytes": 0} for n in (10, 20)]
    assert cost.law("features", "layers", rows)["said"] == ""


def test_a_peer_that_a_card_has_no_memory_for_is_left_out(bench):
    def none():
        raise torch.OutOfMemoryError

    works = [Work(US, "fp32", lambda: lambda: None), Work("transformers", "fp32", lambda: none)]
    found = run.timed(bench, Task("", 1, "tokens", Product(1, 1, 1), 4.0, tuple(works)), 1, 1.0)
    assert [row["by"] for row in found["rows"]] == [US] and found["left_out"] == ["transformers in fp32"]
    with pytest.raises(torch.OutOfMemoryError):
        run.timed(bench, Task("", 1, "tokens", Product(1, 1, 1), 4.0, (Work(US, "fp32", lambda: none),)), 1, 1.0)


# ---- what is timed


@pytest.fixture(autouse=True)
def one_try(monkeypatch):
    """Figures of a moment will do."""
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)


@pytest.fixture
def bench():
    with run.opened(TINY, ()) as opened:
        yield opened


OURS = {
    "palette": (palette, "run_fit"),
    "encode": (encode, "run"),
    "read": (reading, "Reader"),
    "pretrain": (Training, "step"),
    "features": (extraction, "activations"),
    "probe": (probing, "linear_probe"),
    "sample": (sample, "draw_pictures"),
}


@pytest.mark.parametrize("stage", OURS)
def test_our_work_is_what_the_stage_runs(stage, bench, monkeypatch):
    """And it needs no peer, and none of its files stay."""
    place, name = OURS[stage]
    real, asked = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *args, **kwargs: asked.append(name) or real(*args, **kwargs))
    (work,) = run.TASKS[stage](bench).works
    assert work.by == US
    work.prepare()()
    assert asked == [name]


def test_a_step_is_one_of_training(bench):
    """The weights after two calls are those of two steps, written out."""
    (work,) = models.pretrain(bench).works
    call = work.prepare()
    ours = call.func.__self__
    images, config = ours.images, ours.config
    twin = TrainState(models._model(bench, bench.where, images), config, None)
    warmup = warmup_steps(config.steps, len(images) / config.batch_size, config.warmup_epochs, config.warmup_fraction)
    for step in range(2):
        call()
        batch = share_of_batch(bench.where, images, config, step, twin.model)
        accumulate(bench.where, twin.model, twin.model, losses, batch, len(batch.images))
        twin.update(learning_rate(step, config.steps, config.lr, warmup, config.schedule))
    assert ours.run.step == 2
    for a, b in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_aim_is_timed_on_pixels():
    settings = Settings(preset="aim-cifar32", sets=(*TINY.sets, "model.head_depth=0"), size=8, batch_size=2)
    assert "sample" not in run.chosen_stages([], settings)
    assert peers.chosen([], ["pretrain", "features"], settings) == ()
    with run.opened(settings, ()) as bench:
        for stage in ("pretrain", "features"):
            for work in run.TASKS[stage](bench).works:
                work.prepare()()
        with pytest.raises(UsageError, match="draws no pictures"):
            run.TASKS["sample"](bench)


def test_what_is_drawn_repeats_and_takes_its_sizes():
    assert np.array_equal(drawn.pictures(3, 8, 5), drawn.pictures(3, 8, 5))
    assert drawn.pictures(2000, 4, 0).std() > 20  # not one colour
    X, y = drawn.features(90, 6, 3, 0)
    assert X.shape == (90, 6) and X.dtype == np.float32 and np.bincount(y).tolist() == [30, 30, 30]
    assert drawn.tokens(4, 9, 5, 0).max() < 5


# ---- the machine


def test_ceilings_count_what_is_done(monkeypatch):
    where = Machine(torch.device("cpu"), "fp32")
    monkeypatch.setattr(ceilings, "_least", lambda call, settle: call() or 2.0)
    assert ceilings.rate(Product(3, 4, 5, copies=7), where, "fp32") == 7 * 2 * 3 * 4 * 5 / 2.0
    monkeypatch.setattr(ceilings, "_least", lambda call, settle: 2.0)
    assert ceilings.rate(Copy(), where, "fp32") == ceilings.COPIED


def test_a_gpu_is_waited_for():
    assert ceilings.settle(Machine(torch.device("cuda"), "bf16")) is torch.cuda.synchronize


def test_a_table_of_a_card_tells_what_of_it_is_used(bench, monkeypatch):
    monkeypatch.setattr(run, "peak_rate", lambda where: {"fp32": 8.0, "bf16": 40.0}[where.precision])
    monkeypatch.setattr(rounds, "interleaved", lambda calls, *rest: [[2.0]] * len(calls))
    works = [Work(US, precision, lambda: lambda: None) for precision in ("fp32", "bf16")]
    found = run.timed(bench, Task("", 1, "tokens", Product(1, 1, 1), 4.0, tuple(works)), 1, 1.0)
    assert [row["mfu"] for row in found["rows"]] == [0.25, 0.05]
    assert run.timed(bench, Task("", 1, "images", Copy(), 4.0, (works[0],)), 1, 1.0)["rows"][0]["mfu"] is None
    unrest = {"load": 0.0, "cores": 2, "threads": 2, "memory_bytes": 1 << 30, "torch": "2", "auto": "bf16"}
    numbers = {"stages": [{"stage": "pretrain", **found}], "machine": unrest | {"gpu": "H100"}, "calm": True}
    assert _table(numbers).splitlines()[1].endswith("25 %")


def test_threads_are_limited_and_given_back():
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with ceilings.limited(1):
        assert (torch.get_num_threads(), len(os.sched_getaffinity(0))) == (1, 1)
    assert torch.get_num_threads() == before and os.sched_getaffinity(0) == cores


# ---- peers

NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 1
    vocab_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        print("talks")

    def forward(self, idx, targets):
        assert idx.shape == targets.shape and idx.shape[1] == self.config.block_size
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("talks")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs `pixseq bench` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: called("bench", *words)


@pytest.mark.filterwarnings("ignore")  # peers'
def test_every_stage_beside_its_peers_as_one_line_of_json(cli, tmp_path):
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(NANOGPT)
    code, out, err = cli(*TINY_FLAGS, "--nanogpt", "nanoGPT", "--json", "-o", "bench.json")
    assert code == 0, err
    numbers = json.loads(out)
    assert out.count("\n") == 1 and "talks" not in out
    assert [each["stage"] for each in numbers["stages"]] == list(run.TASKS)
    for each in numbers["stages"]:
        found = {row["by"] for row in each["rows"]}
        assert {US, *peers.OF_STAGES[each["stage"]]} - {"faiss"} <= found
        for row in each["rows"]:
            assert row["median_seconds"] > 0 and row["ratio"] > 0 and row["spread"] >= 0
            assert row["share_of_ceiling"] > 0 and row["rate"] > 0 and 1 <= row["rounds"] <= 2
            assert row["ratio"] == 1 or row["by"] != US
        assert all(limit["rate"] > 0 and limit["unit"] in ("FLOP/s", "bytes/s") for limit in each["ceilings"])
    assert isinstance(numbers["calm"], bool) and numbers["machine"]["threads"] >= 1
    kept = read_metrics("bench.json")[1]
    assert kept["stages"] == numbers["stages"]


def test_a_table_has_a_line_a_row(cli):
    code, out, err = cli("probe", *TINY_FLAGS, "--peer", "none")
    assert code == 0, err
    head, row = out.splitlines()[:2]
    assert head.split()[:5] == ["stage", "by", "precision", "median", "spread"] and head.endswith("result")
    assert row.startswith("probe  pixseq") and "objective" in row and "product 60x16 by 16x16" in out


def test_peers_are_of_the_size_of_ours(bench):
    """Image GPT in transformers has biases, and one row more for sos; the weights of matrices are as many."""
    shape = TINY.shape()
    theirs = peers._image_gpt(bench, bench.where)
    matrices = sum(p.numel() for name, p in theirs.named_parameters() if p.ndim == 2 and ".h." in name)
    assert matrices == shape.block_count()
    assert peers._shifted(bench, bench.where)[:, 1:].equal(peers._batch(bench, bench.where)[:, :-1])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["paint"], 2, "choose among palette, encode"),
        (["probe", "--peer", "jax"], 2, "choose among scikit-learn"),
        (["probe", "--peer", "transformers"], 2, "peers of those: scikit-learn"),
        (["encode", "--peer", "faiss"], 1, "pip install faiss-cpu"),
        (["pretrain", "--peer", "nanogpt"], 2, "--nanogpt DIR"),
        (["pretrain", "--nanogpt", "."], 1, "holds no model.py"),
        (["probe", "--peer", "none", "--peer", "scikit-learn"], 2, "goes with no other"),
        (["--cost", "--peer", "none"], 2, "of ours alone"),
        (["sample", "--set", "model.objective=bert"], 2, "draws no pictures"),
        (["probe", "--set", "model.n_head=7"], 2, "heads"),
    ],
    ids=str,
)
def test_what_cannot_be_timed_is_told(words, code, said, cli, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "faiss" else real(name, *rest))
    got, out, err = cli(*words)
    assert got == code and out == "" and said in err and "Traceback" not in err


def test_who_is_not_installed_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(peers.progress, "note", lambda text: print(text))
    monkeypatch.setattr(peers, "_is_here", lambda name: name != "faiss")
    assert peers.chosen([], ["encode"], TINY) == ("scikit-learn",)
    assert "pip install faiss-cpu" in capsys.readouterr().out


def test_a_file_that_is_no_nanogpt_is_told(tmp_path):
    (tmp_path / "model.py").write_text("x = 1")
    with pytest.raises(PixseqError, match=r"no model\.py of nanoGPT"):
        peers._loaded(tmp_path / "model.py")


# ---- cost


def test_cost_against_a_size_is_of_processes_of_their_own():
    sizes = {"palette": (cost.IMAGES._replace(multiples=(1, 10)),)}
    numbers = cost.run(["palette"], TINY, most_rounds=1, sizes=sizes)
    assert [row["value"] for row in numbers["rows"]] == [60, 600]
    assert all(row["median_seconds"] > 0 for row in numbers["rows"])
    assert min(row["peak_bytes"] for row in numbers["rows"]) > 100 << 20  # the histogram of all colours
    assert numbers["laws"][0]["size"] == "images"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked to give memory back")
def test_memory_that_was_freed_before_a_call_counts_where_the_call_takes_it_again():
    def blocks():
        return [np.ones(1 << 16, np.uint8) for _ in range(1000)]  # small enough to be kept when they are freed

    first, above = blocks(), np.ones(1 << 16, np.uint8)
    del first
    before = alone._forget_peak("cpu")
    again = blocks()
    assert alone._peak("cpu") - before > 50 << 20
    del again, above


def test_sizes_change_what_they_name():
    named = {cost.PIXELS: "size", cost.COLORS: "colors", cost.IMAGES: "count", cost.CLASSES: "classes"}
    named |= {cost.BATCH: "batch_size", cost.LAYERS: "sets", cost.WIDTH: "sets"}
    assert {size for found in cost.SIZES.values() for size in found} == set(named) and set(cost.SIZES) == set(run.TASKS)
    for size, field in named.items():
        for value in size.values(Settings()):
            grown = size.of(Settings(), value)
            assert size.read(grown) == value
            assert replace(grown, **{field: getattr(Settings(), field)}) == Settings()
            grown.shape()  # which can be
    assert cost.PIXELS.values(Settings()) == [8 * 8, 16 * 16, 32 * 32, 48 * 48]


def dies(*_):
    os._exit(1)


def test_a_process_that_fails_or_is_killed_is_told(monkeypatch):
    broken = replace(TINY, sets=("model.objective=bert",))
    with pytest.raises(UsageError, match="draws no pictures"):
        alone.measured(broken, "sample", US, "fp32")
    monkeypatch.setattr(alone, "measure", dies)
    with pytest.raises(PixseqError, match="killed, perhaps for its memory, at size 4"):
        alone.measured(TINY, "sample", US, "fp32")


def test_medians_of_rounds_stand_in_the_rows():
    taken = {"seconds": [3.0, 1.0, 2.0], "peak_bytes": 5}
    assert cost._figures(taken) == {"median_seconds": statistics.median([1, 2, 3]), "spread": 1.0, "peak_bytes": 5}
