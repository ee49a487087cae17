"""AIM: the published model, masks, orders and objectives, through the stages that Image GPT goes through."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import AIM as TINY
from conftest import write_pixels, write_tokens
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.config import FinetuneFile, PretrainFile, as_dict, effective
from pixseq.engine.opening import open_model
from pixseq.engine.training import Limits
from pixseq.errors import Interrupted, PixseqError, UsageError
from pixseq.models import aim as aim_module
from pixseq.models.aim import AIM, AimShape, AttentionMask, normalised, patchify, prefix_mask, sincos_2d, unpatchify
from pixseq.models.attention_mask import attend_masked, flex_serves
from pixseq.models.family import SHAPES, build, shape_from
from pixseq.models.igpt import IgptShape, ImageGPT
from pixseq.numerics.orders import NAMED, order_of
from pixseq.runtime import Machine, machine, placed
from pixseq.stages import check, evaluate, features, finetune, pretrain, sample

SMALL = AimShape(
    n_layer=3, n_head=2, d_model=16, patch_size=2, height=8, width=8, head_depth=2, head_width=24, attention="causal"
)


def model(shape=SMALL, seed=0, attention=None):
    net = AIM(shape).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    net.attention = attention or shape.attention
    return net.eval()


def pictures(n=3, side=8, seed=0):
    return torch.randint(256, (n, side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def recipe(*sets):
    return effective(PretrainFile, sets=[*TINY, *sets])


# --- the model


def slow(net, picture, allowed):
    """One picture [H, W, 3] by definition, patch by patch in float64: the residual streams and the predictions."""
    w = {name: value.double().numpy() for name, value in net.state_dict().items()}
    s, size = net.shape, net.shape.patch_size
    x = (picture.double().numpy() / 255 - np.array(aim_module.MEAN)) / np.array(aim_module.STD)

    def norm(h, name):
        centred = h - h.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def place(row, column, channels):
        half = channels // 2
        out = np.zeros(channels)
        for axis, at in ((0, column), (1, row)):
            for i in range(half // 2):
                angle = at / 10000 ** (i / (half / 2))
                out[axis * half + i], out[axis * half + half // 2 + i] = math.sin(angle), math.cos(angle)
        return out

    def gelu(a):
        return 0.5 * a * (1 + torch.erf(torch.from_numpy(a) / math.sqrt(2)).numpy())

    rows, columns = s.grid
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    patches = [x[r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(-1) for r, c in cells]
    h = np.stack([patch @ w["patch_embed.weight"].T + w["patch_embed.bias"] for patch in patches])
    h = norm(h, "patch_norm") + np.stack([place(r, c, s.d_model) for r, c in cells])
    streams = [h]
    for i in range(s.n_layer):
        n = norm(h, f"blocks.{i}.ln_1")
        q, k, v = np.split(n @ w[f"blocks.{i}.attn.qkv.weight"].T, 3, axis=1)
        mixed, width = np.zeros_like(h), s.d_model // s.n_head
        for head in range(s.n_head):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(h)):
                seen = np.flatnonzero(allowed[t])
                scores = k[seen, part] @ q[t, part] / math.sqrt(width)
                p = np.exp(scores - scores.max())
                mixed[t, part] = (p / p.sum()) @ v[seen, part]
        h = h + mixed @ w[f"blocks.{i}.attn.proj.weight"].T
        n = norm(h, f"blocks.{i}.ln_2")
        h = h + gelu(n @ w[f"blocks.{i}.mlp.fc.weight"].T) @ w[f"blocks.{i}.mlp.proj.weight"].T
        streams.append(h)
    g = norm(h, "ln_f") @ w["head.embed.weight"].T + w["head.embed.bias"]
    g = g + np.stack([place(r, c, s.head_width) for r, c in cells])
    for i in range(s.head_depth):
        n = norm(g, f"head.blocks.{i}.ln")
        g = g + gelu(n @ w[f"head.blocks.{i}.mlp.fc.weight"].T) @ w[f"head.blocks.{i}.mlp.proj.weight"].T
    predicted = norm(g, "head.ln_f") @ w["head.out.weight"].T + w["head.out.bias"]
    return streams, predicted, np.stack(patches)


@pytest.mark.parametrize("attention", ["causal", "prefix", "bidirectional"])
def test_the_model_is_its_definition(attention):
    net, x, total = model(attention=attention), pictures(1), SMALL.n_ctx
    masked = torch.arange(total)[None] >= 5 if attention == "prefix" else None
    allowed = {
        "causal": np.tri(total, dtype=bool),
        "prefix": np.array([[k < 5 or k <= q for k in range(total)] for q in range(total)]),
        "bidirectional": np.ones((total, total), bool),
    }[attention]
    streams, predicted, patches = slow(net, x[0], allowed)
    with torch.no_grad():
        pooled = net(x, masked, pooled=True)
        whole = net(x, masked, unpooled=True)
    for layer, stream in enumerate(streams):
        assert np.abs(pooled.features[layer][0].numpy() - stream.mean(0)).max() < 1e-5
        assert np.abs(whole.features[layer][0].numpy() - stream).max() < 1e-5
    if attention == "bidirectional":
        assert whole.logits is None
        return
    assert np.abs(whole.logits[0].numpy() - predicted).max() < 1e-4
    targets = [k for k in range(1, total) if masked is None or masked[0, k]]
    wanted = 0.0
    for k in targets:
        target = (patches[k] - patches[k].mean()) / np.sqrt(patches[k].var(ddof=1) + 1e-6)
        wanted += ((predicted[k - 1] - target) ** 2).mean()
    assert net.scored(1, masked) == len(targets) == (total - 5 if masked is not None else total - 1)
    assert abs(float(net.losses(whole, x, masked).sum()) - wanted) < 1e-4


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_a_frozen_model_gives_the_same_numbers(attention):
    net, x, where = model(attention=attention), pictures(), Machine(torch.device("cpu"), "bf16")
    masked = net.draw_masks(len(x), torch.Generator().manual_seed(5))
    with torch.inference_mode(), where.autocast():
        before = net(x, masked, pooled=True)
        net.freeze(where.dtype)
        after = net(x, masked, pooled=True)
    pairs = zip([after.logits, *after.features], [before.logits, *before.features], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert net.blocks[0].mlp.fc.weight.dtype == torch.bfloat16


def test_patches_go_by_rows_columns_channels_and_come_back():
    x = torch.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (1, 6, 12) and torch.equal(patches[0, 1], x[0, :2, 2:4].reshape(-1))
    assert torch.equal(unpatchify(patches, 4, 6), x)
    assert torch.equal(sincos_2d(3, 5, 8)[7], sincos_2d(9, 5, 8)[7])  # positions do not depend on the picture's height


def test_the_table_of_the_prefix_mask():
    masked = torch.tensor([[False, False, True, True]])
    assert prefix_mask(masked)[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.filterwarnings("ignore")  # FlexAttention is slow where it is not compiled, and says so
def test_flex_attention_equals_the_written_out_mask():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 16, 16, generator=generator) for _ in range(3))
    masked = torch.arange(16)[None] >= torch.tensor([[1], [7], [15]])
    scores = (q @ k.mT / 4).masked_fill(~prefix_mask(masked), -torch.inf)
    wanted = scores.softmax(-1) @ v
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=prefix_mask(masked))
    assert (aim_module.flex(q, k, v, aim_module.prefix_block_mask(masked)) - wanted).abs().max() < 1e-5
    assert (sdpa - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("card", "positions", "width", "serves"),
    [(True, 256, 16, True), (False, 256, 16, False), (True, 128, 16, False), (True, 256, 8, False)],
)
def test_flex_attention_is_for_cards_where_it_leaves_something_out(card, positions, width, serves):
    """Its kernels take heads of 16 or more, and leave out blocks of 128 positions."""
    masked = SimpleNamespace(is_cuda=card, shape=(2, positions))
    assert flex_serves(masked, width) is serves
    with torch.no_grad():  # nothing is compiled to evaluate
        assert not flex_serves(masked, width)


def test_cards_attend_by_a_mask_without_cudnn(monkeypatch):
    """Its gradient may be no number there."""
    used = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: used.append(cuda.cudnn_sdp_enabled()))
    for on_card in (True, False):
        attend_masked(SimpleNamespace(is_cuda=on_card), None, None, None)
    assert used == [False, True] and cuda.cudnn_sdp_enabled() and cuda.mem_efficient_sdp_enabled()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_mask_is_made_once_for_all_layers_and_flex_attention_compiled_on_its_own(monkeypatch):
    """Uncompiled it makes the whole table that it is there to avoid; a short training compiles nothing else."""
    net = model(attention="prefix").eval()
    x = pictures()
    masked = net.draw_masks(len(x), torch.Generator().manual_seed(0))
    made, real = [], aim_module.prefix_mask
    monkeypatch.setattr(aim_module, "prefix_mask", lambda masked: made.append(masked) or real(masked))
    expected = net(x, masked).logits
    assert len(made) == 1 < net.shape.n_layer

    compiled, called = [], []

    def compile(function, dynamic):
        assert dynamic is False
        compiled.append(function)
        return lambda *args: called.append(function) or function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(net, "to", lambda device: net)
    assert placed(net, Machine(torch.device("cpu"), "fp32")) is net and not compiled
    placed(net, Machine(torch.device("cuda"), "fp32"))
    assert compiled == [aim_module.flex]
    monkeypatch.undo()  # FlexAttention calls torch.compile itself
    on_cuda = AttentionMask(mask=aim_module.prefix_block_mask(masked), flex=net.flex)
    monkeypatch.setattr(AIM, "_attention_mask", lambda self, masked: on_cuda)
    torch.testing.assert_close(net(x, masked).logits, expected, atol=1e-5, rtol=1e-4)
    assert called == [aim_module.flex] * net.shape.n_layer


def test_prefixes_are_uniform_over_all_but_the_last_and_one_an_image():
    net = model(attention="prefix")
    masked = net.draw_masks(6000, torch.Generator().manual_seed(0))
    sizes = (~masked).sum(1)
    counts = torch.bincount(sizes, minlength=SMALL.n_ctx + 1)
    assert counts[0] == 0 and counts[SMALL.n_ctx] == 0 and counts[1:-1].min() > 300
    assert torch.equal(
        net.draw_masks(9, torch.Generator().manual_seed(3)), net.draw_masks(9, torch.Generator().manual_seed(3))
    )
    assert model(attention="causal").draw_masks(3, torch.Generator()) is None


@pytest.mark.parametrize(
    ("preset", "trunk", "head"),
    [
        ("aim-0.6b", 0.6805e9, 0.4071e9),
        ("aim-1b", 1.2094e9, 0.4081e9),
        ("aim-3b", 2.7200e9, 0.4102e9),
        ("aim-7b", 6.4454e9, 0.4123e9),
    ],
)
def test_presets_have_the_published_sizes(preset, trunk, head):
    config = effective(PretrainFile, preset)
    shape = AimShape.of(vars(config.model), (224, 224, 3), None, "raster")
    with torch.device("meta"):
        net = build(shape)
    assert sum(p.numel() for p in net.parameters()) == shape.parameter_count()
    assert sum(p.numel() for p in net.head.parameters()) == shape.head_count()
    assert abs(shape.trunk_count() / trunk - 1) < 1e-3 and abs(shape.head_count() / head - 1) < 1e-3
    assert abs(12 * shape.n_layer * shape.d_model**2 / trunk - 1) < 2e-3  # what the paper's sizes count
    assert shape.n_ctx == 256 and config.train.batch_size == 4096 and config.train.lr == 1e-3


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_flops_are_what_torch_counts(attention):
    shape = AimShape(4, 2, 64, 4, 32, 32, head_depth=2, head_width=96, attention=attention)
    net = model(shape)
    x = pictures(2, 32)
    masked = net.draw_masks(2, torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net.losses(net(x, masked), x, masked).sum().backward()
    counted, ours = counter.get_total_flops(), 2 * shape.n_ctx * shape.flops_per_token("exact")
    # no gradient flows to the pixels: the patch embedding's backward has one product, not two
    ours -= 2 * shape.n_ctx * 2 * shape.patch_values * shape.d_model
    assert abs(counted / ours - 1) < 0.01
    assert (shape.flops_per_token("exact-causal") < shape.flops_per_token("exact")) == (attention == "causal")
    assert shape.flops_per_token("6nd") == 6 * (shape.trunk_count() + shape.head_count())


def test_init_is_xavier_uniform_with_zero_biases():
    net = AIM(AimShape(2, 2, 64, 4, 16, 16, head_width=32, n_classes=3)).init_weights(torch.Generator().manual_seed(0))
    for name, p in net.named_parameters():
        if name.endswith("bias") or name.startswith("classifier"):
            assert not p.any()
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.9 * bound < p.abs().max() <= bound and abs(p.std() * math.sqrt(3) / bound - 1) < 0.1, name


# --- who sees whom


def test_certificates_hold_and_planted_leaks_are_caught(aim, pixels, monkeypatch):
    def failing(path):
        return {c["name"] for c in check.run(path, pixels, device="cpu")["checks"] if not c["ok"]}

    assert not failing(aim["prefix"]) and not failing(aim["causal"])
    real = aim_module.prefix_mask
    monkeypatch.setattr(aim_module, "prefix_mask", lambda masked: real(masked) | real(masked).roll(-1, -2))
    assert {"prefix causality", "prefix mask"} <= failing(aim["prefix"])
    monkeypatch.setattr(aim_module, "prefix_mask", real)

    def leaky(self, x, mask):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        allowed = torch.ones(t, t, dtype=torch.bool).tril(1) if mask.causal else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.proj(y.transpose(1, 2).flatten(2))

    monkeypatch.setattr(aim_module.Attention, "forward", leaky)
    assert "causality" in failing(aim["causal"])


def test_a_loss_that_is_not_shifted_is_caught(aim, pixels, monkeypatch):
    def unshifted(self, output, images, masked):
        loss = F.mse_loss(output.logits, self.targets(images), reduction="none").mean(-1)
        return loss, torch.ones_like(loss, dtype=torch.bool) if masked is None else masked

    monkeypatch.setattr(AIM, "position_losses", unshifted)
    assert "loss" in {c["name"] for c in check.run(aim["causal"], pixels, device="cpu")["checks"] if not c["ok"]}


@pytest.mark.parametrize("attention", ["prefix", "causal"])
def test_noise_cannot_be_predicted(tmp_path, attention):
    """No model may know a held-out patch of noise: (n - 1) / n is what a prediction of zero gets.

    The noise has ImageNet's means and deviations, so that after normalisation no channel is told from another.
    """
    z = np.random.default_rng(0).normal(0, 0.5, (400, 8, 8, 3))
    noise = (255 * (aim_module.MEAN + z * aim_module.STD)).round().clip(0, 255).astype(np.uint8)
    store = write_pixels(tmp_path / "n.zarr", count=400, side=8, pixels=noise)
    sets = ("train.steps=60", "train.batch_size=32", "train.lr=0.003", f"model.attention={attention}")
    pretrain.run(store, tmp_path / "m", recipe(*sets), val_fraction=0.25, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "m" / "log.jsonl").read_text().splitlines()]
    floor = 1 - 1 / (3 * 2 * 2)
    assert floor - 0.005 < [row["val_loss"] for row in rows if "val_loss" in row][-1] < floor + 0.1


def test_image_gpt_cannot_predict_noise_either(tmp_path):
    rng = np.random.default_rng(0)
    store = write_tokens(tmp_path / "n.zarr", count=400, side=4, tokens=rng.integers(0, 16, (400, 16)))
    sets = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=60", "train.batch_size=32")
    pretrain.run(store, tmp_path / "m", effective(PretrainFile, sets=sets), val_fraction=0.25, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "m" / "log.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in rows if "val_loss" in row][-1] > math.log(16) - 0.01


# --- orders and objectives


@pytest.mark.parametrize("order", NAMED)
def test_every_order_is_a_permutation(order):
    for height, width in ((4, 4), (3, 5), (6, 2)):
        assert np.array_equal(np.sort(order_of(order, height, width)), np.arange(height * width))


def test_the_named_orders():
    assert order_of("column", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert order_of("reversed", 2, 2).tolist() == [3, 2, 1, 0]
    assert order_of("checkerboard", 3, 3).tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    spiral = order_of("spiral-out", 3, 3).tolist()
    assert spiral[0] == 4 and spiral[-1] == 0
    assert all(abs(a // 3 - b // 3) + abs(a % 3 - b % 3) == 1 for a, b in itertools.pairwise(spiral))
    assert order_of("column", 1, 2, channels=3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ["spiral-out", "random"])
def test_an_order_moves_content_positions_mask_and_loss_together(tmp_path, pixels, tokens, order):
    pretrain.run(pixels, tmp_path / "aim", recipe(f"sequence.order={order}"), device="cpu")
    sets = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=6", "train.batch_size=8")
    config = effective(PretrainFile, sets=[*sets, f"sequence.order={order}"])
    pretrain.run(tokens, tmp_path / "igpt", config, device="cpu")
    for name, data in (("aim", pixels), ("igpt", tokens)):
        result = check.run(tmp_path / name, data, device="cpu")
        assert result["ok"] or {c["name"] for c in result["checks"] if not c["ok"]} == {"palette"}
        assert open_checkpoint(tmp_path / name).shape["order"] == order
    sample.run(tmp_path / "igpt", tmp_path / "s.png", count=2, device="cpu")
    with pytest.raises(PixseqError, match="are not what it sees first"):
        sample.run(tmp_path / "igpt", tmp_path / "c.png", prompt=str(tokens), device="cpu")


@torch.no_grad()
def test_a_reordered_aim_is_the_raster_one_on_reordered_pictures():
    """With equal positions, an order is the same as shuffling the patches of the pictures."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    plain = model(attention="causal")
    moved = AIM(AimShape(**{**vars(SMALL), "order": "random"})).eval()
    moved.load_state_dict({**plain.state_dict(), "order": order})
    moved.attention = "causal"
    plain.position_embeddings = moved.position_embeddings = lambda channels: torch.zeros(16, channels)
    x = pictures(2)
    shuffled = unpatchify(patchify(x, 2)[:, order], 8, 8)
    a, b = moved(x), plain(shuffled)
    assert torch.equal(a.logits, b.logits) and torch.equal(moved.losses(a, x, None), plain.losses(b, shuffled, None))


def test_a_permutation_of_ones_own_and_what_is_none(tmp_path, pixels):
    np.save(tmp_path / "own.npy", np.arange(16)[::-1])
    pretrain.run(
        pixels, tmp_path / "m", recipe(f"sequence.order={tmp_path / 'own.npy'}", "train.steps=2"), device="cpu"
    )
    with machine("cpu", "fp32") as where:
        net, _ = open_model(tmp_path / "m", where)
    assert net.order.tolist() == list(range(16))[::-1] and net.shape.order == "file"
    for name, values in (("twice", np.zeros(16, int)), ("short", np.arange(9)), ("float", np.arange(16.0))):
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(UsageError, match="is no permutation"):
            pretrain.run(pixels, tmp_path / "x", recipe(f"sequence.order={tmp_path / name}.npy"), device="cpu")
    with pytest.raises(UsageError, match=r"neither a readable .npy nor a name"):
        pretrain.run(pixels, tmp_path / "x", recipe("sequence.order=zigzag"), device="cpu")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("target, unit", [("pixels", "pixel_mse"), ("codes", "nats_per_patch")])
def test_other_targets(tmp_path, pixels, target, unit):
    config = recipe(f"model.target={target}", "model.n_codes=8", "train.steps=40", "train.lr=0.003")
    pretrain.run(pixels, tmp_path / "m", config, val_fraction=0.1, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "m" / "log.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0]
    assert unit in evaluate.run(tmp_path / "m", pixels, device="cpu")
    assert check.run(tmp_path / "m", pixels, device="cpu")["ok"]


def test_more_codes_than_patches_are_refused(tmp_path, pixels):
    with pytest.raises(UsageError, match="n_codes"):
        pretrain.run(pixels, tmp_path / "m", recipe("model.target=codes", "model.n_codes=100000"), device="cpu")


# --- through the stages


def test_features_are_those_of_the_model_and_may_stay_whole(aim, pixels, tmp_path):
    with machine("cpu", "fp32") as where:
        net, _ = open_model(aim["prefix"], where)
    x = torch.from_numpy(open_store(pixels, "pixels").read("pixels", slice(0, 5)))
    for attention in (None, "causal", "prefix"):
        for pool in ("mean", "none"):
            out = tmp_path / f"{attention}{pool}.zarr"
            features.run(aim["prefix"], pixels, out, pool=pool, attention=attention, device="cpu", batch_size=7)
        mean = open_store(tmp_path / f"{attention}mean.zarr", "features").read("features")
        whole = open_store(tmp_path / f"{attention}none.zarr", "features").read("features")
        assert whole.shape == (3, 96, 16, 16) and np.abs(whole.mean(2) - mean).max() < 1e-6
        if attention != "prefix":
            net.attention = attention or "bidirectional"
            with torch.no_grad():
                wanted = torch.stack(net(x, pooled=True).features)
            assert np.abs(mean[:, :5] - wanted.numpy()).max() < 1e-5
    with pytest.raises(UsageError, match="can be used with bidirectional, causal, prefix"):
        features.run(aim["prefix"], pixels, tmp_path / "x.zarr", attention="diagonal", device="cpu")


def test_what_was_trained_causally_is_used_causally_by_default(aim, pixels, tmp_path):
    for trained, usual in (("causal", "causal"), ("prefix", "bidirectional")):
        record = features.run(aim[trained], pixels, tmp_path / f"{trained}.zarr", device="cpu")
        asked = features.run(aim[trained], pixels, tmp_path / f"asked-{usual}.zarr", attention=usual, device="cpu")
        assert record["config"]["attention"] == usual and record["id"] == asked["id"]
    few = effective(FinetuneFile, sets=["finetune.steps=2", "finetune.batch_size=8"])
    for asked in (None, "bidirectional"):
        tuned = finetune.run(aim["causal"], pixels, tmp_path / f"{asked}", few, attention=asked, device="cpu")
        with machine("cpu", "fp32") as where:
            assert open_model(tmp_path / f"{asked}", where)[0].attention == (asked or "causal")
        assert tuned["config"]["attention"] == asked
    old = replace(SMALL, adapted="bidirectional")  # as checkpoints have said that nothing was adapted to
    assert old.attention_patterns[0] == AIM(old).attention == "causal"
    assert replace(old, n_classes=3).attention_patterns[0] == "bidirectional"  # a classifier that was trained so


def test_image_gpt_features_may_stay_whole_too(checkpoints, tokens, tmp_path):
    for pool in ("mean", "none"):
        features.run(checkpoints["ar"], tokens, tmp_path / f"{pool}.zarr", pool=pool, device="cpu")
    mean, whole = (open_store(tmp_path / f"{p}.zarr", "features").read("features") for p in ("mean", "none"))
    assert whole.shape == (3, 96, 36, 16) and np.abs(whole.mean(2) - mean).max() < 1e-6
    with pytest.raises(UsageError, match="can be used with causal"):
        features.run(checkpoints["ar"], tokens, tmp_path / "x.zarr", attention="prefix", device="cpu")


def test_pixels_of_pixels_are_a_baseline(pixels, tmp_path):
    record = features.run("pixels", pixels, tmp_path / "f.zarr", device="cpu")
    assert record["summary"]["width"] == 8 * 8 * 3


@pytest.mark.parametrize("sets", [(), ("train.augment=resized-crop-jitter", "train.decay=matrices", "train.ema=0.9")])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, pixels, sets):
    config = recipe(*sets, "train.weight_decay=0.05", "train.clip_norm=1.0")
    whole = pretrain.run(pixels, tmp_path / "whole", config, val_fraction=0.1, device="cpu")
    while True:
        try:
            limits = Limits(time_limit_minutes=0)
            record = pretrain.run(
                pixels, tmp_path / "parts", config, val_fraction=0.1, device="cpu", limits=limits, resume=True
            )
            break
        except Interrupted:
            continue
    assert record["id"] == whole["id"]


