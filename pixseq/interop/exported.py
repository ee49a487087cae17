"""Feature extractors of other programs as torch.export writes them (.pt2), run without executing code of theirs.

torch.export.load unpickles whatever a file asks it to (weights, constants and sample inputs), evaluates its symbolic
expressions as text, and calls any function below `torch` by name. So the file is read here instead: its graph is JSON,
its weights are plain numbers, and each node is one operator of a list that neither reads files nor runs code. What is
outside that list, pickled or compiled, is refused by name.

The model takes one tensor, float32 [B, 3, H, W] in [0, 1], and returns [B, D] first.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.errors import PixseqError

SUFFIX = ".pt2"
REMEDY = "save it with torch.export.save in evaluation mode, from plain operators and weights on one CPU"
MOST_JSON = 64 << 20
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
NUMBERS = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem")
# Operators of aten that begin with an underscore are internal: these alone are what plain layers export to.
INTERNAL = {
    "_adaptive_avg_pool2d",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_log_softmax",
    "_native_batch_norm_legit",
}
INTERNAL |= {"_native_batch_norm_legit_no_training", "_softmax", "_to_copy", "_unsafe_index", "_unsafe_view"}
INTERNAL |= {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_scaled_dot_product_flash_attention_for_cpu"}
FORBIDDEN = {"from_file", "set_", "set", "resize_", "resize_as_", "as_strided", "as_strided_", "as_strided_copy"}


@dataclass(frozen=True)
class Node:
    """One operator, its arguments by position and by name as the file has them, and the names of its results."""

    call: Callable
    args: tuple[Mapping[str, Any], ...]
    named: Mapping[str, Mapping[str, Any]]
    results: tuple[Any, ...]


@dataclass(frozen=True)
class Exported:
    """A model that was read. `sides` are None where they may be any; `batch` is None or the one number it takes."""

    path: Path
    id: str
    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]  # weights and buffers by their name in the graph
    input: str
    output: str
    batch: int | None
    sides: tuple[int | None, int | None]

    def features(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> float32 [B, D]. Raises PixseqError where it takes no such pictures."""
        height, width = images.shape[2:]
        for ours, theirs in zip((height, width), self.sides):
            if theirs is not None and ours != theirs:
                raise PixseqError(
                    f"{self.path} takes pictures of {'x'.join(str(s or 'any') for s in self.sides)}, these are "
                    f"{height}x{width}",
                    "export it with its resize inside, or encode pictures of that size",
                )
        if self.batch is None:
            return self._run(images)
        parts = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = torch.cat([part, part[-1:].expand(self.batch - len(part), -1, -1, -1)])
            parts.append(self._run(padded)[: len(part)])
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        device = images.device
        values: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.constants.items()}
        values[self.input] = images
        try:
            for node in self.nodes:
                args = [_value(arg, values, device) for arg in node.args]
                named = {name: _value(arg, values, device) for name, arg in node.named.items()}
                _keep(node.call(*args, **named), node.results, values)
            found = values[self.output]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PixseqError(f"{self.path} cannot be run on {list(images.shape)}: {line}", REMEDY) from None
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(images):
            raise PixseqError(
                f"{self.path} returns {list(getattr(found, 'shape', []))} of {len(images)} pictures, not [B, D]",
                "export a model whose first result is a row of features a picture",
            )
        if math.prod(found.shape[1:]) != found.shape[1]:
            raise PixseqError(
                f"{self.path} returns {list(found.shape)}, where [B, D] is needed", "export it with its pooling inside"
            )
        return found.flatten(1).float()


def is_exported(path: str | Path) -> bool:
    return Path(path).suffix == SUFFIX


def file_id(path: str | Path) -> str:
    """sha256 of the file. Raises PixseqError where there is none."""
    try:
        with Path(path).open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise PixseqError(f"{path} cannot be read: {error.strerror}", "check the path") from None


def open_exported(path: str | Path) -> Exported:
    """Read a .pt2 file. Raises PixseqError for whatever is not plainly a graph of known operators and weights."""
    path = Path(path)
    id = file_id(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, id, archive)
    except zipfile.BadZipFile:
        raise PixseqError(f"{path} is no archive of torch.export", REMEDY) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise PixseqError(f"{path} is not laid out as torch.export writes it: {error!r}", REMEDY) from None


