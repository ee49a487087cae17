"""OpenAI's Image GPT graph in numpy float64, on variables by its names and in its shapes: an oracle for the tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def variables(
    seed: int = 0,
    layers: int = 2,
    heads: int = 5,
    size: int = 6,
    colours: int = 11,
    context: int = 16,
    bert: bool = False,
    classes: int = 0,
) -> dict[str, np.ndarray]:
    """Random float32 variables of a model of width heads * size, large enough that every one of them matters."""
    rng = np.random.default_rng(seed)
    width = heads * size
    shapes = {"model/wpe": (context, width), "model/wte": (colours, width), "model/wtet": (colours, width)}
    if not bert:
        shapes["model/sos"] = (width,)
    for i in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "c_proj"):
            shapes[f"model/h{i}/attn/{part}"] = (heads, size, width)
        shapes[f"model/h{i}/mlp/c_fc/w"] = (width, 4 * width)
        shapes[f"model/h{i}/mlp/c_proj/w"] = (4 * width, width)
    if classes:
        shapes["model/clf/wclf"] = (classes, width)
    w = {name: rng.normal(0, width**-0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    gains = ["model/ln_f/g", *(f"model/h{i}/ln_{j}/g" for i in range(layers) for j in (1, 2))]
    w.update({name: rng.uniform(0.5, 1.5, width).astype(np.float32) for name in gains})
    return w


def norm(x, g):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * g


def gelu2(x):
    return x / (1 + np.exp(-1.702 * x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(w, scope, x, bert):
    """x [B, T, E]; the projections are [H, E / H, E]: head, place in the head, and the model's width."""
    q = np.einsum("bte,hke->bhtk", x, w[f"{scope}/q_proj"])
    k = np.einsum("bte,hke->bhtk", x, w[f"{scope}/k_proj"])
    v = np.einsum("bte,hke->bhtk", x, w[f"{scope}/v_proj"])
    scores = np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1])
    if not bert:
        past = np.tril(np.ones((x.shape[1], x.shape[1])))
        scores = scores * past - 1e10 * (1 - past)
    mixed = np.einsum("bhts,bhsk->bhtk", softmax(scores), v)
    return np.einsum("bhtk,hke->bte", mixed, w[f"{scope}/c_proj"])


def run(
    variables: Mapping[str, np.ndarray], tokens: np.ndarray, keep: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """tokens [B, T], keep [B, T] (bert: 0 hides the content) -> logits [B, T, V], class logits [B, classes] or None."""
    w = {name: array.astype(np.float64) for name, array in variables.items()}
    bert = "model/sos" not in w
    h = w["model/wte"][tokens]
    if bert:
        h = h * keep[:, :, None]
    else:
        first = np.tile(w["model/sos"], (len(tokens), 1, 1))
        h = np.concatenate([first, h[:, :-1]], axis=1)
    h = h + w["model/wpe"]
    layer = 0
    while f"model/h{layer}/ln_1/g" in w:
        scope = f"model/h{layer}"
        h = h + attention(w, f"{scope}/attn", norm(h, w[f"{scope}/ln_1/g"]), bert)
        inner = gelu2(norm(h, w[f"{scope}/ln_2/g"]) @ w[f"{scope}/mlp/c_fc/w"])
        h = h + inner @ w[f"{scope}/mlp/c_proj/w"]
        layer += 1
    h = norm(h, w["model/ln_f/g"])
    classes = h.mean(axis=1) @ w["model/clf/wclf"].T if "model/clf/wclf" in w else None
    return h @ w["model/wtet"].T, classes
