"""Steps that a card repeats draw what plain ones do, whether they are recorded or not."""

from functools import partial

import numpy as np
import pytest
import torch
from card import Card
from test_model import AR, random_model, tokens

from pixseq import progress
from pixseq.models import decoder_step, igpt_checks, sampling, static_step
from pixseq.models.igpt_checks import certify
from pixseq.models.sampling import Decoder, sample
from pixseq.models.static_step import StaticSteps
from pixseq.runtime import Machine, cuda
from pixseq.stages import sample as drawing

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Of 20 positions: steps that end at 7, 14 and 20, beside plain ones."""
    monkeypatch.setattr(static_step, "PARTS", 3)
    monkeypatch.setattr(static_step, "LEAST", 1)
    monkeypatch.setattr(decoder_step, "library", lambda dtype: None)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Makes steps static from then on."""
    return lambda: monkeypatch.setattr(sampling, "is_static", lambda model: True)


def drawn(model, kept, **settings):
    """9 pictures, of 3 prompts."""
    prompt = tokens(AR)[:3, :kept].repeat(3, 1)
    return sample(model, prompt, torch.rand(9, AR.n_ctx - kept, generator=torch.Generator().manual_seed(3)), **settings)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("kept", "ends"), [(0, 3), (6, 2), (13, 1), (19, 0)])
def test_static_steps_draw_the_same_pictures(kept, ends, recorded, as_on_a_card, monkeypatch):
    model, card = random_model(AR), Card(monkeypatch)
    plain = drawn(model, kept)
    as_on_a_card()
    record = partial(cuda.recorded, CUDA) if recorded else lambda steps: steps
    assert torch.equal(drawn(model, kept, record=record), plain)
    if recorded:
        assert card.log.count("begin") == ends and card.log.count("replay") == AR.n_ctx - kept - 1


@pytest.mark.parametrize("bf16", [False, True])
def test_a_card_runs_all_prompts_at_once_and_none_beside(bf16, as_on_a_card, monkeypatch):
    """Each time it is told of little it waits for more; on a CPU as many rows at a time as there always are."""
    run, real = [], Decoder._prefill
    monkeypatch.setattr(
        Decoder, "_prefill", lambda self, inputs, *rest: run.append(len(inputs)) or real(self, inputs, *rest)
    )
    monkeypatch.setattr(sampling, "ROWS", 14)
    monkeypatch.setattr(sampling, "NUMBERS", 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        drawn(random_model(AR), 6)
        as_on_a_card()
        drawn(random_model(AR), 6)
    assert run == [2, 2, 4]  # samples that fill up a product have an empty prompt


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_all_ways_to_choose_are_recorded(settings, as_on_a_card, monkeypatch):
    model, card = random_model(AR), Card(monkeypatch)
    plain = drawn(model, 4, **settings)
    as_on_a_card()
    assert torch.equal(drawn(model, 4, record=partial(cuda.recorded, CUDA), **settings), plain)
    assert card.log.count("replay") == AR.n_ctx - 5


def test_the_certificate_of_the_cache_is_of_the_steps_that_a_card_takes(as_on_a_card, monkeypatch):
    def cache():
        with torch.inference_mode():
            checks = certify(random_model(AR), tokens(AR)[:2], torch.Generator().manual_seed(0), 1e-4)
            return next(check for check in checks if check.name == "cache")

    def unmasked(q, k, v, mask, scale):
        return sampling.attend(q, k, v)

    with monkeypatch.context() as broken:
        broken.setattr(static_step, "attend_masked", unmasked)
        assert cache().ok  # a CPU's steps are others
    as_on_a_card()
    monkeypatch.setattr(igpt_checks, "is_static", sampling.is_static)
    assert cache().ok
    monkeypatch.setattr(static_step, "attend_masked", unmasked)
    assert not cache().ok


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_of_static_steps_equal_those_of_plain_ones(bf16, as_on_a_card):
    """The numbers that pixels are drawn by are pixels here, and drawing takes them as they are."""
    model, x, found = random_model(AR), tokens(AR), []

    def choose(logits, number):
        found.append(logits)
        return number.long()

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        decoder = Decoder(model, len(x))
        plain = [decoder.prefill(x[:, :5]), *(decoder.step(x[:, t - 1], t) for t in range(6, AR.n_ctx))]
        as_on_a_card()
        again = StaticSteps(Decoder(model, len(x)), 5, choose, lambda steps: steps)
        assert torch.equal(again.draw(x[:, :5], x[:, 5:].float(), lambda n: None), x)
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, plain, strict=True))
    assert worst < (0.05 if bf16 else 1e-5) * max(float(logits.float().abs().max()) for logits in plain)


def test_steps_run_once_on_a_stream_of_their_own_before_they_are_recorded(monkeypatch):
    card = Card(monkeypatch)
    a, b = cuda.recorded(CUDA, [lambda: card.log.append("a"), lambda: card.log.append("b")])
    made = ["begin", "a", "end", "begin", "b", "end"]
    around = ["side waits for main", "on side", "a", "b", *made, "off side", "main waits for side"]
    assert card.log == around
    a(), b(), a()
    assert card.log == [*around, *["replay"] * 3]


def test_where_nothing_can_be_recorded_steps_go_on_as_they_are(as_on_a_card, monkeypatch, capsys):
    model = random_model(AR)
    plain = drawn(model, 4)
    as_on_a_card()
    Card(monkeypatch, refuses=RuntimeError("operation not permitted\nwhile capturing"))
    monkeypatch.setattr(progress, "_enabled", True)
    assert torch.equal(drawn(model, 4, record=partial(cuda.recorded, CUDA)), plain)
    assert capsys.readouterr().err == "no CUDA graph could be made, going on without (operation not permitted)\n"
    Card(monkeypatch, refuses=torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        drawn(model, 4, record=partial(cuda.recorded, CUDA))


def test_progress_is_told_of_what_is_done_while_more_waits(monkeypatch):
    monkeypatch.setattr(cuda, "AHEAD", 2)
    card = Card(monkeypatch)
    told = cuda.once_done(CUDA, lambda n: card.log.append(n))
    for n in (10, 20, 30, 40):
        told(n)
    assert card.log == ["step 0", "step 1", "step 2", "done 0", 10, "step 3", "done 1", 20]


def test_the_stage_records_its_steps_and_tells_of_all_tokens(as_on_a_card, monkeypatch):
    """Pictures do not depend on their batch, nor on how they are drawn."""
    net, where, card = random_model(AR), Machine(torch.device("cpu"), "fp32"), Card(monkeypatch)
    starts = tokens(AR)[:1, :4].repeat(5, 1).numpy().astype(np.uint16)
    settings, reached = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, []
    plain = drawing.draw_pictures(where, net, starts, 7, 5, settings, 1)
    as_on_a_card()
    monkeypatch.setattr(drawing, "recorded", lambda device, steps: cuda.recorded(CUDA, steps))
    monkeypatch.setattr(drawing, "once_done", lambda device, advance: cuda.once_done(CUDA, advance))
    monkeypatch.setattr(progress.Bar, "show", lambda self: reached.append(self.done))
    assert np.array_equal(drawing.draw_pictures(where, net, starts, 7, 3, settings, 5), plain)
    assert card.log.count("replay") == 2 * (AR.n_ctx - 5)
    assert reached[-1] == 5 * (AR.n_ctx - 4)


def test_only_a_cpu_takes_other_steps():
    assert not sampling.is_static(random_model(AR))
    assert sampling.is_static(random_model(AR).to("meta"))
    assert sampling.way_of_steps(random_model(AR).to("meta")) == "static"
