"""How many operations a second the machine can do: as its maker says, and as it does."""

from __future__ import annotations

import re
import time

import torch

from pixseq.runtime import Machine

# Dense floating point operations a second of a card by words of its name, the first of which all are in it: in bf16
# with sums in fp32, and in fp32 without TF32 (NVIDIA's data sheets).
PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200 NVL": (836e12, 60e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
    "A100": (312e12, 19.5e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 3090": (71e12, 35.6e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 5090": (210e12, 105e12),
}
PARTLY = {"Laptop", "MIG"}  # less of a card of that name


def peak_rate(machine: Machine) -> float | None:
    """What its maker says the card can do in the machine's precision, operations a second; None: not known."""
    if machine.device.type != "cuda":
        return None
    name = set(re.findall(r"\w+", torch.cuda.get_device_name(machine.device)))
    known = next((rates for words, rates in PEAKS.items() if name.issuperset(words.split())), None)
    return None if known is None or name & PARTLY else known[machine.precision != "bf16"]


def matrix_rate(machine: Machine) -> float:
    """Floating point operations a second of a square matrix product in the training precision, of half a second."""
    card = machine.device.type == "cuda"
    side = 8192 if card else 2048  # a card is through with little before it is told of the next
    a = torch.randn(side, side, device=machine.device, dtype=machine.dtype)

    def multiply() -> None:
        a @ a
        if card:
            torch.cuda.synchronize(machine.device)

    multiply()  # warms up
    done, began = 0, time.perf_counter()
    while done < 5 and time.perf_counter() - began < 0.5:
        multiply()
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - began)
