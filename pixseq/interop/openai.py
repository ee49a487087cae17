"""OpenAI's Image GPT checkpoints (TensorFlow, V2 format) as weights of ours.

Shapes: E width, H heads, K head width (E / H), V colours, C context. Theirs multiply from the left (x @ w, [in, out]),
and their attention keeps heads apart; ours are nn.Linear's [out, in] with the heads in rows (queries, keys, values) or
columns (output).
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.errors import PixseqError
from pixseq.interop.bundle import Bundle, open_bundle
from pixseq.interop.foreign import NOT_OURS, Foreign, as_weight
from pixseq.interop.rules import ONE_MODEL, TRANSPOSED, Layout, Rule, Words, check_tensors, take

OPTIMIZER = re.compile(r"adam_[mv]|Adam(WeightDecayOptimizer)?(_\d+)?|beta[12]_power(_\d+)?|global_step|_step")
LAYER = re.compile(r"model/h(0|[1-9]\d{0,5})/")
CLASSIFIER = "model/clf/wclf"
PALETTE = "kmeans_centers.npy"
NAME_ONE = "name an Image GPT checkpoint, as igpt-s' model.ckpt-1000000"


ROWS_BY_HEAD = Layout(lambda x: x.flatten(0, 1))  # [H, K, in] -> [H K, in]: already outputs by inputs
COLUMNS_BY_HEAD = Layout(lambda x: x.flatten(0, 1).T)  # [H, K, out] -> [out, H K]
WORDS = Words(
    missing=("{file} is no whole Image GPT: it lacks {names}", NAME_ONE),
    unknown=("{file} holds what is no part of an Image GPT: {names}", NOT_OURS),
    shape=("{name} in {file}.index has shape {found}, and {wanted} fits the other tensors", ONE_MODEL),
)


def read_openai(path: str | Path) -> Foreign:
    """Read the checkpoint that `path` names: its prefix, one of its files, or its folder.

    Raises PixseqError for what is no Image GPT, for a variable that is missing, unknown, of a wrong shape or holds
    non-finite values, for a context that is no square, and for what bundle.open_bundle and Bundle.read refuse.
    """
    bundle = open_bundle(path)
    names = [name for name in bundle.entries if not any(OPTIMIZER.fullmatch(part) for part in name.split("/"))]
    refuse_others(bundle, names)
    shape = measure(bundle, names)
    wanted = rules(shape)
    check_tensors(bundle.prefix, {name: bundle.entries[name].shape for name in names}, wanted, {}, WORDS)
    weights = take(partial(read, bundle), wanted)
    notes = []
    skipped = len(bundle.entries) - len(names)
    if skipped:
        notes.append(f"skipped {skipped} optimizer variable{'s' if skipped > 1 else ''}")
    if shape["n_classes"] and not weights["classifier.weight"].any():
        notes.append(f"skipped {CLASSIFIER}: all zeros, as the head of a model that was never trained to classify")
        del weights["classifier.weight"]
        shape["n_classes"] = 0
    return Foreign(
        shape=shape,
        weights=weights,
        files=[bundle.index],  # it holds a checksum of every tensor, and the shards may take gigabytes to hash
        notes=notes,
        palette=find_palette(bundle.prefix.parent),
        config={"checkpoint": bundle.prefix.name, "global_step": global_step(bundle)},
    )


def refuse_others(bundle: Bundle, names: list[str]) -> None:
    """Checkpoints of other models, told by their names."""
    alien = next((n for n in names if re.search(r"/attn/c_attn/|/ln_(1|2|f)/b$", n)), None)
    if alien:
        raise PixseqError(
            f"{bundle.prefix} is no Image GPT: it looks like GPT-2, for it has {alien}",
            NAME_ONE,
        )
    if not any(name.startswith("model/") for name in names):
        first = ", ".join(names[:3]) or "none but an optimizer's"
        raise PixseqError(
            f"{bundle.prefix} is no Image GPT: no variable of it begins with model/; its first are {first}",
            NAME_ONE,
        )


def measure(bundle: Bundle, names: list[str]) -> dict[str, Any]:
    """The fields of models.igpt.IgptShape, from the names and shapes of the variables."""
    (context, width), (colours, _) = dims(bundle, "model/wpe", 2), dims(bundle, "model/wte", 2)
    heads, size, _ = query = dims(bundle, "model/h0/attn/q_proj", 3)
    if heads * size != width:
        raise PixseqError(
            f"model/h0/attn/q_proj in {bundle.index} has shape {list(query)}: its heads do not make up the width "
            f"{width} of model/wpe",
            NOT_OURS,
        )
    if math.isqrt(context) ** 2 != context:
        raise PixseqError(
            f"model/wpe in {bundle.index} has {context} positions, which make no square image",
            "pixseq's pictures are square: 1024 positions are 32x32",
        )
    return {
        "n_layer": len({found[1] for name in names if (found := LAYER.match(name))}),
        "n_head": heads,
        "d_model": width,
        "n_vocab": colours,
        "n_ctx": context,
        "objective": "ar" if "model/sos" in bundle.entries else "bert",
        "n_classes": dims(bundle, CLASSIFIER, 2)[0] if CLASSIFIER in bundle.entries else 0,
    }


def dims(bundle: Bundle, name: str, rank: int) -> tuple[int, ...]:
    """The shape of one variable, all of it positive. Raises PixseqError if it is missing or of another rank."""
    if name not in bundle.entries:
        raise PixseqError(f"{bundle.prefix} is no whole Image GPT: it lacks {name}", NAME_ONE)
    found = bundle.entries[name].shape
    if len(found) != rank or 0 in found:
        raise PixseqError(f"{name} in {bundle.index} has shape {list(found)}, not {rank} positive numbers", NAME_ONE)
    return found


def rules(shape: dict[str, Any]) -> dict[str, Rule]:
    """Every tensor of ours in its order, by name."""
    d, h = shape["d_model"], shape["n_head"]
    by_head = (h, d // h, d)
    found = {"wte": Rule(("model/wte",), (shape["n_vocab"], d))}
    found["wpe"] = Rule(("model/wpe",), (shape["n_ctx"], d))
    if shape["objective"] == "ar":
        found["sos"] = Rule(("model/sos",), (d,))
    for layer in range(shape["n_layer"]):
        ours, theirs = f"blocks.{layer}", f"model/h{layer}"
        qkv = tuple(f"{theirs}/attn/{part}_proj" for part in "qkv")
        found[f"{ours}.ln_1.weight"] = Rule((f"{theirs}/ln_1/g",), (d,))
        found[f"{ours}.attn.qkv.weight"] = Rule(qkv, by_head, ROWS_BY_HEAD)
        found[f"{ours}.attn.proj.weight"] = Rule((f"{theirs}/attn/c_proj",), by_head, COLUMNS_BY_HEAD)
        found[f"{ours}.ln_2.weight"] = Rule((f"{theirs}/ln_2/g",), (d,))
        found[f"{ours}.mlp.fc.weight"] = Rule((f"{theirs}/mlp/c_fc/w",), (d, 4 * d), TRANSPOSED)
        found[f"{ours}.mlp.proj.weight"] = Rule((f"{theirs}/mlp/c_proj/w",), (4 * d, d), TRANSPOSED)
    found["ln_f.weight"] = Rule(("model/ln_f/g",), (d,))
    found["head.weight"] = Rule(("model/wtet",), (shape["n_vocab"], d))
    if shape["n_classes"]:
        found["classifier.weight"] = Rule((CLASSIFIER,), (shape["n_classes"], d))
    return found


def read(bundle: Bundle, name: str) -> Tensor:
    return as_weight(bundle.shard(bundle.entries[name].shard), name, torch.from_numpy(bundle.read(name)))


def global_step(bundle: Bundle) -> int | None:
    """How long the model was trained, where the checkpoint counts it."""
    entry = bundle.entries.get("global_step")
    if entry is None or entry.shape:
        return None
    value = bundle.read("global_step")
    return int(value) if value.dtype.kind in "iu" else None


def find_palette(folder: Path) -> Path | None:
    """The colours, where OpenAI's download.py leaves them: beside the weights."""
    return folder / PALETTE if (folder / PALETTE).is_file() else None
