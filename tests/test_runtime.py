"""What a machine is said to be: its precision, its cores, and what a step may not wait for on it."""

import math
import platform
import resource
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from card import NothingIsAwaited
from conftest import TINY
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixseq import cores, progress
from pixseq.artifacts.metrics import read_log
from pixseq.bench.models import Undisturbed, Unwritten
from pixseq.config import PretrainFile, effective
from pixseq.engine import cost, training
from pixseq.engine.batches import augment
from pixseq.engine.images import Images, moved_on_device
from pixseq.engine.prefetch import Prefetch
from pixseq.engine.state import TrainState, average
from pixseq.engine.step import Batch, Counts, accumulate, gradient_norm
from pixseq.engine.training import Limits, Training
from pixseq.errors import Diverged, UsageError
from pixseq.models.aim import AIM, AimShape, colours_on
from pixseq.models.attention_mask import prefix_block_mask
from pixseq.models.igpt import IgptShape, ImageGPT
from pixseq.runtime import Machine, _has_bf16_units, compiled, machine, rates
from pixseq.runtime.cuda import on_the_way
from pixseq.runtime.rates import peak_rate
from pixseq.stages import pretrain

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("chip", "units"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),  # half of the fp32 rate
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, False),  # emulated
        ({"bf16": True, "sve_bf16": True}, True),
        ({"neon": True, "sve_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_chosen_where_the_chip_is_faster_in_it(monkeypatch, chip, units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: chip)
    assert _has_bf16_units(torch.device("cpu")) is units


@pytest.mark.parametrize(("capability", "units"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_chosen_on_cuda_from_ampere_on(monkeypatch, capability, units):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _has_bf16_units(torch.device("cuda", 0)) is units


@pytest.mark.parametrize(
    ("device", "environment", "told"),
    [
        ("cuda:2", {}, "there is no cuda:2: torch sees 2 CUDA devices here"),
        ("cuda:x", {}, "there is no device 'cuda:x'"),
        ("cuda:01", {}, "there is no device 'cuda:01'"),
        ("cuda:99", {}, "there is no cuda:99"),
        ("cuda:200", {}, "there is no device 'cuda:200'"),  # for torch a number below 0
        ("cuda", {"LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "3"}, "there is no cuda:2"),
        ("cuda:0", {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "several processes of one run cannot share cuda:0"),
    ],
)
def test_a_card_that_is_not_there_is_told(monkeypatch, device, environment, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told), machine(device, ranks=True):
        pass


def test_each_process_joins_the_others_with_its_card(monkeypatch):
    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *how, **more: joined.append((*how, more)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: joined.append("over"))
    for name, value in {"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    card = torch.device("cuda", 1)
    with machine("cuda", "fp32", ranks=True) as where:
        assert (where.device, where.rank, where.world, where.sharers) == (card, 3, 4, 1)
    assert joined == [card, ("nccl", {"device_id": card}), "over"]
    with pytest.raises(Diverged), machine("cuda", "fp32", ranks=True):
        raise Diverged("", "")  # and does not wait for the others, which may never end
    assert joined == [card, ("nccl", {"device_id": card}), "over", card, ("nccl", {"device_id": card})]


def test_a_way_back_that_does_not_compile_is_gone_uncompiled(monkeypatch, capsys):
    def refuse(graph, inputs):
        raise NotImplementedError("no kernel for this card")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=refuse)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(progress, "_enabled", True)
    x = torch.ones(3, requires_grad=True)
    compiled(lambda x: x.sin().sum(), Machine(CPU, "fp32"), True)(x).backward()
    assert torch.equal(x.grad, torch.ones(3).cos())
    assert capsys.readouterr().err.endswith("raised: NotImplementedError: no kernel for this card)\n")


def test_a_process_may_compile_many_models(monkeypatch):
    """Those of a study are trained in one, each of another shape."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for width in range(1, 11):
        compiled(torch.nn.RMSNorm(width), Machine(CPU, "fp32"), True)(torch.ones(2, width))
    assert len(graphs) == 10


def test_micro_batches_that_are_compiled_for_are_of_one_size(monkeypatch, tmp_path):
    assert [cost.alike(128, most) for most in (200, 101, 57, 1)] == [128, 64, 32, 1]
    assert cost.alike(97, 57) == 49  # a prime
    config, made = effective(PretrainFile, sets=["train.batch_size=12"]).train, []
    monkeypatch.setattr(training, "micro_batch_images", lambda model, machine: 7)
    monkeypatch.setattr(training, "compiled", lambda model, machine, wanted: made.append(wanted))
    shape = IgptShape(n_layer=1, n_head=1, d_model=4, n_vocab=4, n_ctx=4)
    images = Images(np.zeros((20, 4), np.uint16), None, (2, 2, 1))
    for compile, own, expected in ((True, None, 6), (False, None, 7), (True, 5, 5)):
        run = TrainState(ImageGPT(shape).init_weights(torch.Generator()), config, None)
        limits = Limits(compile=compile, micro_batch=own)
        assert Training(Machine(CPU, "fp32"), run, images, pretrain.losses, tmp_path, limits).micro == expected
    assert made == [True, False, True]


def test_a_card_is_timed_until_it_has_done_what_it_was_told(monkeypatch):
    log = []

    class Matrix:
        def __matmul__(self, other):
            log.append("product")

    card = SimpleNamespace(synchronize=lambda device: log.append("done"))
    monkeypatch.setattr(rates, "torch", SimpleNamespace(randn=lambda *size, **how: Matrix(), cuda=card))
    assert rates.matrix_rate(Machine(torch.device("cuda", 0), "fp32")) > 0
    assert log == ["product", "done"] * 6  # the first warms up


def control_groups(root, line, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # inside a container
        ("0::/user/job\n", {"user/job/cpu.max": "max 100000\n", "user/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/user/job\n", {"user/job/cpu.max": "max 100000\n"}, math.inf),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:memory:/job\n0::/\n", {"cpu.max": "damaged"}, math.inf),
    ],
)
def test_the_cores_of_a_container_are_those_it_is_given(tmp_path, line, files, left):
    assert cores.quota(control_groups(tmp_path, line, files)) == left


def test_threads_are_no_more_than_the_cores_that_a_container_leaves(monkeypatch):
    set_to = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(cores, "quota", lambda: 1.5)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    with machine("cpu"):
        assert set_to == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # as the user says
    with machine("cpu"):
        assert set_to == [2]


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_waits_for_nothing(objective, optimizer):
    """Forward, backward, clipping, update and average give the device work, and ask it nothing."""
    shape = IgptShape(n_layer=2, n_head=2, d_model=8, n_vocab=8, n_ctx=9, objective=objective)
    model = ImageGPT(shape).init_weights(torch.Generator().manual_seed(0))
    sets = [f"train.optimizer={optimizer}", "train.ema=0.9", "train.clip_norm=1"]
    run = TrainState(model, effective(PretrainFile, sets=sets).train, None)
    rng = torch.Generator().manual_seed(1)
    tokens, masked = torch.randint(8, (4, 9), generator=rng), model.draw_masks(4, rng)
    batch = Batch(tokens, None, masked, Counts.of(model, 4, masked))
    for _ in range(2):
        with NothingIsAwaited():
            numbers = accumulate(Machine(CPU, "bf16"), model, model, pretrain.losses, batch, 2)
            numbers["grad_norm"] = gradient_norm(model, run.config.clip_norm)
            arrived = on_the_way(numbers)
            run.update(0.01)
        assert all(map(math.isfinite, arrived().values()))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("family", ["ar", "bert", "aim"])
def test_a_step_of_training_asks_a_device_for_nothing_but_what_is_logged(family, held, tmp_path, monkeypatch):
    """Batch and all, by the ways that a CPU does not take: "meta" has no numbers to give. Attention is torch's own,
    without a table for its mask where it is causal: so flash attention serves it.
    """
    meta, attention = torch.device("meta"), []
    real = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *q, **how: attention.append(how) or real(*q, **how)
    )
    monkeypatch.setattr(training, "on_the_way", lambda values: lambda: dict.fromkeys(values, 1.0))
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: 1 << (34 if held else 4))
    with meta:
        if family == "aim":
            model = AIM(AimShape(2, 2, 8, 2, 8, 8, head_depth=1, head_width=16))
        else:
            model = ImageGPT(IgptShape(n_layer=2, n_head=2, d_model=8, n_vocab=8, n_ctx=64, objective=family))
    model.to(meta)
    model.attention = model.shape.pretraining_attention
    stored = model.random_images(12, torch.Generator()).numpy()
    images = Images(stored if family == "aim" else stored.astype(np.uint16), None, (8, 8, 3 if family == "aim" else 1))
    sets = ["train.batch_size=4", "train.ema=0.9", "train.clip_norm=1", "train.augment=crop-flip", "train.steps=5"]
    run = TrainState(model, effective(PretrainFile, sets=sets).train, None)
    loop = Training(Machine(meta, "fp32"), run, images, pretrain.losses, tmp_path, Limits(micro_batch=2))
    assert (loop.images.on_device is not None) == held == (loop.batches.thread is None)
    for _ in range(2):
        loop.step(Unwritten(), Undisturbed("test", loop.machine, lambda: None), progress.Bar("test", None, "steps"))
    assert run.step == 2
    if family != "aim":
        assert attention == [{"is_causal": family == "ar"}] * (2 * 2 * model.shape.n_layer)
    if not held:
        loop.batches.thread.shutdown()


class NothingComesFromTheHost(TorchDispatchMode):
    """Fails where what a device computes takes a tensor that is not on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in given), f"{func} takes what the device does not have"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", ["norm-pixels", "pixels"])
def test_an_aim_has_all_it_needs_on_its_device(target):
    shape = AimShape(2, 2, 8, 2, 8, 8, head_depth=1, head_width=16, target=target)
    with torch.device("meta"):
        model = AIM(shape)
    model.to(torch.device("meta"))
    model.attention = "prefix"
    images = torch.empty(3, 8, 8, 3, dtype=torch.uint8, device="meta")
    masked = torch.empty(3, 16, dtype=torch.bool, device="meta")
    with NothingComesFromTheHost():
        model.losses(model(images, masked), images, masked).sum().backward()
    here, there = AIM(shape), AIM(shape)
    here.init_weights(torch.Generator().manual_seed(0))
    there.load_state_dict(here.state_dict())
    there.fixed, there.colours = {8: here.position_embeddings(8), 16: here.position_embeddings(16)}, colours_on(CPU)
    images, masked = here.random_images(3, torch.Generator()), torch.arange(16).expand(3, 16) >= 5
    here.attention = there.attention = "prefix"
    assert torch.equal(here(images, masked).logits, there(images, masked).logits)
    assert here.state_dict().keys() == model.state_dict().keys()


def test_the_mask_of_a_prefix_is_made_without_waiting():
    masked = torch.arange(16) >= torch.tensor([[3], [9]])
    with NothingIsAwaited():
        prefix_block_mask(masked)


def test_compiling_is_for_long_runs_on_cuda(monkeypatch):
    found, card = [], Machine(torch.device("cuda", 0), "bf16")
    monkeypatch.setattr(cost, "find_spec", lambda name: name if found else None)
    long, short = (effective(PretrainFile, "igpt-s", sets=[f"train.steps={n}"]).train for n in (10_000, 30))
    shape = IgptShape(24, 8, 512, 512, 1024)
    assert not cost.worth_compiling(card, shape, long)  # no Triton
    found.append(True)
    assert cost.worth_compiling(card, shape, long) and not cost.worth_compiling(card, shape, short)
    assert not cost.worth_compiling(Machine(CPU, "fp32"), shape, long)


def test_the_average_is_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(5, 3)
    model.register_buffer("seen", torch.zeros(2))
    ours, theirs = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(4):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(torch.randn(tensor.shape))
        average(ours, model, 0.9, first=step == 0)
        theirs.update_parameters(model)
        mine, expected = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in mine)


@pytest.fixture
def late(monkeypatch):
    """Training as on a device that computes while the host goes on."""
    real = Training.__post_init__

    def begun(self):
        real(self)
        self.reads_late = True

    monkeypatch.setattr(Training, "__post_init__", begun)


def rows(path):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read_log(path)]


def test_numbers_that_are_read_late_are_the_same(tokens, tmp_path, request):
    config = effective(PretrainFile, sets=[*TINY, "train.log_every=5", "train.val_every=3"])
    made = pretrain.run(tokens, tmp_path / "a", config, val_fraction=0.1, device="cpu")
    request.getfixturevalue("late")
    again = pretrain.run(tokens, tmp_path / "b", config, val_fraction=0.1, device="cpu")
    assert again["id"] == made["id"] and rows(tmp_path / "b/log.jsonl") == rows(tmp_path / "a/log.jsonl")


@pytest.mark.parametrize("poisoned", [4, 5, 11])
def test_divergence_is_told_of_its_step_when_it_is_read_late(tokens, tmp_path, monkeypatch, late, poisoned):
    real, calls = pretrain.losses, iter(range(100))

    def losses(*args):
        return {key: value * (math.inf if next(calls) == poisoned else 1) for key, value in real(*args).items()}

    monkeypatch.setattr(pretrain, "losses", losses)
    config = effective(PretrainFile, sets=[*TINY, "train.log_every=5"])
    with pytest.raises(Diverged, match=f"at step {poisoned}") as fault:
        pretrain.run(tokens, tmp_path / "m", config, device="cpu")
    assert ("good state is kept" in fault.value.hint) == (tmp_path / "m.partial/resume").exists()
    assert next(calls) <= poisoned + 2 and not (tmp_path / "m").exists()


@pytest.mark.parametrize("how", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize("kind", ["tokens", "pixels"])
def test_images_on_a_device_are_augmented_as_elsewhere(how, kind):
    rng = np.random.default_rng(0)
    grid = (6, 5, 3 if kind == "pixels" else 1)
    flat = rng.integers(0, 256, (8, 6 * 5 * grid[2]))
    share = slice(2, 7)
    expected = augment(flat[share], grid, how, 0, 3, 8, share)
    images = torch.from_numpy(flat[share])
    images = images.view(5, *grid) if kind == "pixels" else images
    assert np.array_equal(moved_on_device(images, grid, how, 0, 3, 8, share).reshape(5, -1), expected)


def test_images_are_held_on_a_device_that_has_room(monkeypatch):
    """As stored: tokens of more than 15 bits come back whole."""
    stored = np.array([[0, 40_000], [65_535, 7], [1, 2]], np.uint16)
    images = Images(stored, np.arange(3), (1, 2, 1), chosen=np.array([1, 0]))
    gpu = Machine(torch.device("meta"), "fp32")
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: 8 * stored.nbytes)
    assert images.on(gpu).on_device.shape == (3, 2) and images.on(gpu).on_device.dtype == torch.int16
    assert images.on(Machine(CPU, "fp32")).on_device is None
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: 8 * stored.nbytes - 1)
    assert images.on(gpu).on_device is None
    held = Images(**{**vars(images), "on_device": torch.from_numpy(stored.view(np.int16))})
    for got, expected in zip(held.batch(range(2)), images.batch(range(2))):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_batches_are_made_ahead_each_once_and_in_order():
    made = []

    def make(step):
        made.append(step)
        return step

    ahead = Prefetch(Machine(torch.device("meta"), "fp32"), make, 5, worthwhile=True)
    assert [ahead.batch(step) for step in (2, 3, 4)] == [2, 3, 4]
    ahead.thread.shutdown()
    assert made == [2, 3, 4]
    assert Prefetch(Machine(CPU, "fp32"), make, 5, worthwhile=True).thread is None


def test_what_of_a_card_is_used_stands_in_the_log_where_its_peak_is_known(monkeypatch):
    named = {"name": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: named["name"])
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shape, config = IgptShape(24, 8, 512, 512, 1024), effective(PretrainFile, sets=["train.batch_size=128"]).train
    card = Machine(torch.device("cuda", 0), "bf16", world=2)
    pace = cost.Pace(card, shape, config)
    assert pace.mfu(1) == {}
    pace.begin(10)
    assert pace.mfu(10) == {}
    used = 64 * 1024 * shape.flops_per_token("exact") * 5 / 2.0 / 989e12
    assert pace.mfu(15) == {"mfu": round(used, 4)} and 0.1 < used < 0.2
    named["name"] = "NVIDIA H100 PCIe"
    assert peak_rate(card) == 756e12 and peak_rate(Machine(card.device, "fp32")) == 51e12
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some other card", None),
    ):
        named["name"] = name
        assert peak_rate(card) == peak
    assert peak_rate(Machine(CPU, "bf16")) is None
    assert cost.Pace(card, shape, config).mfu(15) == {}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_training_on_a_cpu_takes_no_fresh_pages_for_what_was_freed():
    def pages_taken(spare):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones((1 << 24) + spare)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with machine("cpu") as where:
        where.keep_freed_memory()
    pages_taken(1 << 10)  # small pieces may be put at both ends of what is freed
    assert pages_taken(0) < 1000
