"""The cache equals the full forward, and a picture depends on its seed alone."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
from test_model import AR, BERT, random_model, tokens

from pixseq.models import decoder_step, sampling
from pixseq.models.igpt import ImageGPT
from pixseq.models.sampling import Decoder, Matrix, draw, sample


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Both ways that a step is computed on a CPU."""
    if request.param == "plain":
        monkeypatch.setattr(decoder_step, "library", lambda dtype: None)
    elif decoder_step.library(torch.float32) is None:
        pytest.skip("there is no C compiler here")
    return request.param


@pytest.fixture
def threads():
    """Sets their number for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("start", [0, 1, 7, 19])
def test_cached_logits_equal_the_full_forward(start, way):
    model, x = random_model(AR), tokens(AR)
    with torch.no_grad():
        full = model(x).logits
        decoder = Decoder(model, len(x))
        assert torch.allclose(decoder.prefill(x[:, :start]), full[:, start], atol=1e-5)
        for position in range(start + 1, AR.n_ctx):
            logits = decoder.step(x[:, position - 1], position)
            assert torch.allclose(logits, full[:, position], atol=1e-5)


def naive_sample(model, prompt, uniform):
    """A full forward of the whole picture for every pixel, as the released sampler does."""
    x = torch.zeros(len(prompt), AR.n_ctx, dtype=torch.long)
    x[:, : prompt.shape[1]] = prompt
    for position in range(prompt.shape[1], AR.n_ctx):
        with torch.no_grad():
            logits = model(x).logits[:, position]
        x[:, position] = draw(logits, uniform[:, position - prompt.shape[1]])
    return x


@pytest.mark.parametrize("kept", [0, 10])
def test_sampler_equals_the_naive_one_and_keeps_the_prompt(kept, way):
    model, prompt = random_model(AR), tokens(AR)[:, :kept]
    uniform = torch.rand(4, AR.n_ctx - kept, generator=torch.Generator().manual_seed(5))
    drawn = sample(model, prompt, uniform)
    assert torch.equal(drawn, naive_sample(model, prompt, uniform))
    assert torch.equal(drawn[:, :kept], prompt)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kept", [0, 3])
def test_a_picture_does_not_depend_on_its_batch(kept, bf16, way, monkeypatch):
    monkeypatch.setattr(sampling, "KEPT", 0)
    monkeypatch.setattr(sampling, "LEAST", 7)  # pictures drawn at once, of 13
    model = random_model(AR)
    uniform = torch.rand(13, AR.n_ctx - kept, generator=torch.Generator().manual_seed(6))
    prompt = torch.arange(13)[:, None].remainder(AR.n_vocab).expand(13, kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = sample(model, prompt, uniform)
        for size in (1, 2, 5, 12):
            parts = [sample(model, prompt[i : i + size], uniform[i : i + size]) for i in range(0, 13, size)]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [96, 256, 1024])
@pytest.mark.parametrize("chunked", [False, True])
def test_rows_of_a_product_do_not_depend_on_their_number(dtype, inputs, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(sampling, "rows_alike", lambda *size: False)
    g = torch.Generator().manual_seed(8)
    x, weight = torch.randn(256, inputs, generator=g), Matrix(torch.randn(256, inputs, generator=g), dtype)
    whole = weight(x)
    sums = x.sum(1, keepdim=True).expand(256, 256).contiguous()
    added = sums.clone()
    weight.add(added, x)
    assert torch.allclose(added, sums + whole, atol=1e-4)
    for rows in (2, 4, 8, 30, 64, 200):
        assert torch.equal(weight(x[:rows]), whole[:rows])
        few = sums[:rows].clone()
        weight.add(few, x[:rows])
        assert torch.equal(few, added[:rows])


@pytest.mark.parametrize("kernels", ["SSE4_2", "AVX2"])
def test_nor_with_kernels_that_do_not_treat_all_rows_alike(kernels):
    program = """import torch
