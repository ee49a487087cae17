"""Other programs that do what the stages do: which are here, and how models of theirs step, read and draw."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq import progress
from pixseq.bench import drawn
from pixseq.bench.settings import Bench, Settings
from pixseq.errors import PixseqError, UsageError
from pixseq.runtime import Machine, compiled

# The module of each.
PACKAGES = {"scikit-learn": "sklearn", "pillow": "PIL", "transformers": "transformers", "faiss": "faiss"}
PIP = dict(zip(PACKAGES, PACKAGES)) | {"faiss": "faiss-cpu"}
OF_STAGES = {
    "palette": ("scikit-learn", "faiss"),
    "encode": ("scikit-learn", "faiss"),
    "read": ("pillow",),
    "pretrain": ("transformers", "nanogpt"),
    "features": ("transformers",),
    "probe": ("scikit-learn",),
    "sample": ("transformers",),
}

Prepare = Callable[[Machine], Callable[[], None]]


def chosen(names: Sequence[str], stages: Sequence[str], settings: Settings) -> tuple[str, ...]:
    """Those to time beside ours: the named ones, or without names all that are here; "none" is none.

    Raises UsageError for one that has no such stage, PixseqError for one that is not installed.
    """
    nanogpt = settings.nanogpt
    if "none" in names:
        if len(set(names)) > 1 or nanogpt:
            raise UsageError("--peer none goes with no other peer", "leave it out")
        return ()
    able = {name for stage in stages for name in OF_STAGES[stage]}
    if not settings.shape().can_sample:
        able -= {"transformers", "nanogpt"}  # which have autoregressive models of tokens alone
    for name in names:
        if name not in (*PACKAGES, "nanogpt"):
            raise UsageError(f"{name} is no peer", f"choose among {', '.join((*PACKAGES, 'nanogpt'))}, or none")
        if name not in able:
            raise UsageError(
                f"{name} does nothing of {', '.join(stages)}", f"peers of those: {', '.join(sorted(able)) or 'none'}"
            )
        if name == "nanogpt" and nanogpt is None:
            raise UsageError("--peer nanogpt needs --nanogpt DIR, a checkout", f"git clone {NANOGPT}")
        if name in PACKAGES and not _is_here(name):
            raise PixseqError(f"{name} is not installed here", f"pip install {PIP[name]}")
    if nanogpt is not None:
        _model_file(nanogpt)
    if not names:
        for name in sorted(able & PACKAGES.keys()):
            if not _is_here(name):
                progress.note(f"{name} is not installed here, so it is left out: pip install {PIP[name]}")
    found = [name for name in PACKAGES if name in (names or able) and _is_here(name)]
    return (*found, *(["nanogpt"] if nanogpt is not None else []))


NANOGPT = "https://github.com/karpathy/nanoGPT"


def _is_here(name: str) -> bool:
    return importlib.util.find_spec(PACKAGES[name]) is not None


# ---- transformers' Image GPT: it takes sos as one colour more


def transformers_step(bench: Bench) -> Prepare:
    """AdamW and the loss of all positions, as of ours."""

    def prepare(where: Machine) -> Callable[[], None]:
        model = _image_gpt(bench, where).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        targets, inputs = _batch(bench, where), _shifted(bench, where)
        forward = compiled(lambda: model(input_ids=inputs, use_cache=False).logits, where, None)
        return _step(where, lambda: F.cross_entropy(forward().flatten(0, 1), targets.flatten()), optimizer)

    return prepare


def transformers_features(bench: Bench) -> Prepare:
    def prepare(where: Machine) -> Callable[[], None]:
        model, inputs = _image_gpt(bench, where).transformer.eval(), _shifted(bench, where)

        @torch.inference_mode()
        def call() -> None:
            with where.autocast():
                found = model(input_ids=inputs, output_hidden_states=True, use_cache=False).hidden_states
                torch.stack([states.float().mean(1) for states in found]).cpu().numpy()

        return call

    return prepare


def transformers_sample(bench: Bench) -> Prepare:
    """With its cache, from all colours (it would keep the 50 likeliest)."""

    def prepare(where: Machine) -> Callable[[], None]:
        model, starts = _image_gpt(bench, where).eval(), _shifted(bench, where)[:, :1]

        @torch.inference_mode()
        def call() -> None:
            with where.autocast():
                model.generate(starts, max_new_tokens=bench.settings.size**2, do_sample=True, top_k=0)

        return call

    return prepare


def _image_gpt(bench: Bench, where: Machine) -> Any:
    """Of our sizes, with one colour more."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, logging

    logging.set_verbosity_error()
    shape = bench.settings.shape()
    config = ImageGPTConfig(
        vocab_size=bench.settings.colors + 1,
        n_positions=shape.n_ctx,
        n_embd=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model: Any = ImageGPTForCausalImageModeling(config)
    return model.to(where.device)


# ---- nanoGPT, whose model.py is loaded from the user's checkout


def nanogpt_step(bench: Bench) -> Prepare:
    def prepare(where: Machine) -> Callable[[], None]:
        model, theirs = nanogpt_model(bench), bench.settings
        model.to(where.device).train()
        with contextlib.redirect_stdout(io.StringIO()):  # it talks on what holds our one document
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), where.device.type)
        targets = _batch(bench, where)
        inputs = F.pad(targets[:, :-1], (1, 0), value=theirs.colors - 1)  # it has no sos
        forward = compiled(lambda: model(inputs, targets)[1], where, None)
        return _step(where, forward, optimizer)

    return prepare


def nanogpt_model(bench: Bench) -> Any:
    """Of our sizes, without biases."""
    shape = bench.settings.shape()
    module = _loaded(_model_file(bench.settings.nanogpt or ""))
    config = module.GPTConfig(
        block_size=shape.n_ctx,
        vocab_size=bench.settings.colors,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.d_model,
        dropout=0.0,
        bias=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(config)


def _model_file(checkout: str) -> Path:
    path = Path(checkout) / "model.py"
    if not path.is_file():
        raise PixseqError(f"--nanogpt {checkout} holds no model.py", f"git clone {NANOGPT}")
    return path


def _loaded(path: Path) -> ModuleType:
    """The user named the file: it runs. Raises PixseqError where it has no such model."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        module.GPT, module.GPTConfig  # noqa: B018
    except Exception as error:
        raise PixseqError(f"{path} is no model.py of nanoGPT: {error}", f"git clone {NANOGPT}") from None
    return module


# ---- what they share


def _batch(bench: Bench, where: Machine) -> Tensor:
    """int64 [B, T]."""
    s = bench.settings
    tokens = drawn.tokens(s.batch_size, s.shape().n_ctx, s.colors, s.seed).astype("int64")
    return torch.from_numpy(tokens).to(where.device)


def _shifted(bench: Bench, where: Machine) -> Tensor:
    """The same behind an sos, without the last."""
    return F.pad(_batch(bench, where)[:, :-1], (1, 0), value=bench.settings.colors)


def _step(where: Machine, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        with where.autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as a log has it

    return step
