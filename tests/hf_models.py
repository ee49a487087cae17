"""ImageGPT directories with random weights, written by transformers itself."""

import contextlib
import io
import json

import numpy as np
import torch
from transformers import ImageGPTConfig
from transformers.utils import logging

logging.disable_progress_bar()


def make_hf(folder, kind, n_layer=3, width=60, heads=5, side=7, n_vocab=512, classes=4, palette=True, **config):
    """Random weights of class `kind`, biases zero; returns the model."""
    torch.manual_seed(0)
    model = kind(
        ImageGPTConfig(
            vocab_size=n_vocab + 1,
            n_positions=side * side,
            n_embd=width,
            n_layer=n_layer,
            n_head=heads,
            num_labels=classes,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **config,
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            else:
                p.add_(0.1 * torch.randn_like(p))
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    if palette:
        clusters = np.random.default_rng(0).uniform(-1, 1, (n_vocab, 3)).astype(np.float32)
        content = {"clusters": clusters.tolist(), "size": {"height": side, "width": side}}
        content["image_processor_type"] = "ImageGPTImageProcessor"
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return model


def edit_config(folder, **changes):
    """Change config.json as it stands on disk."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