from pixseq.models.sampling import Matrix
x, weight = torch.randn(96, 256), Matrix(torch.randn(64, 256), torch.float32)
raise SystemExit(not all(torch.equal(weight(x[:n]), weight(x)[:n]) for n in (2, 3, 7, 8, 13, 64)))"""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": kernels}  # other libraries do not look at it
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_every_block_of_inputs_is_tried(monkeypatch):
    """Of 768 inputs 512 are summed first, then 256, by a kernel that may be another."""
    monkeypatch.setattr(sampling, "rows_alike", lambda inputs, outputs, threads: (inputs, outputs) == (512, 4))
    assert Matrix(torch.ones(4, 768), torch.float32).chunked and not Matrix(torch.ones(4, 1024), torch.float32).chunked


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_after_prompts_do_not_depend_on_the_batch_to_the_last_bit(bf16, way):
    shape = replace(AR, d_model=128, n_head=4)
    model, x = random_model(shape), torch.randint(AR.n_vocab, (24, 6), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):

        def logits(some):
            decoder = Decoder(model, len(some))
            return torch.stack([decoder.prefill(some[:, :5]), decoder.step(some[:, 5], 6)], dim=1)

        whole = logits(x)
        for size in (2, 4, 8):
            assert torch.equal(torch.cat([logits(x[i : i + size]) for i in range(0, 24, size)]), whole)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("width, heads", [(40, 2), (96, 8), (128, 2)])
def test_a_compiled_step_equals_the_plain_one(width, heads, bf16, monkeypatch):
    """Heads 20, 12 and 64 wide. Both are as far from the exact logits; in bf16 the plain one rounds more."""
    if decoder_step.library(torch.float32) is None:
        pytest.skip("there is no C compiler here")
    shape = replace(AR, d_model=width, n_head=heads, n_vocab=43, n_ctx=40)
    model, x = random_model(shape), torch.randint(43, (6, 40), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):

        def logits():
            decoder = Decoder(model, len(x))
            drawn = [decoder.prefill(x[:, :17]), *(decoder.step(x[:, t - 1], t) for t in range(18, 40))]
            return torch.stack(drawn).float()

        compiled = logits()
        monkeypatch.setattr(decoder_step, "library", lambda dtype: None)
        plain = logits()
    assert (compiled - plain).abs().max() < (0.05 if bf16 else 5e-5) * plain.abs().max()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_compiled_and_plain_steps_draw_the_same_pictures(settings, monkeypatch):
    if decoder_step.library(torch.float32) is None:
        pytest.skip("there is no C compiler here")
    model, prompt = random_model(AR), tokens(AR)[:, :4]
    uniform = torch.rand(4, AR.n_ctx - 4, generator=torch.Generator().manual_seed(3))
    compiled = sample(model, prompt, uniform, **settings)
    monkeypatch.setattr(decoder_step, "library", lambda dtype: None)
    assert torch.equal(sample(model, prompt, uniform, **settings), compiled)


@pytest.mark.parametrize("samples", [1, 3, 70])
def test_a_compiled_step_does_not_depend_on_the_number_of_threads(samples, threads, monkeypatch):
    if decoder_step.library(torch.float32) is None:
        pytest.skip("there is no C compiler here")
    monkeypatch.setattr(decoder_step, "WORK", 1)  # so that few samples have several threads
    model, x = random_model(replace(AR, d_model=96, n_head=3)), torch.arange(samples).remainder(AR.n_vocab)
    uniform = torch.rand(samples, AR.n_ctx, generator=torch.Generator().manual_seed(4))
    logits, pictures = [], []
    for count in (1, 2, 3):
        threads(count)
        with torch.inference_mode():
            decoder = Decoder(model, samples)
            first = decoder.prefill(x.new_zeros(samples, 0))
            logits.append(torch.stack([first, decoder.step(x, 1), decoder.step(x, 2)]))
        pictures.append(sample(model, x.new_zeros(samples, 0), uniform))
    for each in (logits, pictures):
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])


@pytest.mark.parametrize("compiler", ["", "/nowhere/cc", "false", "cc '"])
def test_without_a_compiler_steps_are_plain(compiler, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(decoder_step, "library", decoder_step.library.__wrapped__)
    assert Decoder(random_model(AR), 2).compiled is None
    assert sampling.way_of_steps(random_model(AR)) == "plain"


def test_where_no_code_can_be_put_steps_are_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert decoder_step.library.__wrapped__(torch.float32) is None


def test_a_temperature_at_which_quotients_overflow_takes_the_likeliest_colours(way):
    model, prompt = random_model(AR), tokens(AR)[:, :4]
    uniform = torch.rand(4, AR.n_ctx - 4, generator=torch.Generator().manual_seed(3))
    likeliest = sample(model, prompt, uniform, temperature=0)
    for temperature in (1e-320, 1e-42, 1e-38):
        assert torch.equal(sample(model, prompt, uniform, temperature=temperature), likeliest)


@pytest.mark.parametrize("position", [4, 5, AR.n_ctx - 1])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 3}])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(position, settings, way):
    """Weights are finite, and so large that from one position on what they give is not."""
    model, prompt = random_model(AR), tokens(AR)[:3, :4]
    model.wte.data.fill_(2e38)
    model.wpe.data[position] = 2e38
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(model, prompt, torch.rand(3, AR.n_ctx - 4), **settings)


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("keys", [1e30, -1e30])
@pytest.mark.parametrize("bf16", [False, True])
def test_nor_where_only_attention_meets_such_numbers(kept, keys, bf16, way):
    """Queries and keys are finite, their products are not, and values are small."""
    model = random_model(AR)
    d, qkv = AR.d_model, model.blocks[0].attn.qkv.weight.data
    qkv[:d], qkv[d : 2 * d] = 1e30 * qkv[:d], keys * qkv[:d]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), pytest.raises(FloatingPointError, match="not finite"):
        sample(model, tokens(AR)[:3, :kept], torch.rand(3, AR.n_ctx - kept))


@pytest.mark.parametrize("kept, drawn", [(AR.n_ctx, 0), (4, AR.n_ctx - 5), (4, AR.n_ctx - 3)])
def test_what_is_kept_and_drawn_makes_a_picture(kept, drawn, way):
    with pytest.raises(ValueError, match=f"{kept} and {drawn} positions of {AR.n_ctx}"):
        sample(random_model(AR), tokens(AR)[:, :kept], torch.rand(4, drawn))


def test_compiled_steps_of_a_tiny_model_do_not_take_samples_without_end(monkeypatch):
    monkeypatch.setattr(decoder_step, "library", lambda dtype: object())
    tiny = random_model(replace(AR, n_layer=1, n_head=1, d_model=1, n_ctx=2))
    assert sampling.samples_together(tiny, 1 << 22) <= sampling.MOST  # a number of each lies on the stack


def test_equal_prompts_run_once(monkeypatch):
    model, prompt = random_model(AR), tokens(AR)[:2, :10].repeat(3, 1)
    uniform = torch.rand(6, AR.n_ctx - 10, generator=torch.Generator().manual_seed(5))
    each = torch.cat([sample(model, prompt[i : i + 1], uniform[i : i + 1]) for i in range(6)])
    real, ran = ImageGPT.embed, []
    monkeypatch.setattr(ImageGPT, "embed", lambda self, x: ran.append(len(x)) or real(self, x))
    assert torch.equal(sample(model, prompt, uniform), each)
    assert ran == [2]


def test_draw_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount(draw(logits.expand(10_000, -1), uniform), minlength=4) / 10_000
    assert torch.allclose(counts, logits.softmax(-1)[0], atol=2e-4)


def test_temperature_top_k_and_top_p_truncate():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = torch.linspace(0, 1, 1001)[:-1]
    many = logits.expand(1000, -1)
    assert set(draw(many, uniform, temperature=0).tolist()) == {2}
    assert set(draw(many, uniform, top_k=2).tolist()) == {1, 2}
    assert set(draw(many, uniform, top_p=0.6).tolist()) == {2}  # 2 alone has 0.61
    assert set(draw(many, uniform, top_p=0.7).tolist()) == {1, 2}
    assert set(draw(many, uniform, top_k=400, top_p=1.0).tolist()) == {0, 1, 2, 3}
    cold = torch.bincount(draw(many, uniform, temperature=0.5), minlength=4) / 1000
    assert torch.allclose(cold, (logits / 0.5).softmax(-1)[0], atol=2e-3)


def test_bert_models_are_not_sampled():
    with pytest.raises(ValueError, match="autoregressive"):
        sample(random_model(BERT), torch.zeros(1, 0, dtype=torch.long), torch.rand(1, AR.n_ctx))
