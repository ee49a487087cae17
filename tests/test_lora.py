"""Low-rank adaptation: what it adapts, how much of the trunk that is, and that merging changes no output."""

import numpy as np
import pytest
import torch

from pixseq.config import FinetuneFile, PretrainFile, as_dict, effective
from pixseq.errors import UsageError
from pixseq.models.aim import AimShape
from pixseq.models.family import build
from pixseq.models.igpt import IgptShape
from pixseq.models.lora import PLACES, add_low_rank, low_rank_count, merged, targets_of
from pixseq.runtime import generator
from pixseq.stages import finetune

IGPT = IgptShape(n_layer=2, n_head=2, d_model=16, n_vocab=16, n_ctx=36, n_classes=4)
AIM = AimShape(2, 2, 16, 2, 8, 8, head_depth=1, head_width=8, n_classes=4)
DEFAULT = effective(FinetuneFile).finetune


def adapted(shape, targets, rank=2, alpha=6.0):
    """A model with updates that are not zero."""
    net = build(shape).init_weights(generator(0, 1))
    with torch.no_grad():
        net.classifier.weight.normal_(generator=generator(0, 2))
    before = {name: x.clone() for name, x in net.state_dict().items()}
    add_low_rank(net, targets, rank, alpha, generator(0, 3))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_b." in name:
                p.normal_(generator=generator(0, 4))
    return net.eval(), before


def images(shape):
    size = (3, 8, 8, 3) if shape is AIM else (3, 36)
    return torch.randint(16, size, generator=generator(0, 5), dtype=torch.uint8 if shape is AIM else torch.int64)


def test_aim_7b_at_rank_8_trains_a_thousandth_of_the_trunk():
    shape = AimShape.of(as_dict(effective(PretrainFile, "aim-7b").model), (224, 224, 3), None, "raster")
    with torch.device("meta"):
        net = build(shape)
        trunk = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("head."))
    add_low_rank(net, targets_of(DEFAULT.lora_targets), 8, DEFAULT.lora_alpha, generator(0))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trunk == shape.trunk_count() and trained == low_rank_count(net) == 32 * 4 * 8 * (4096 + 4096)
    assert 0.001 < trained / trunk < 0.0014


@pytest.mark.parametrize("shape", [IGPT, AIM], ids=["igpt", "aim"])
@pytest.mark.parametrize("targets", ["q,k,v,o", "v", "q,fc", "o,proj", ",".join(PLACES)])
def test_merged_weights_are_the_adapted_model(shape, targets):
    net, before = adapted(shape, targets_of(targets))
    plain = build(shape)
    plain.load_state_dict(merged(net.state_dict(), 6.0))
    x = images(shape)
    with torch.no_grad():
        ours, theirs = net(x).class_logits, plain.eval()(x).class_logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    untouched = build(shape)
    untouched.load_state_dict(before)
    with torch.no_grad():
        assert not torch.allclose(ours, untouched.eval()(x).class_logits, atol=1e-2)


@pytest.mark.parametrize("shape", [IGPT, AIM], ids=["igpt", "aim"])
def test_every_target_is_a_matrix_of_its_own_scaled_by_alpha_over_rank(shape):
    rows = {"q": slice(0, 16), "k": slice(16, 32), "v": slice(32, 48)}
    for name, place in PLACES.items():
        net, before = adapted(shape, [name], rank=3, alpha=6.0)
        key = f"blocks.1.{place.module}"
        a, b = (net.state_dict()[f"{key}.lora_{part}.{name}"] for part in "ab")
        update = merged(net.state_dict(), 6.0)[f"{key}.weight"] - before[f"{key}.weight"]
        assert torch.allclose(update[rows.get(name, slice(None))], 2 * b @ a, atol=1e-6)
        moved = {row for row in range(len(update)) if update[row].any()}
        assert moved == set(np.arange(len(update))[rows.get(name, slice(None))])
        trained = {n for n, p in net.named_parameters() if p.requires_grad and not n.startswith("classifier.")}
        assert trained == {f"blocks.{i}.{place.module}.lora_{part}.{name}" for i in range(2) for part in "ab"}


def test_an_update_begins_as_nothing_and_a_strange_target_is_told(tokens, checkpoints, tmp_path):
    net = build(IGPT).init_weights(generator(0, 1))
    before = {name: x.clone() for name, x in net.state_dict().items()}
    add_low_rank(net, ["q", "o"], 4, 8.0, generator(0, 3))
    for name, x in merged(net.state_dict(), 8.0).items():
        assert torch.equal(x, before[name])
    config = effective(FinetuneFile, sets=["finetune.lora_rank=2", "finetune.lora_targets=q,w"])
    with pytest.raises(UsageError, match=r"lora_targets: 'q,w'"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", config, device="cpu")
    with pytest.raises(UsageError, match="lora_alpha is 0"):
        effective(FinetuneFile, sets=["finetune.lora_alpha=0"])


def test_the_summary_and_stderr_say_the_share_of_the_trunk(tokens, checkpoints, tmp_path, capsys):
    from pixseq import progress

    config = effective(FinetuneFile, sets=["finetune.lora_rank=2", "finetune.steps=2", "finetune.batch_size=8"])
    progress.enable(True)
    try:
        summary = finetune.run(checkpoints["ar"], tokens, tmp_path / "m", config, device="cpu")["summary"]
    finally:
        progress.enable(False)
    updates = 2 * 4 * 2 * (16 + 16)
    assert summary["low_rank_parameters"] == updates
    trunk = summary["parameters"] - 4 * 16
    assert abs(summary["low_rank_share_of_trunk"] - updates / trunk) < 1e-6
    assert f"have {updates:,} weights, {updates / trunk:.2%} of the trunk's {trunk:,}" in capsys.readouterr().err
