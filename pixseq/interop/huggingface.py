"""ImageGPT directories of Hugging Face's transformers, in and out.

Their tensors differ from ours in three ways: matrix products are Conv1D, [in, out], where ours are [out, in]; each has
a bias, which Image GPT has not; wte has one row more, the start of the sequence (sos).
Shapes: E width, L layers, V colours, C positions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq.bounded.structure import read_object
from pixseq.errors import PixseqError
from pixseq.interop.files import Tensors, load_tensors
from pixseq.interop.foreign import NOT_OURS, Foreign, as_weight, type_name
from pixseq.interop.places import check_folder
from pixseq.interop.rules import (
    ALL_BUT_LAST_ROW,
    LAST_ROW,
    TRANSPOSED,
    Rule,
    Words,
    check_tensors,
    give,
    refuse_bias,
    take,
)
from pixseq.text import few

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]

CAUSAL, CLASSIFIER, BARE = "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification", "ImageGPTModel"
MASK = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")  # causal masks that old versions stored; c_attn.bias is none
NOTE = "pixseq"  # our key in config.json: what theirs cannot say
WORDS = Words(
    missing=("{file} lacks the tensor {names}", "the weights are not those of its config.json"),
    unknown=("{file} has tensors that Image GPT has not: {names}", NOT_OURS),
    shape=(
        "{file}: {name} is {found}, its config.json promises {wanted}",
        "the weights and config.json are of different models",
    ),
)
MAX_JSON_BYTES = 1 << 24  # an index of ten thousand tensors takes one

# What their configuration may say without changing what is computed here, and what absent keys mean.
ONLY = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": False,
}
SIZES = {"n_layer": 24, "n_head": 8, "n_embd": 512, "n_positions": 1024, "vocab_size": 513}
SIZE_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
}


def read_hf(folder: str | Path) -> Foreign:
    """An ImageGPT directory, as save_pretrained or the hub lays it out.

    The generative model, the classifier (whose `score` becomes our classifier) and the bare model are read, from
    safetensors or pytorch_model.bin, whole or in shards. Raises PixseqError for anything that is not one, is damaged,
    or is a model that ours cannot express.
    """
    folder = Path(folder)
    check_folder(folder)
    config = _read_json(folder / "config.json")
    sizes = _sizes(folder, config)
    tensors, files = read_tensors(folder)
    notes = []
    masks = [name for name, x in tensors.items() if MASK.search(name) and x.ndim in (0, 4)]
    if masks:
        notes.append(f"left out {len(masks)} attention masks, which old versions stored beside the weights")
    found = {name: x for name, x in tensors.items() if name not in masks}
    types = sorted({type_name(x.dtype) for x in found.values()})
    if types not in ([], ["float32"]):
        notes.append(f"weights of type {', '.join(types)} became float32")
    prefix = "" if any(name.startswith("h.") for name in found) else "transformer."
    note = config.get(NOTE)
    ours: dict[str, Any] = note if isinstance(note, dict) else {}
    head, score = "lm_head.weight" in found, found.get("score.weight")
    n_classes = 0 if score is None or score.ndim != 2 else len(score)
    shape: dict[str, Any] = {
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "d_model": sizes["n_embd"],
        "n_vocab": sizes["vocab_size"] - 1,
        "n_ctx": sizes["n_positions"],
        "objective": "ar",
        "n_classes": n_classes,
        "head": head,
        # Their classifier was trained on pixel p at position p; ours, told by the note, on sos first.
        "shifted": score is None or ours.get("shifted") is True,
    }
    if head and score is not None:
        raise PixseqError(f"{folder} has lm_head and score", "transformers knows no model with both: keep one of them")
    if not head:
        notes.append("there is no prediction head: the model gives features and probes, no loss and no samples")
    processor = folder / "preprocessor_config.json"
    asked = _read_json(processor) if processor.is_file() else {}
    notes += _size_note(asked.get("size"), sizes["n_positions"])
    return Foreign(
        shape=shape,
        weights=_to_ours(folder, found, shape, prefix),
        files=[folder / "config.json", *files],
        notes=notes,
        class_names=_texts(ours.get("class_names")) or _class_names(config, n_classes),
        palette=processor if "clusters" in asked else None,
        config={key: config[key] for key in ("architectures", "transformers_version") if key in config},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "download it again", MAX_JSON_BYTES)
    except FileNotFoundError:
        raise PixseqError(
            f"{path.parent} has no {path.name} (it holds {_content(path.parent)})",
            "name the downloaded folder that holds config.json and model.safetensors",
        ) from None
    except OSError as error:
        raise PixseqError(f"{path} cannot be read as JSON: {error}", "download it again") from None


def _content(folder: Path) -> str:
    return few(sorted(p.name for p in folder.iterdir()), 10) or "nothing"


def _sizes(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """The numbers that fix the shape. Raises PixseqError for another kind of model or one that ours cannot express."""
    kind = config.get("model_type")
    if kind != "imagegpt":
        raise PixseqError(f"{folder} is a {kind or 'nameless'} model, not imagegpt", "only Image GPT can be imported")
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise PixseqError(
                f"{folder}: its {key} is {config[key]!r}, pixseq's Image GPT has {value!r}",
                NOT_OURS,
            )
    sizes: dict[str, Any] = {
        key: config.get(key, config.get(SIZE_ALIASES.get(key, key), default)) for key, default in SIZES.items()
    }
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
            raise PixseqError(f"{folder}: its {key} is {value!r}", "config.json is damaged: download it again")
    width = sizes["n_embd"]
    if config.get("n_inner") not in (None, 4 * width):
        raise PixseqError(
            f"{folder}: its n_inner is {config['n_inner']}, pixseq's Image GPT has 4 * n_embd = {4 * width}",
            NOT_OURS,
        )
    if width % sizes["n_head"]:
        raise PixseqError(
            f"{folder}: n_embd {width} is not a multiple of n_head {sizes['n_head']}",
            "config.json is damaged: download it again",
        )
    if math.isqrt(sizes["n_positions"]) ** 2 != sizes["n_positions"]:
        raise PixseqError(
            f"{folder}: its n_positions is {sizes['n_positions']}, which is no square picture",
            "pixseq's pictures are square: 1024 positions are 32x32",
        )
    return sizes


def _size_note(size: Any, positions: int) -> list[str]:
    """The processor's picture size should be the model's; its class default of 256x256 is a known trap.

    It is one number in old files, else {"height", "width"}.
    """
    side = math.isqrt(positions)
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if size is None or sides == (side, side):
        return []
    return [f"the processor asks for pictures of size {json.dumps(size)[:100]}, the model's are {side}x{side}"]


def _class_names(config: dict[str, Any], n_classes: int) -> list[str] | None:
    """id2label, unless it is what transformers fills in."""
    labels = config.get("id2label")
    if not n_classes or not isinstance(labels, dict) or len(labels) != n_classes:
        return None
    names = _texts([labels.get(str(i)) for i in range(n_classes)])
    return None if names == [f"LABEL_{i}" for i in range(n_classes)] else names


def _texts(values: Any) -> list[str] | None:
    """`values` where they are a list of strings."""
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


# --- their files


def read_tensors(folder: Path) -> tuple[Tensors, list[Path]]:
    """All tensors of a directory and the files they came from; safetensors where there are any, else pickles.

    Pickles are read by the loader that only makes tensors. Of shards, each gives what the index says it holds, and what
    the index does not know. Raises PixseqError for a missing or damaged file.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return load_tensors(folder / name), [folder / name]
        if index.is_file():
            table = _weight_map(index)
            shards = [folder / file for file in sorted(set(table.values()))]
            tensors: Tensors = {}
            for shard in shards:
                found = load_tensors(shard)
                lost = [name for name, file in table.items() if file == shard.name and name not in found]
                if lost:
                    raise PixseqError(
                        f"{shard} lacks {few(lost)}, which {index.name} puts there", "download both again"
                    )
                tensors |= {name: x for name, x in found.items() if table.get(name, shard.name) == shard.name}
            return tensors, [index, *shards]
    raise PixseqError(
        f"{folder} has no model.safetensors and no pytorch_model.bin (it holds {_content(folder)})",
        "download the PyTorch weights; those of TensorFlow and Flax are not read",
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name. Raises PixseqError if one is not beside the index."""
    table = _read_json(index).get("weight_map")
    if not table or not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise PixseqError(f"{index} has no weight_map", "download it again")
    names = set(table.values())
    for name in sorted(names):
        if Path(name).name != name:
            raise PixseqError(
                f"{index} names the shard {name!r}, which lies elsewhere", "shards lie beside their index"
            )
        if not (index.parent / name).is_file():
            raise PixseqError(f"{index.parent} lacks the shard {name} of {len(names)}", "download the missing shard")
    return table


# --- names and layouts


def rules(shape: Mapping[str, Any], prefix: str) -> dict[str, Rule]:
    """Every tensor of ours, by name. `prefix` is before their names of the trunk."""
    d, v = shape["d_model"], shape["n_vocab"]
    wte = (f"{prefix}wte.weight",)
    found = {"wte": Rule(wte, (v + 1, d), ALL_BUT_LAST_ROW), "sos": Rule(wte, (v + 1, d), LAST_ROW)}
    found["wpe"] = Rule((f"{prefix}wpe.weight",), (shape["n_ctx"], d))
    found["ln_f.weight"] = Rule((f"{prefix}ln_f.weight",), (d,))
    for layer in range(shape["n_layer"]):
        ours, theirs = f"blocks.{layer}", f"{prefix}h.{layer}"
        found[f"{ours}.ln_1.weight"] = Rule((f"{theirs}.ln_1.weight",), (d,))
        found[f"{ours}.attn.qkv.weight"] = Rule((f"{theirs}.attn.c_attn.weight",), (d, 3 * d), TRANSPOSED)
        found[f"{ours}.attn.proj.weight"] = Rule((f"{theirs}.attn.c_proj.weight",), (d, d), TRANSPOSED)
        found[f"{ours}.ln_2.weight"] = Rule((f"{theirs}.ln_2.weight",), (d,))
        found[f"{ours}.mlp.fc.weight"] = Rule((f"{theirs}.mlp.c_fc.weight",), (d, 4 * d), TRANSPOSED)
        found[f"{ours}.mlp.proj.weight"] = Rule((f"{theirs}.mlp.c_proj.weight",), (4 * d, d), TRANSPOSED)
    if shape["head"]:
        found["head.weight"] = Rule(("lm_head.weight",), (v, d))
    if shape["n_classes"]:
        found["classifier.weight"] = Rule(("score.weight",), (shape["n_classes"], d))
    return found


def biases(rules: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """The shape of each bias of their Conv1D, all of which are to be zero, by name."""
    products = [rule for rule in rules.values() if rule.layout is TRANSPOSED]
    return {rule.theirs[0].removesuffix("weight") + "bias": rule.shape[1:] for rule in products}


def _to_ours(folder: Path, found: Tensors, shape: Mapping[str, Any], prefix: str) -> Tensors:
    """Their tensors by our names.

    Raises PixseqError for one that is missing, unknown, of another shape or unfit as a weight, and for biases.
    """
    layers = min(shape["n_layer"], len(found) + 1)  # one more than can be there is enough to tell what is missing
    wanted = rules({**shape, "n_layer": layers}, prefix)
    zeros = biases(wanted)
    check_tensors(folder, {name: x.shape for name, x in found.items()}, wanted, zeros, WORDS)
    weights = take(lambda name: as_weight(folder, name, found[name]), wanted)
    for name in zeros:
        refuse_bias(folder, name, found[name], "Image GPT")
    return weights


def architecture(shape: Mapping[str, Any]) -> str:
    """The class of transformers that carries a model of `shape`."""
    return CAUSAL if shape["head"] else CLASSIFIER if shape["n_classes"] else BARE


def to_theirs(weights: Weights, shape: Mapping[str, Any]) -> Tensors:
    """Our tensors by their names, biases zero: what import turns back into `weights` bit for bit."""
    wanted = rules(shape, "" if architecture(shape) == BARE else "transformer.")
    return give(weights, wanted, biases(wanted))


def write_hf(
    folder: Path,
    weights: Weights,
    shape: Mapping[str, Any],
    side: int,
    palette: list[list[float]] | None,
    class_names: list[str] | None,
    card: str,
) -> None:
    """Write a directory that from_pretrained of transformers opens: weights, configurations, processor, model card.

    `shape` and `weights` have a prediction head or a classifier, not both. The processor makes pictures of `side` and
    has the colours of `palette`; without one there is none. Raises PixseqError where the disk is full.
    """
    folder.mkdir()
    _save(folder / "model.safetensors", to_theirs(weights, shape))
    files = {"config.json": _config(shape, class_names)}
    if palette is not None:
        files["preprocessor_config.json"] = _processor(side, palette)
    if shape["head"]:
        files["generation_config.json"] = _generation(shape)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _save(path: Path, tensors: Tensors) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        mode = path.stat().st_mode  # what the umask leaves; safetensors lets nobody else read
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        hint = "make room on its disk, or choose another --out"
        raise PixseqError(f"cannot write {path}: {error}", hint) from None


def _config(shape: Mapping[str, Any], class_names: list[str] | None) -> dict[str, Any]:
    """Their config.json."""
    config = {
        "architectures": [architecture(shape)],
        "model_type": "imagegpt",
        "vocab_size": shape["n_vocab"] + 1,
        "n_positions": shape["n_ctx"],
        "n_embd": shape["d_model"],
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_inner": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": shape["n_vocab"],
        "dtype": "float32",
        **ONLY,
        NOTE: {"shifted": shape["shifted"], "class_names": class_names},
    }
    if shape["n_classes"]:
        labels = [f"LABEL_{i}" for i in range(shape["n_classes"])]
        if class_names and len(class_names) == len(labels):
            labels = class_names
        config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        config["label2id"] = {name: i for i, name in enumerate(labels)}
    return config


def _generation(shape: Mapping[str, Any]) -> dict[str, Any]:
    """How generate() draws; top_k 0, or it would draw from the 50 likeliest colours alone."""
    return {
        "bos_token_id": shape["n_vocab"],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "max_length": shape["n_ctx"] + 1,
    }


def _processor(side: int, palette: list[list[float]]) -> dict[str, Any]:
    """What turns a picture into the model's tokens."""
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_color_quantize": True,
        "clusters": palette,
    }