def test_the_loss_along_the_sequence(aim, checkpoints, pixels, tokens, tmp_path):
    for name, path, data, length in (("aim", aim["causal"], pixels, 16), ("igpt", checkpoints["ar"], tokens, 36)):
        target = tmp_path / f"{name}.json"
        numbers = evaluate.run(path, data, device="cpu", by_position=target)
        curve = json.loads(target.read_text())["loss_by_position"]
        scored = [x for x in curve if x is not None]
        assert len(curve) == length and len(scored) == length - (name == "aim")
        loss = numbers["normalized_mse"] if name == "aim" else numbers["nats_per_token"]
        assert abs(np.mean(scored) - loss) < 1e-5 and target.with_suffix(".png").is_file()
    with pytest.raises(PixseqError, match="nothing to predict with bidirectional attention"):
        evaluate.run(aim["causal"], pixels, device="cpu", attention="bidirectional", by_position=tmp_path / "x.json")


def test_finetuning_trains_all_or_low_rank_updates(aim, pixels, checkpoints, tokens, tmp_path):
    config = effective(FinetuneFile, sets=["finetune.steps=40", "finetune.batch_size=16", "finetune.lr=0.003"])
    finetune.run(aim["prefix"], pixels, tmp_path / "all", config, device="cpu")
    assert evaluate.run(tmp_path / "all", pixels, device="cpu")["accuracy"] > 0.5
    low = effective(FinetuneFile, sets=["finetune.steps=20", "finetune.batch_size=16", "finetune.lora_rank=2"])
    for name, path, data in (("aim", aim["prefix"], pixels), ("igpt", checkpoints["ar"], tokens)):
        record = finetune.run(path, data, tmp_path / name, low, device="cpu")
        assert 0 < record["summary"]["trained_share"] < 0.5
        before, after = open_checkpoint(path).weights(), open_checkpoint(tmp_path / name).weights("last")
        assert {*after} == {*before, "classifier.weight"}
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        blocks = len({key.split(".")[1] for key in before if key.startswith("blocks.")})
        assert changed == {f"blocks.{i}.attn.{part}.weight" for i in range(blocks) for part in ("qkv", "proj")}
        for key in changed:  # q, k and v have a rank of their own each
            for update in (after[key] - before[key]).chunk(3 if "qkv" in key else 1):
                assert torch.linalg.matrix_rank(update, rtol=1e-3) == 2
        failed = {c["name"] for c in check.run(tmp_path / name, data, device="cpu")["checks"] if not c["ok"]}
        assert failed <= {"palette"}
    causal = effective(FinetuneFile, sets=["finetune.steps=4", "finetune.batch_size=8"])
    finetune.run(aim["causal"], pixels, tmp_path / "joint", causal, attention="causal", device="cpu")
    assert "gen_loss" in (tmp_path / "joint" / "log.jsonl").read_text()
    assert open_checkpoint(tmp_path / "joint").shape["adapted"] == "causal"


@pytest.mark.parametrize("interrupted", [False, True])
def test_checkpoints_are_kept_on_the_way(tmp_path, pixels, interrupted):
    config = recipe("train.ema=0.5")
    if interrupted:
        with pytest.raises(Interrupted):
            limits = Limits(time_limit_minutes=0)
            pretrain.run(pixels, tmp_path / "m", config, val_fraction=0.1, device="cpu", limits=limits, keep="every:1")
    last = pretrain.run(pixels, tmp_path / "m", config, val_fraction=0.1, device="cpu", resume=True, keep="4,8,12")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"m", "m-step4", "m-step8"} | ({"m-step1"} if interrupted else set())
    for step in (4, 8):
        kept = open_checkpoint(tmp_path / f"m-step{step}")
        assert kept.manifest["summary"]["steps"] == step and kept.manifest["id"] != last["id"]
        assert check.run(kept.path, pixels, device="cpu")["ok"] and kept.weights("ema")
    other = recipe("train.ema=0.5", "train.seed=1")  # what another recipe kept is not taken for this one's
    pretrain.run(pixels, tmp_path / "m", other, val_fraction=0.1, device="cpu", resume=True, overwrite=True, keep="4")
    assert open_checkpoint(tmp_path / "m-step4").manifest["config"]["train"]["seed"] == 1
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(PixseqError, match="m-step4 already exists"):
        pretrain.run(pixels, tmp_path / "m", config, val_fraction=0.1, device="cpu", overwrite=False, keep="4")
    assert not (tmp_path / "m.partial").exists()
    with pytest.raises(UsageError, match="names no steps"):
        pretrain.run(pixels, tmp_path / "x", config, device="cpu", keep="every:0")


