"""How many operations a second the machine can do: as its maker says, and as it does."""

from __future__ import annotations

import time

import torch

from pixseq.runtime import Machine

# Dense floating point operations a second of a card by its name, the first that is part of it: in bf16 with sums in
# fp32, and in fp32 without TF32 (NVIDIA's data sheets).
PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 3090": (71e12, 35.6e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 5090": (210e12, 105e12),
}


def peak_rate(machine: Machine) -> float | None:
    """What its maker says the card can do in the machine's precision, operations a second; None: not known."""
    if machine.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(machine.device)
    found = next((rates for part, rates in PEAKS.items() if part in name), None)
    return None if found is None else found[machine.precision != "bf16"]


def matrix_rate(machine: Machine) -> float:
    """Floating point operations a second of a square matrix product in the training precision, of about a second."""
    dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=machine.device, dtype=dtype)
    done, began = 0, 0.0
    for i in range(6):
        if i == 1:  # the first one warms up
            began = time.perf_counter()
        a @ a
        done += i > 0
        if machine.device.type == "cpu" and done and time.perf_counter() - began > 0.5:
            break
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return done * 2 * 2048**3 / (time.perf_counter() - began)
