"""What a machine is said to be: its precision, its cores, and what a step may not wait for on it."""

import math

import pytest
import torch

from pixseq import cores
from pixseq.runtime import _has_bf16_units, machine


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
