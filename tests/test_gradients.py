"""Backwards that are written by hand are those of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from pixseq.models import attention, attention_backward, branches, gradients, objectives
from pixseq.models.attention import Float32Backward, self_attention, split_heads
from pixseq.models.igpt import NORM_EPS, IgptShape, ImageGPT
from pixseq.models.lora import add_low_rank
from pixseq.models.objectives import generative_nats


def drawn(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(len(size))).requires_grad_()


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    return float((ours.double() - other.double()).norm() / other.double().norm())


def plain(monkeypatch) -> None:
    """All is left to autograd."""
    for module in (branches, gradients, objectives):
        monkeypatch.setattr(module, "takes_own_gradient", lambda x: False)
    monkeypatch.setattr(attention, "takes_float32_backward", lambda x: False)


def test_each_is_the_derivative_of_its_forward(monkeypatch):
    monkeypatch.setattr(attention, "NUMBERS", 40)  # two images of the five at once
    assert gradcheck(lambda x, gain: gradients.RMSNorm.apply(x, gain, NORM_EPS), (drawn(2, 3, 6), drawn(6)))
    monkeypatch.setattr(gradients, "LOGITS", 12)  # two rows of the seven at once
    assert gradcheck(gradients.TokenNats.apply, (drawn(7, 5), torch.tensor([0, 4, 2, 2, 1, 3, 0])))
    for causal in (True, False):
        assert gradcheck(Float32Backward.apply, (drawn(5, 4, 12), 2, causal))
        weights = drawn(4), drawn(12, 4), drawn(4, 4)
        assert gradcheck(branches.AttentionBranch.apply, (drawn(5, 3, 4), *weights, 2, causal, torch.float64))
    assert gradcheck(branches.MLPBranch.apply, (drawn(2, 3, 4), drawn(4), drawn(8, 4), drawn(4, 8), torch.float64))


def test_the_norm_is_that_of_the_plain_formula():
    x, gain = drawn(4, 9, 24, dtype=torch.float32), drawn(24, dtype=torch.float32)
    normed = F.rms_norm(x, gain.shape, gain, NORM_EPS)
    torch.testing.assert_close(gradients.RMSNorm.apply(x, gain, NORM_EPS), normed, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_bf16_logits_is_that_in_float32():
    logits, tokens = drawn(300, 17, dtype=torch.bfloat16), torch.arange(300) % 17
    nats, plain_ = gradients.TokenNats.apply(logits, tokens), F.cross_entropy(logits.float(), tokens, reduction="none")
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, plain_, rtol=1e-6, atol=1e-6)
    ours, other = (torch.autograd.grad(x.mean(), logits)[0] for x in (nats, plain_))
    assert relative(ours, other) < 1e-3 and ours.dtype == torch.bfloat16


def losses_and_gradients(precision: torch.dtype, objective: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = ImageGPT(IgptShape(n_layer=2, n_head=2, d_model=32, n_vocab=17, n_ctx=40, objective=objective))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name else 0.0, 0.3, generator=generator)
    model.to(torch.promote_types(precision, torch.float32))
    x = torch.randint(0, 17, (3, 40), generator=generator)
    masked = None if objective == "ar" else torch.rand(x.shape, generator=generator) < 0.3
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        nats = generative_nats(model(x, masked).logits, x, masked)
    nats.mean().backward()
    return nats.detach(), [p.grad for p in model.parameters()]


def test_a_models_gradients_are_those_of_the_plain_path(monkeypatch):
    for objective in ("ar", "bert"):
        ours = {dtype: losses_and_gradients(dtype, objective) for dtype in (torch.float32, torch.bfloat16)}
        with monkeypatch.context() as patch:
            plain(patch)
            exact = losses_and_gradients(torch.float64, objective)
            rounded = {dtype: losses_and_gradients(dtype, objective) for dtype in ours}
        for dtype, bound, more in ((torch.float32, 1e-6, 1.25), (torch.bfloat16, 0.02, 1.1)):
            assert relative(ours[dtype][0], exact[0]) < bound
            far = [relative(a, b) for a, b in zip(ours[dtype][1], exact[1])]
            usual = [relative(a, b) for a, b in zip(rounded[dtype][1], exact[1])]
            assert max(far) < 1.5 * max(usual) and sum(far) < more * sum(usual)  # what it rounds, and no more


def test_attention_in_bf16_keeps_its_forward_and_comes_closer_in_its_backward(monkeypatch):
    for causal in (True, False):
        qkv = drawn(3, 70, 3 * 32, dtype=torch.bfloat16)
        target = torch.randn(3, 70, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        ours = self_attention(qkv, 4, causal)
        (found,) = torch.autograd.grad(ours, qkv, target)
        exact = qkv.detach().double().requires_grad_()
        y = F.scaled_dot_product_attention(*split_heads(exact, 4), is_causal=causal).transpose(1, 2).flatten(2)
        (wanted,) = torch.autograd.grad(y, exact, target.double())
        with monkeypatch.context() as patch:
            plain(patch)
            usual = self_attention(qkv, 4, causal)
            (rounded,) = torch.autograd.grad(usual, qkv, target)
        assert torch.equal(ours, usual)
        assert relative(found, wanted) < min(relative(rounded, wanted), 0.004)


def test_without_a_gradient_or_under_a_compiler_the_plain_path_is_taken(monkeypatch):
    x = drawn(2, 8, 12, dtype=torch.bfloat16)
    assert attention.takes_float32_backward(x) and gradients.takes_own_gradient(x)
    with torch.no_grad():
        assert not attention.takes_float32_backward(x) and not gradients.takes_own_gradient(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not attention.takes_float32_backward(x) and not gradients.takes_own_gradient(x)
    assert not attention.takes_float32_backward(x.float())


def test_the_way_back_through_a_norm_is_exact_where_the_root_of_the_width_is_no_bf16():
    h, dn, dh = drawn(300, 24).detach().split(100)
    n, scale = gradients.normed(h, torch.float64, NORM_EPS)
    wanted = dh + scale * (dn - n * (n * dn).mean(-1, keepdim=True))
    torch.testing.assert_close(gradients.normed_backward(dh, dn, n, scale), wanted)
    rounded = gradients.normed_backward(dh.float(), dn.bfloat16(), n.bfloat16(), scale.float())
    assert relative(rounded, wanted) < 0.003 and rounded.dtype == torch.float32
    through = wanted - dh
    assert abs(((rounded - dh) * through).sum() / through.square().sum() - 1) < 2e-4  # its size is not rounded


def test_gradients_may_lie_in_any_order_in_memory(monkeypatch):
    x, gain, across = drawn(1, 7, 24), drawn(24), drawn(1, 24, 7).detach()
    norms = gradients.RMSNorm.apply, lambda x, gain, eps: F.rms_norm(x, gain.shape, gain, eps)
    for turned in (x, drawn(1, 24, 7).detach().mT.requires_grad_()):
        found = [torch.autograd.grad((n(turned, gain, NORM_EPS).mT * across).sum(), (turned, gain)) for n in norms]
        torch.testing.assert_close(*found)
    monkeypatch.setattr(attention, "POSITIONS", 1)
    qkv, dy = drawn(2, 48, 9, dtype=torch.float32).detach().mT, drawn(2, 9, 16, dtype=torch.float32).detach()
    (y, logsumexp), (same, again) = (attention.attended(each, 2, True) for each in (qkv.contiguous(), qkv))
    assert torch.equal(y, same) and torch.equal(logsumexp, again)
    for code in (attention_backward.library, lambda dtype: None):
        monkeypatch.setattr(attention_backward, "library", code)
        back = [attention.attended_backward(dy, each, y, logsumexp, 2, True) for each in (qkv, qkv.contiguous())]
        assert torch.equal(*back)


def test_blocks_of_which_something_is_not_learnt_or_not_plain_are_left_to_autograd():
    model = ImageGPT(IgptShape(n_layer=2, n_head=2, d_model=32, n_vocab=17, n_ctx=8)).init_weights(torch.Generator())
    blocks, h = list(model.blocks), model.embed(torch.zeros(1, 8, dtype=torch.int64))
    assert branches.applies(blocks, h)
    with torch.no_grad():
        assert not branches.applies(blocks, h)
    blocks[1].ln_2.weight.requires_grad_(False)
    assert branches.applies(blocks[:1], h) and not branches.applies(blocks, h)
    add_low_rank(model, ["q"], 2, 1.0, torch.Generator())
    for p in model.parameters():
        p.requires_grad_()
    assert not branches.applies(list(model.blocks), h)


def test_a_block_keeps_ten_widths_a_position_for_its_way_back():
    """Two norms, queries, keys and values, what attention gives, and an MLP before its quick-gelu."""
    model = ImageGPT(IgptShape(n_layer=3, n_head=2, d_model=32, n_vocab=17, n_ctx=40))
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}
    h = model.embed(torch.zeros(4, 40, dtype=torch.long))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        branches.run(model.blocks, h)
    numbers = sum(x.numel() for place, x in kept.items() if place not in weights)
    scales = 2 + 2  # of the norms, and of the attention of each head
    assert numbers == 3 * 4 * 40 * (10 * 32 + scales)


def test_the_way_back_in_c_is_torchs_whatever_the_sizes_and_threads(monkeypatch):
    if attention_backward.library(torch.float32) is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(attention, "POSITIONS", 1)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        for positions, size, causal in ((70, 16, True), (64, 24, False), (130, 32, True), (19, 40, False)):
            qkv = drawn(3, positions, 3 * 2 * size, dtype=dtype).detach()
            dy = torch.randn(3, 2 * size, positions, generator=torch.Generator().manual_seed(1)).to(dtype).mT
            y, logsumexp = attention.attended(qkv, 2, causal)
            ours = attention.attended_backward(dy, qkv, y, logsumexp, 2, causal)
            threads = torch.get_num_threads()
            torch.set_num_threads(3 - min(threads, 2))
            again = attention.attended_backward(dy, qkv, y, logsumexp, 2, causal)
            torch.set_num_threads(threads)
            with monkeypatch.context() as patch:
                patch.setattr(attention_backward, "library", lambda dtype: None)
                torchs = attention.attended_backward(dy, qkv, y, logsumexp, 2, causal)
            assert torch.equal(ours, again)
            assert all(relative(a, b) < bound for a, b in zip(ours.chunk(3, -1), torchs.chunk(3, -1)))
