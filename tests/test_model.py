"""The model is the published one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import igpt_forward

from pixseq.config import PretrainFile, effective
from pixseq.models import branches, inference
from pixseq.models.igpt import IgptShape, ImageGPT
from pixseq.models.objectives import class_nats, generative_nats, random_mask, scored_images
from pixseq.runtime import Machine

AR = IgptShape(n_layer=3, n_head=2, d_model=24, n_vocab=17, n_ctx=20)
BERT = replace(AR, objective="bert")


def random_model(shape: IgptShape) -> ImageGPT:
    """Every tensor random, so that no term of the forward pass is hidden by a zero or a one."""
    model = ImageGPT(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name else 0.0, 0.3, generator=generator)
    return model.eval()


def arrays(model: ImageGPT) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def tokens(shape: IgptShape, count: int = 4) -> torch.Tensor:
    return torch.randint(0, shape.n_vocab, (count, shape.n_ctx), generator=torch.Generator().manual_seed(1))


def test_autoregressive_forward_equals_numpy():
    model, x = random_model(AR), tokens(AR)
    with torch.no_grad():
        out = model(x, pooled=True)
    for i in range(len(x)):
        logits, features = igpt_forward(arrays(model), AR.n_layer, AR.n_head, x[i].numpy(), None)
        np.testing.assert_allclose(out.logits[i], logits, atol=2e-4)
        np.testing.assert_allclose(torch.stack(out.features)[:, i], features, atol=1e-4)


def test_bert_forward_equals_numpy():
    model, x = random_model(BERT), tokens(BERT)
    masked = random_mask(*x.shape, torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(x, masked, pooled=True)
    for i in range(len(x)):
        keep = ~masked[i].numpy()
        logits, features = igpt_forward(arrays(model), BERT.n_layer, BERT.n_head, x[i].numpy(), keep)
        np.testing.assert_allclose(out.logits[i], logits, atol=2e-4)
        np.testing.assert_allclose(torch.stack(out.features)[:, i], features, atol=1e-4)


def test_a_pixel_moves_only_later_logits_and_the_last_pixel_none():
    model, x = random_model(AR), tokens(AR, 1)
    with torch.no_grad():
        before = model(x).logits[0]
        for t in range(AR.n_ctx):
            changed = x.clone()
            changed[0, t] = (changed[0, t] + 1) % AR.n_vocab
            moved = (model(changed).logits[0] - before).abs().amax(1) > 0
            assert not moved[: t + 1].any()
            assert moved[t + 1 :].any() == (t + 1 < AR.n_ctx)


def test_bert_sees_every_unmasked_pixel_and_no_masked_one():
    model, x = random_model(BERT), tokens(BERT, 1)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, 5] = True
    with torch.no_grad():
        before = model(x, masked).logits
        hidden, seen = x.clone(), x.clone()
        hidden[0, 5] = (x[0, 5] + 1) % BERT.n_vocab
        seen[0, 19] = (x[0, 19] + 1) % BERT.n_vocab
        assert torch.equal(model(hidden, masked).logits, before)
        assert ((model(seen, masked).logits - before).abs().amax(2) > 0).all()


def test_first_position_is_the_start_token_alone():
    model, x = random_model(AR), tokens(AR, 6)
    with torch.no_grad():
        logits = model(x).logits[:, 0]
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-6)


@pytest.mark.parametrize("shape", [AR, BERT])
def test_fresh_loss_is_ln_vocabulary(shape):
    model = ImageGPT(shape).init_weights(torch.Generator().manual_seed(0))
    x = tokens(shape)
    masked = random_mask(*x.shape, torch.Generator().manual_seed(3)) if shape is BERT else None
    loss = generative_nats(model(x, masked).logits, x, masked).sum() / scored_images(len(x), masked)
    assert abs(loss.item() - math.log(shape.n_vocab)) < 1e-5


def test_every_tensor_has_the_published_law():
    d, n_layer = 256, 4
    shape = IgptShape(n_layer=n_layer, n_head=4, d_model=d, n_vocab=512, n_ctx=256, n_classes=10)
    model = ImageGPT(shape).init_weights(torch.Generator().manual_seed(0))
    law = {
        "wte": 0.02,
        "wpe": 0.01,
        "sos": 0.02,
        "qkv": 1 / math.sqrt(d),
        "attn.proj": 1 / math.sqrt(d * n_layer),
        "mlp.fc": 0.02,
        "mlp.proj": 0.02,
        "head": 0.0,
        "classifier": 0.0,
    }
    for name, p in model.named_parameters():
        assert not name.endswith("bias")
        if "ln_" in name:
            assert (p == 1).all(), name
            continue
        std = next(value for key, value in law.items() if key in name)
        assert p.mean().abs().item() <= 4 * std / math.sqrt(p.numel()), name
        assert abs(p.std().item() - std) <= (0.15 if name == "sos" else 0.02) * std, name
    assert model.head.weight.data_ptr() != model.wte.data_ptr()


@pytest.mark.parametrize(
    ("preset", "side", "count"),
    [
        ("igpt-s", 32, 76_571_648),
        ("igpt-m", 32, 455_157_760),
        ("igpt-l", 32, 1_362_250_752),
        ("igpt-l", 48, 1_364_216_832),
        ("igpt-xl", 32, 6_801_438_720),
        ("igpt-xl", 64, 6_810_875_904),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, side, count):
    config = effective(PretrainFile, preset).model
    shape = IgptShape(config.n_layer, config.n_head, config.d_model, n_vocab=512, n_ctx=side * side)
    with torch.device("meta"):
        model = ImageGPT(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameter_count() == count
    assert not hasattr(ImageGPT(BERT), "sos")


def test_bert_loss_counts_masked_positions_only_and_survives_none():
    shape = replace(BERT, n_ctx=6)
    logits = torch.randn(3, 6, 17, generator=torch.Generator().manual_seed(0))
    x = tokens(shape, 3)
    masked = torch.tensor([[True, False, True, False, False, False], [False] * 6, [True] * 6])
    nats = generative_nats(logits, x, masked)
    every = -torch.log_softmax(logits, -1).gather(2, x[..., None])[..., 0]
    assert torch.allclose(nats, torch.stack([every[0, [0, 2]].mean(), torch.tensor(0.0), every[2].mean()]))
    assert scored_images(3, masked) == 2
    assert scored_images(2, torch.zeros(2, 6, dtype=torch.bool)) == 0
    assert sum(scored_images(1, row[None]) for row in masked) == 2  # whatever the batches


def test_mask_rate_is_the_papers():
    masked = random_mask(2000, 64, torch.Generator().manual_seed(0)).float()
    assert abs(masked.mean().item() - 0.15) < 0.005


def test_new_classifier_says_every_class_is_as_likely():
    model = ImageGPT(replace(AR, n_classes=5)).init_weights(torch.Generator().manual_seed(0))
    x = tokens(AR)
    nats = class_nats(model(x).class_logits, torch.tensor([0, 1, 2, 3]))
    assert torch.allclose(nats, torch.full((4,), math.log(5)), atol=1e-6)


def test_flops_agree_with_torchs_counter(monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(branches, "applies", lambda blocks, h: False)  # it does not count the kernel called there
    model, x = random_model(AR), tokens(AR)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generative_nats(model(x).logits, x).mean().backward()
    ours = len(x) * AR.n_ctx * AR.flops_per_token("exact")  # the counter takes the whole square of attention
    assert abs(counter.get_total_flops() / ours - 1) < 0.01
    half = 6 * AR.n_layer * AR.d_model * AR.n_ctx
    assert AR.flops_per_token("exact") - AR.flops_per_token("exact-causal") == half
    assert AR.flops_per_token("6nd") == 6 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", [AR, replace(BERT, n_classes=3), replace(AR, order="random", n_layer=3)])
def test_without_gradients_the_same_numbers_come_in_fewer_passes(shape, monkeypatch):
    model, x = random_model(shape), tokens(shape)
    masked = model.draw_masks(len(x), torch.Generator().manual_seed(5))
    monkeypatch.setattr(inference, "BYTES", 1)  # an image at a time, and its MLP in several parts
    monkeypatch.setattr(inference, "LEAST_ROWS", 7)
    for how in ({"pooled": True}, {"unpooled": True}, {"pooled": True, "first": 3, "last": 1}):
        plain = model(x, masked, **how)
        with torch.no_grad():
            assert inference.applies(list(model.blocks), model.embed(x))
            fast = model(x, masked, **how)
        for ours, theirs in zip(everything(fast), everything(plain), strict=True):
            assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    assert len(plain.features) == 2 and plain.logits is None
    whole = model(x, masked, unpooled=True).features[1][:, 3:].mean(1)
    torch.testing.assert_close(plain.features[1], whole)


@torch.no_grad()
def test_features_of_many_images_are_made_of_a_few_at_a_time(monkeypatch):
    model, x, normed = random_model(AR), tokens(AR, 7), inference.normed
    whole = model(x, logits=False, pooled=True).features
    lengths = []
    monkeypatch.setattr(inference, "normed", lambda h: lengths.append(len(h.flatten(0, -2))) or normed(h))
    monkeypatch.setattr(inference, "BYTES", 2 * AR.n_ctx * 4 * AR.d_model * 4)
    for ours, theirs in zip(model(x, logits=False, pooled=True).features, whole, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    assert max(lengths) == 2 * AR.n_ctx


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [AR, replace(BERT, n_classes=3)])
def test_a_frozen_model_gives_the_same_numbers_and_learns_nothing(shape, precision):
    model, x, where = random_model(shape), tokens(shape), Machine(torch.device("cpu"), precision)
    masked = model.draw_masks(len(x), torch.Generator().manual_seed(5))
    with torch.inference_mode(), where.autocast():
        before = model(x, masked, pooled=True)
        model.freeze(where.dtype)
        after = model(x, masked, pooled=True)
    assert all(torch.equal(*pair) for pair in zip(everything(after), everything(before), strict=True))
    assert {matrix.weight.dtype for matrix in inference.matrices(model.blocks[0])} == {where.dtype}
    with pytest.raises(AssertionError):
        model(x, masked)


def everything(output) -> list[torch.Tensor]:
    return [x for x in (*output.features, output.logits, output.class_logits) if x is not None]


@torch.no_grad()
def test_without_gradients_bf16_stays_as_close(monkeypatch):
    model, x = random_model(AR), tokens(AR)
    exact = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(x).logits
        monkeypatch.setattr(inference, "applies", lambda *_: False)
        slow = model(x).logits
    assert (fast - exact).norm() < 1.3 * (slow - exact).norm() < 0.05 * exact.norm()