def _read(path: Path, id: str, archive: zipfile.ZipFile) -> Exported:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    models = [name for name in names if re.fullmatch(r"models/[^/]+[.]json", name)]
    if len(models) != 1 or any(name.startswith("data/aotinductor") for name in names):
        raise PixseqError(f"{path} holds {len(models)} graphs, or compiled code: one graph is needed", REMEDY)
    program = _json(archive, names[models[0]])
    stem = models[0].removeprefix("models/").removesuffix(".json")
    tensors: dict[str, Tensor] = {}
    for kind in ("weights", "constants"):
        config = names.get(f"data/{kind}/{stem}_{kind}_config.json")
        for name, entry in (_json(archive, config)["config"] if config else {}).items():
            tensors[name] = _tensor(path, archive, names, kind, name, entry)
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    constants, inputs = _inputs(path, signature["input_specs"], tensors)
    outputs = [spec["user_output"]["arg"] for spec in signature["output_specs"] if "user_output" in spec]
    if len(inputs) != 1 or not outputs or "as_tensor" not in outputs[0]:
        raise PixseqError(f"{path} takes {len(inputs)} inputs and returns {len(outputs)}, one tensor is needed", REMEDY)
    nodes = tuple(_node(path, node) for node in graph["nodes"])
    sizes = [size.get("as_int") for size in graph["tensor_values"][inputs[0]]["sizes"]]
    if len(sizes) != 4 or sizes[1] not in (3, None):
        raise PixseqError(f"{path} takes a tensor of {sizes}, where pictures [B, 3, H, W] are needed", REMEDY)
    output = outputs[0]["as_tensor"]["name"]
    return Exported(path, id, nodes, constants, inputs[0], output, sizes[0], (sizes[2], sizes[3]))


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > MOST_JSON:
        raise ValueError(f"{name} has {archive.getinfo(name).file_size} bytes")
    return json.loads(archive.read(name))


def _tensor(path: Path, archive: zipfile.ZipFile, names: Mapping[str, str], kind: str, name: str, entry: Any) -> Tensor:
    """A weight from its bytes. Raises PixseqError where it is pickled."""
    if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_[0-9]+", entry["path_name"]):
        raise PixseqError(f"{path}: {name} is pickled, which could run code", REMEDY)
    meta = entry["tensor_meta"]
    dtype = DTYPES[meta["dtype"]]
    sizes, strides = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    raw = bytearray(archive.read(names[f"data/{kind}/{entry['path_name']}"]))
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1
    if min(sizes, default=1) > 0 and not (offset >= 0 and min(strides, default=0) >= 0 and reach <= len(flat)):
        raise PixseqError(f"{path}: {name} of {sizes} is cut short", "copy the file again")
    return torch.as_strided(flat, sizes, strides, offset) if math.prod(sizes) else torch.zeros(sizes, dtype=dtype)


def _inputs(path: Path, specs: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the file by their names in the graph, and the names of what is to be given."""
    keys = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    constants: dict[str, Tensor] = {}
    given: list[str] = []
    for spec in specs:
        ((kind, found),) = spec.items()
        if kind == "user_input":
            given.append(found["arg"]["as_tensor"]["name"])
        elif kind in keys:
            constants[found["arg"]["name"]] = tensors[found[keys[kind]]]
        else:
            raise PixseqError(f"{path} takes a {kind}, which is no tensor", REMEDY)
    return constants, given


def _node(path: Path, node: Mapping[str, Any]) -> Node:
    """Raises PixseqError for an operator that is not on the list."""
    call = _operator(node["target"])
    if call is None:
        raise PixseqError(f"{path} calls {node['target']!r}, which is none of the operators that are run", REMEDY)
    positional = tuple(each["arg"] for each in node["inputs"] if each.get("kind") != 2)
    named = {each["name"]: each["arg"] for each in node["inputs"] if each.get("kind") == 2}
    return Node(call, positional, named, tuple(_result(each) for each in node["outputs"]))


def _operator(target: str) -> Callable | None:
    if match := re.fullmatch(r"_operator[.]([a-z]+)", target):
        return getattr(operator, match[1]) if match[1] in NUMBERS else None
    match = re.fullmatch(r"torch[.]ops[.]aten[.]([A-Za-z0-9_]+)[.]([A-Za-z0-9_]+)", target)
    if match is None or match[1] in FORBIDDEN or (match[1].startswith("_") and match[1] not in INTERNAL):
        return None
    packet = getattr(torch.ops.aten, match[1], None)
    found = getattr(packet, match[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    return found if isinstance(found, torch._ops.OpOverload) else None


def _result(output: Mapping[str, Any]) -> Any:
    """The name of a result, or a list of names; None for one that is not kept."""
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return [each["name"] for each in value]
    return value.get("name") or value.get("as_name") if isinstance(value, Mapping) else None


def _keep(found: Any, results: tuple[Any, ...], values: dict[str, Any]) -> None:
    several = found if isinstance(found, tuple | list) and len(results) > 1 else [found]
    for name, value in zip(results, several):
        if isinstance(name, list):
            values.update(zip(name, value))
        elif name is not None:
            values[name] = value


def _value(arg: Mapping[str, Any], values: Mapping[str, Any], device: torch.device) -> Any:
    """An argument as the file has it -> what the operator gets. Raises KeyError for a kind that is none of these."""
    ((kind, value),) = arg.items()
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_optional_tensor"):
        return values[value["name"]] if "name" in value else _value(value, values, device)
    if kind == "as_tensors":
        return [values[each["name"]] for each in value]
    if kind == "as_optional_tensors":
        return [_value(each, values, device) for each in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _number(value, values)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_number(each, values) for each in value]
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return value
    if kind == "as_device":
        return device
    return {"as_scalar_type": DTYPES, "as_memory_format": FORMATS, "as_layout": {7: torch.strided}}[kind][value]


def _number(value: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """A number that stands there, or one that was computed before."""
    ((kind, found),) = value.items()
    return values[found] if kind == "as_name" else found
