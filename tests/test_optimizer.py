"""AdamW equals torch's to the last bit, its states too, and nothing of an update fetches torch's compiler."""

import subprocess
import sys

import torch

from pixseq.models.optimizer import AdamW

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in ((7, 5), (33,), (4, 4))]


def groups(ours):
    return [{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.0}]


def steps(optimizer, ours, count, seed):
    """Updates of which one leaves a weight without a gradient, each at a rate of its own."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        for p in ours:
            p.grad = torch.randn(p.shape, generator=generator)
        ours[0].grad = None if step == 1 else ours[0].grad
        rate = 0.01 / (step + 1)
        if isinstance(optimizer, AdamW):
            optimizer.step(rate)
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_adamw_is_torchs_and_goes_on_from_its_state():
    ours, theirs, resumed = weights(), weights(), weights()
    optimizer, twin = AdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS, fused=True)
    steps(optimizer, ours, 3, seed=1)
    steps(twin, theirs, 3, seed=1)
    assert same(ours, theirs) and ours[0].grad is None
    state, expected = optimizer.state_dict(), twin.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    assert not any("lr" in group for group in state["param_groups"])  # it comes with each step
    for i, values in state["state"].items():
        assert values.keys() == expected["state"][i].keys() and same(values.values(), expected["state"][i].values())
    for group, other in zip(state["param_groups"], expected["param_groups"], strict=True):
        assert all(group[key] == other[key] for key in group)
    follower = AdamW(groups(resumed), **SETTINGS)
    follower.load_state_dict(expected)
    with torch.no_grad():
        for mine, now in zip(resumed, theirs):
            mine.copy_(now)
    steps(follower, resumed, 2, seed=2)
    steps(optimizer, ours, 2, seed=2)
    assert same(ours, resumed)


def test_an_update_does_not_import_the_compiler():
    program = """
import sys, torch
from pixseq.config import TrainConfig
from pixseq.engine.state import TrainState
from pixseq.models.igpt import ImageGPT, IgptShape
model = ImageGPT(IgptShape(n_layer=1, n_head=1, d_model=8, n_vocab=4, n_ctx=4)).init_weights(torch.Generator())
run = TrainState(model, TrainConfig(optimizer="muon"), None)
model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
run.update(0.1)
TrainState(model, TrainConfig(optimizer="muon"), run.snapshot())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