def test_what_does_not_fit_is_told(tmp_path, aim, checkpoints, pixels, tokens):
    with pytest.raises(UsageError, match="patch_size 3 does not divide pictures of 8x8"):
        pretrain.run(pixels, tmp_path / "x", recipe("model.patch_size=3"), device="cpu")
    with pytest.raises(UsageError, match="patch_size 8 does not divide"):
        pretrain.run(pixels, tmp_path / "x", recipe("model.patch_size=8"), device="cpu")
    with pytest.raises(UsageError, match="multiple of 4"):
        recipe("model.head_width=6")
    with pytest.raises(UsageError, match=r"model.patch_size is of models of family aim, and this one is of igpt"):
        effective(PretrainFile, sets=["model.patch_size=4"])
    with pytest.raises(UsageError, match=r"model.family is 'aims'"):
        effective(PretrainFile, sets=["model.family=aims"])
    with pytest.raises(PixseqError, match="of kind tokens, where pixels is needed"):
        pretrain.run(tokens, tmp_path / "x", recipe(), device="cpu")
    with pytest.raises(PixseqError, match="of kind pixels, where tokens is needed"):
        pretrain.run(pixels, tmp_path / "x", effective(PretrainFile), device="cpu")
    for stage in (evaluate, features):
        args = (tmp_path / "x",) if stage is features else ()
        with pytest.raises(PixseqError, match="of kind tokens, where pixels is needed"):
            stage.run(aim["prefix"], tokens, *args, device="cpu")
        with pytest.raises(PixseqError, match="of kind pixels, where tokens is needed"):
            stage.run(checkpoints["ar"], pixels, *args, device="cpu")
    other = write_pixels(tmp_path / "o.zarr", side=16)
    with pytest.raises(PixseqError, match=r"of 8x8 pictures.*16x16"):
        features.run(aim["prefix"], other, tmp_path / "x", device="cpu")
    with pytest.raises(PixseqError, match="draws no pixels"):
        sample.run(aim["prefix"], tmp_path / "x.png", device="cpu")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("sets", [(), ("model.objective=bert",), TINY, (*TINY, "model.target=codes")])
