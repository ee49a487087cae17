"""Slow, obvious twins of what the package does fast: oracles for the tests."""

from __future__ import annotations

import numpy as np


def igpt_forward(
    weights: dict[str, np.ndarray], n_layer: int, n_head: int, tokens: np.ndarray, keep: np.ndarray | None
):
    """Image GPT for one image in float64, position by position where order matters.

    tokens [T]; keep None: autoregressive; keep bool [T]: bert, False where the content is hidden.
    Returns logits [T, V] and the pooled features [L + 1, D].
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    T, D = len(tokens), w["wte"].shape[1]
    h = np.zeros((T, D))
    for t in range(T):
        if keep is None:
            content = w["sos"] if t == 0 else w["wte"][tokens[t - 1]]
        else:
            content = w["wte"][tokens[t]] * keep[t]
        h[t] = content + w["wpe"][t]
    features = []
    for layer in range(n_layer):
        name = f"blocks.{layer}."
        n = rms(h, w[name + "ln_1.weight"])
        features.append(n.mean(0))
        q, k, v = np.split(n @ w[name + "attn.qkv.weight"].T, 3, axis=1)
        mixed = np.zeros((T, D))
        size = D // n_head
        for head in range(n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(T):
                seen = t + 1 if keep is None else T
                scores = k[:seen, part] @ q[t, part] / np.sqrt(size)
                p = np.exp(scores - scores.max())
                mixed[t, part] = (p / p.sum()) @ v[:seen, part]
        h = h + mixed @ w[name + "attn.proj.weight"].T
        n = rms(h, w[name + "ln_2.weight"])
        a = n @ w[name + "mlp.fc.weight"].T
        h = h + (a / (1 + np.exp(-1.702 * a))) @ w[name + "mlp.proj.weight"].T
    n = rms(h, w["ln_f.weight"])
    return n @ w["head.weight"].T, np.stack([*features, n.mean(0)])


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain
