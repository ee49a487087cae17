"""AIM's published backbones and attentive probe heads, state dicts of its first version, as weights of ours.

Their patch embedding is a convolution [D, 3, p, p], ours a matrix over rows, columns, channels; all else is laid out
alike. The files hold neither prediction head nor fixed positions, and do not tell the picture's size, the number of
attention heads or the blocks that a probe head reads.
Shapes: D width, L blocks, p side of a patch, C classes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixseq.errors import PixseqError, UsageError
from pixseq.interop.files import Tensors, load_tensors
from pixseq.interop.foreign import NOT_OURS, Foreign, as_weight, type_name
from pixseq.interop.places import check_file
from pixseq.interop.rules import NEW_AXIS, Layout, Rule, Words, check_tensors, refuse_bias, take
from pixseq.text import few

PATCHES = "preprocessor.patchifier.proj.weight"
BLOCK = re.compile(r"trunk\.blocks\.(0|[1-9]\d{0,3})\.")
HEAD = "head."  # before the names of a probe, always where one file holds both
POSITIONS = re.compile(r"preprocessor\.pos_embed(\..+)?")
COUNTER = "bn.num_batches_tracked"
HEAD_WIDTH = 128  # of an attention head, at every published size
LAST = 6  # blocks that a published head reads; the best ones, from the first of them on, by (L, D):
BEST = {(24, 1536): 14, (24, 2048): 12, (24, 3072): 12, (32, 4096): 14}
NAME_ONE = "name a backbone of AIM's first version, as aim_600m_2bimgs_attnprobe_backbone.pth"


PATCH_ROWS = Layout(lambda x: x.permute(0, 2, 3, 1).flatten(1))  # [D, 3, p, p] -> [D, p p 3]
FIRST = Layout(lambda x: x[0])
WORDS = Words(
    missing=("{file} lacks {names}", "it is not whole, or of another model: get it again"),
    unknown=("{file} has tensors that AIM has not: {names}", NOT_OURS),
)


def read_aim(
    backbone: str | Path,
    head: str | Path | None = None,
    probe_layers: str | None = None,
    n_heads: int | None = None,
    size: int = 224,
) -> Foreign:
    """The backbone, with the attentive probe of `head` or of the backbone's own file as its class head.

    `probe_layers`: the blocks whose mean the head reads, see `probed_blocks`. `n_heads`: attention heads of blocks and
    probe, else D / 128. `size`: side of the picture. Raises UsageError where these do not fit the files, PixseqError
    for damaged files and for tensors that are missing, unknown, of another shape, non-finite or of another model.
    """
    backbone = Path(backbone)
    found = _load(backbone)
    probe = {name: x for name, x in found.items() if name.startswith(HEAD)}
    trunk = {name: x for name, x in found.items() if name not in probe}
    files = [backbone]
    if head is not None:
        if probe:
            raise UsageError(f"{backbone} holds a head already, and --head is {head}", "give one of them")
        files.append(Path(head))
        probe = _load(files[-1])
    if probe_layers is not None and not probe:
        raise UsageError(f"--probe-layers is {probe_layers}, and there is no head to read them", "give it as --head")
    shape = _measure(backbone, trunk, n_heads, size)
    notes = [
        "there is no prediction head, as none was published: the model gives features and probes, not a pretraining "
        "loss"
    ]
    types = sorted({type_name(x.dtype) for x in [*trunk.values(), *probe.values()] if x.is_floating_point()})
    if types != ["float32"]:
        notes.append(f"weights of type {', '.join(types)} became float32")
    positions = {name: x for name, x in trunk.items() if POSITIONS.fullmatch(name)}
    if positions:
        trunk = {name: x for name, x in trunk.items() if name not in positions}
        notes.append(f"left out {few(sorted(positions))}: positions are computed")
    weights = _take(backbone, trunk, rules(shape))
    if probe:
        blocks = probed_blocks(probe_layers or "last", shape["n_layer"], shape["d_model"])
        notes.append(f"the head reads the mean of blocks {', '.join(map(str, blocks))} of 0 to {shape['n_layer'] - 1}")
        weights |= _probe(files[-1], probe, shape)
        shape |= {"n_classes": weights["classifier.linear"].shape[1], "probe_heads": shape["n_head"]}
        shape |= {"probe_layers": tuple(block + 1 for block in blocks)}  # our layer 0 is the embedding
    config = {"probe_layers": (probe_layers or "last") if probe else None, "size": size}
    return Foreign(shape, weights, files, notes, config=config, positions=positions)


def probed_blocks(text: str, n_layer: int, width: int) -> list[int]:
    """ "last", "best" or a list as "12,13,14" -> blocks, the first of them 0.

    last: the last six; best: the six that published heads of the best layers read, known of the published models alone.
    Raises UsageError.
    """
    if text == "last":
        return list(range(max(n_layer - LAST, 0), n_layer))
    if text == "best":
        if (n_layer, width) not in BEST:
            raise UsageError(
                f"--probe-layers best is known of the published models, not of {n_layer} blocks of width {width}",
                "give the blocks, as 12,13,14",
            )
        first = BEST[n_layer, width]
        return list(range(first, first + LAST))
    try:
        blocks = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--probe-layers is {text!r}", "last, best, or blocks as 12,13,14") from None
    if len(set(blocks)) < len(blocks) or not all(0 <= block < n_layer for block in blocks):
        raise UsageError(
            f"--probe-layers {text} asks for a block twice or outside 0..{n_layer - 1}", "the first block is 0"
        )
    return sorted(blocks)


def rules(shape: dict[str, Any]) -> dict[str, Rule]:
    """Every tensor of our trunk, by name."""
    d, p = shape["d_model"], shape["patch_size"]
    patches = "preprocessor.patchifier"

    def norm(ours: str, theirs: str) -> dict[str, Rule]:
        return {f"{ours}.{part}": Rule((f"{theirs}.{part}",), (d,)) for part in ("weight", "bias")}

    found = {"patch_embed.weight": Rule((PATCHES,), (d, 3, p, p), PATCH_ROWS)}
    found["patch_embed.bias"] = Rule((f"{patches}.proj.bias",), (d,))
    found |= norm("patch_norm", f"{patches}.norm")
    for i in range(shape["n_layer"]):
        ours, theirs = f"blocks.{i}", f"trunk.blocks.{i}"
        found |= norm(f"{ours}.ln_1", f"{theirs}.norm_1") | norm(f"{ours}.ln_2", f"{theirs}.norm_2")
        found[f"{ours}.attn.qkv.weight"] = Rule((f"{theirs}.attn.qkv.weight",), (3 * d, d))
        found[f"{ours}.attn.proj.weight"] = Rule((f"{theirs}.attn.proj.weight",), (d, d))
        found[f"{ours}.mlp.fc.weight"] = Rule((f"{theirs}.mlp.fc1.weight",), (4 * d, d))
        found[f"{ours}.mlp.proj.weight"] = Rule((f"{theirs}.mlp.fc2.weight",), (d, 4 * d))
    return found | norm("ln_f", "trunk.post_trunk_norm")


def probe_rules(d: int, n_classes: int) -> dict[str, Rule]:
    """Every tensor of our class head, by name; ours have room for several probes side by side, of which this is one."""
    return {
        "classifier.query": Rule(("cls_token",), (1, 1, d), FIRST),
        "classifier.k": Rule(("k.weight",), (d, d), NEW_AXIS),
        "classifier.v": Rule(("v.weight",), (d, d), NEW_AXIS),
        "classifier.linear": Rule(("linear.weight",), (n_classes, d), NEW_AXIS),
        "classifier.mean": Rule(("bn.running_mean",), (d,)),
        "classifier.var": Rule(("bn.running_var",), (d,)),
    }


def _load(path: Path) -> Tensors:
    check_file(path)
    return load_tensors(path)


def _measure(path: Path, trunk: Tensors, n_heads: int | None, size: int) -> dict[str, Any]:
    """The fields of models.aim.AimShape without a class head, from names, shapes and options."""
    _refuse_others(path, trunk)
    embed = tuple(trunk[PATCHES].shape)
    if len(embed) != 4 or embed[1] != 3 or embed[2] != embed[3] or 0 in embed:
        raise PixseqError(f"{PATCHES} in {path} has shape {list(embed)}, not [width, 3, side, side]", NAME_ONE)
    d, patch = embed[0], embed[2]
    if d % 4:
        raise PixseqError(
            f"{PATCHES} in {path} has a width of {d}, no multiple of 4, which its positions need", NOT_OURS
        )
    if n_heads is None and d % HEAD_WIDTH:
        raise UsageError(
            f"{path} has a width of {d}, no multiple of {HEAD_WIDTH}, the width of a published model's attention head",
            "the file does not tell how many heads there are: give --heads",
        )
    n_heads = d // HEAD_WIDTH if n_heads is None else n_heads
    if n_heads < 1 or d % n_heads:
        raise UsageError(f"--heads {n_heads} does not divide the width of {path}, {d}", f"{d} / {HEAD_WIDTH} is usual")
    if size < 2 * patch or size % patch:
        raise UsageError(
            f"--size {size} cannot be cut into the patches of {path}, {patch}x{patch}", "give a multiple of their side"
        )
    return {
        "family": "aim",
        "n_layer": 1 + max((int(found[1]) for name in trunk if (found := BLOCK.match(name))), default=0),
        "n_head": n_heads,
        "d_model": d,
        "patch_size": patch,
        "height": size,
        "width": size,
        "head": False,
        "attention": "prefix",
        "adapted": "bidirectional",
    }


def _refuse_others(path: Path, trunk: Tensors) -> None:
    """Files of other models, and heads in the place of a backbone, told by their names."""
    second = next((name for name in trunk if ".mlp.fc3." in name or "rms_norm" in name), None)
    if second is None and "trunk.blocks.0.norm_1.weight" in trunk and not any(".norm_1.bias" in n for n in trunk):
        second = "trunk.blocks.0.norm_1.weight without a bias"
    if second is not None:
        why = "RMSNorm" if "norm" in second else "SwiGLU"
        raise PixseqError(f"{path} is AIMv2, another model: it has {second} ({why})", NAME_ONE)
    if PATCHES not in trunk:
        first = few(list(trunk)) or "none but of a head"
        raise PixseqError(f"{path} is no AIM backbone: it lacks {PATCHES}; its first tensors are {first}", NAME_ONE)


def _probe(path: Path, found: Tensors, shape: dict[str, Any]) -> Tensors:
    """The class head by our names."""
    d, prefix = shape["d_model"], HEAD if any(name.startswith(HEAD) for name in found) else ""
    found = {name: x for name, x in found.items() if name != prefix + COUNTER}
    keys, linear = found.get(f"{prefix}k.weight"), found.get(f"{prefix}linear.weight")
    if keys is not None and keys.ndim == 2 and keys.shape[1] != d:
        raise PixseqError(
            f"{prefix}k.weight in {path} is of a head of width {keys.shape[1]}, the backbone's is {d}",
            "take the head that was published with this backbone",
        )
    n_classes = len(linear) if linear is not None and linear.ndim == 2 else 0
    if linear is not None and not n_classes:
        raise PixseqError(f"{prefix}linear.weight in {path} has shape {list(linear.shape)}: no classes", NOT_OURS)
    wanted = probe_rules(d, n_classes)
    wanted = {ours: replace(rule, theirs=tuple(prefix + name for name in rule.theirs)) for ours, rule in wanted.items()}
    weights = _take(path, found, wanted)
    if (weights["classifier.var"] < 0).any():
        raise PixseqError(f"{prefix}bn.running_var in {path} holds negative values", "download it again")
    return weights


def _take(path: Path, found: Tensors, wanted: dict[str, Rule]) -> Tensors:
    """`found` by our names; biases that AIM has not are left out where they are zero."""
    theirs = {name for rule in wanted.values() for name in rule.theirs}
    biases = {name for name in found if name not in theirs and name.removesuffix("bias") + "weight" in theirs}
    shapes = {name: x.shape for name, x in found.items()}
    check_tensors(path, shapes, wanted, {name: shapes[name] for name in biases}, WORDS)
    for name in sorted(biases):
        refuse_bias(path, name, found[name], "AIM")
    return take(lambda name: as_weight(path, name, found[name]), wanted)