def test_a_shape_tells_the_configuration_it_was_made_from(sets):
    config = effective(PretrainFile, sets=sets)
    shape = SHAPES[config.model.family].of(as_dict(config.model), (8, 8, 1), 256, "raster")
    flags = {f"model.{key}": value for key, value in shape.config().items()}
    assert effective(PretrainFile, flags=flags).model == config.model


def test_shapes_come_back_from_manifests():
    for shape in (
        SMALL,
        IgptShape(2, 2, 16, 16, 36),
        AimShape(2, 2, 16, 2, 8, 8, n_classes=3, probe_layers=(1, 2), probe_heads=2),
    ):
        assert shape_from(json.loads(json.dumps(vars(shape)))) == shape
    for strange in ({"family": "vit"}, {**vars(SMALL), "rotary": True}):
        with pytest.raises(PixseqError, match="no model known here"):
            shape_from(strange)
    assert isinstance(build(IgptShape(2, 2, 16, 16, 36)), ImageGPT)


def test_normalised_patches_have_unit_unbiased_variance():
    x, mean, deviation = normalised(torch.randn(2, 3, 12) * 5 + 1)
    assert torch.allclose(x.var(-1), torch.ones(2, 3), atol=1e-4) and x.mean(-1).abs().max() < 1e-5
    assert mean.shape == deviation.shape == (2, 3, 1)


def test_predictions_are_drawn_beside_the_truth(aim, checkpoints, pixels, tokens, tmp_path):
    for name, path, data in (
        ("aim", aim["prefix"], pixels),
        ("ar", checkpoints["ar"], tokens),
        ("bert", checkpoints["bert"], tokens),
    ):
        evaluate.run(path, data, device="cpu", pictures=tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    with machine("cpu", "fp32") as where:
        net, _ = open_model(aim["causal"], where, attention="causal")
    x = pictures()
    exact = F.pad(net.targets(x)[:, 1:], (0, 0, 0, 1))
    drawn = net.predictions(aim_module.Output(exact, None, None), x, None)
    assert (drawn.int() - x.int()).abs().max() <= 1
