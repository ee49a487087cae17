"""Feature extractors of other programs as torch.export writes them (.pt2), run without executing code of theirs.

torch.export.load unpickles whatever a file asks it to (weights, constants and sample inputs), evaluates its symbolic
expressions as text, and calls any function below `torch` by name. So the file is read here instead: its graph is JSON,
its weights are plain numbers, and each node is one operator of a list that neither reads files nor runs code. What is
outside that list, pickled or compiled, is refused by name.

The model takes one tensor, float32 [B, 3, H, W] in [0, 1], and returns [B, D] first.
"""

from __future__ import annotations

import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.bounded.calls import TooLarge, check_call, check_numbers, live_bytes
from pixseq.bounded.files import check_holes, check_members, open_regular
from pixseq.bounded.structure import MOST_JSON, parse_json
from pixseq.bounded.tensors import MOST_TENSORS
from pixseq.errors import PixseqError
from pixseq.interop.places import file_id

REMEDY = "save it with torch.export.save in evaluation mode, from plain operators and weights on one CPU"
FREE, FOLDED = 1 << 29, 32  # bytes that a run holds beside weights and pictures: this, and so many times the file
MOST_WIDTH = 1 << 20  # numbers a picture
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
# Operators of aten that compute from tensors and numbers alone. The others are not run: some write files, print, seed
# the generators, or change what a tensor is rather than its values.
_NAMES = """
abs absolute acos add addbmm addcdiv addcmul addmm addmv addr adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alias all alpha_dropout amax amin
aminmax any arange argmax argmin argsort asin atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat cdist ceil celu
channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im concat concatenate constant_pad_nd contiguous
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copy cos cosh cosine_similarity
count_nonzero cross cummax cummin cumprod cumsum detach detach_ diag diag_embed diagonal div divide dot dropout
dropout_ einsum elu embedding empty empty_like eq erf erfc erfinv exp exp2 expand expand_as expm1 eye
feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn
fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill fix flatten flip float_power floor
floor_divide fmax fmin fmod frac frobenius_norm full full_like gather ge gelu glu greater greater_equal grid_sampler
grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt hardshrink hardsigmoid hardswish hardtanh hstack hypot
im2col imag index index_add index_copy index_fill index_put index_select inner instance_norm isfinite isinf isnan
item kron kthvalue layer_norm le leaky_relu lerp less less_equal lift lift_fresh lift_fresh_copy linalg_matmul
linalg_matrix_norm linalg_norm linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid
log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lstm lstm_cell lt masked_fill
masked_scatter masked_select matmul max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
max_pool3d max_pool3d_with_indices maximum mean median meshgrid min minimum mish mm mode moveaxis
movedim mul multiply mv nan_to_num nanmean nansum narrow native_batch_norm native_channel_shuffle native_dropout
native_group_norm native_layer_norm ne neg negative new_empty new_full new_ones new_zeros nonzero norm not_equal
numel numpy_T one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle positive pow
prelu prod quantile rad2deg ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6
remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as
resolve_conj resolve_neg rms_norm roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention
scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign silu sin sinh size slice
slice_scatter softmax softplus softshrink sort split split_with_sizes sqrt square squeeze stack std std_mean sub
subtract sum swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_stride
t take take_along_dim tan tanh tensor_split tensordot threshold tile to topk transpose tril tril_indices triu
triu_indices true_divide trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes
unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_trilinear3d var var_mean view view_as view_as_complex view_as_real vsplit vstack where
xlogy zeros zeros_like acosh asinh atanh
abs_ add_ addcdiv_ addcmul_ baddbmm_ celu_ clamp_ clamp_max_ clamp_min_ copy_ cos_ div_ elu_ exp_ fill_ floor_
gelu_ hardsigmoid_ hardswish_ hardtanh_ index_put_ leaky_relu_ log_ masked_fill_ mish_ mul_ neg_ pow_ reciprocal_
relu6_ relu_ round_ rsqrt_ scatter_ selu_ sigmoid_ silu_ sin_ sqrt_ squeeze_ sub_ tanh_ threshold_ transpose_
unsqueeze_ zero_
_adaptive_avg_pool2d _assert_scalar _assert_tensor_metadata _log_softmax _native_batch_norm_legit
_native_batch_norm_legit_no_training _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_index
_unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
"""
OPERATORS = frozenset(_NAMES.split())
UNFILLED = {"aten::empty", "aten::empty_like", "aten::new_empty"}  # whose results hold what memory held before


@dataclass(frozen=True)
class Node:
    """One operator, its arguments by position and by name as the file has them, and the names of its results."""

    call: Callable
    args: tuple[Mapping[str, Any], ...]
    named: Mapping[str, Mapping[str, Any]]
    results: tuple[Any, ...]
    done: tuple[str, ...]  # values that no later one needs


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
    most: int  # bytes of what it computes, held at a time

    def on(self, device: torch.device) -> Exported:
        """With its weights there, for pictures there."""
        return replace(self, constants={name: tensor.to(device) for name, tensor in self.constants.items()})

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
            return self._parted(images)
        parts = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = torch.cat([part, part[-1:].expand(self.batch - len(part), -1, -1, -1)])
            parts.append(self._run(padded)[: len(part)])
        return torch.cat(parts)

    def _parted(self, images: Tensor) -> Tensor:
        """Of as many at once as fit."""
        try:
            return self._run(images)
        except PixseqError as error:
            if not isinstance(error.__cause__, TooLarge) or len(images) < 2:
                raise
        half = len(images) // 2
        return torch.cat([self._parted(images[:half]), self._parted(images[half:])])

    def _run(self, images: Tensor) -> Tensor:
        device = images.device
        values: dict[str, Any] = {**self.constants, self.input: images}
        try:
            for node in self.nodes:
                args = [_value(arg, values, device) for arg in node.args]
                named = {name: _value(arg, values, device) for name, arg in node.named.items()}
                live = live_bytes(x for name, x in values.items() if name not in self.constants)
                _keep(_called(node.call, args, named, self.most - live), node.results, values)
                for name in node.done:
                    values.pop(name, None)
            found = values[self.output]
        except TooLarge as error:
            raise PixseqError(
                f"{self.path} takes more than {self.most:,} bytes for {list(images.shape)}: {error}",
                "export it with a batch of any size, or of fewer pictures",
            ) from error
        except (MemoryError, torch.OutOfMemoryError):  # a matter of this machine
            raise
        except Exception as error:  # what does not fit comes as many types
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
        if found.shape[1] > MOST_WIDTH:
            raise PixseqError(
                f"{self.path} returns {found.shape[1]:,} numbers a picture, more than the {MOST_WIDTH:,} that are read",
                "export it with its pooling inside",
            )
        return found.flatten(1).float()


def _called(call: Callable, args: list[Any], named: dict[str, Any], room: int) -> Any:
    """What a node returns, no more than `room` bytes of it."""
    if isinstance(call, torch._ops.OpOverload):
        check_call(call, args, named, room)
        found = call(*args, **named)
        return found.zero_() if call._schema.name in UNFILLED else found
    if call is operator.getitem:
        if not isinstance(args[0], tuple | list):
            raise TypeError("an item is taken of what is no list")
        return call(*args)
    check_numbers(args)
    result = call(*args)
    check_numbers((), result)
    return result


def open_exported(path: str | Path) -> Exported:
    """Read a .pt2 file. Raises PixseqError for whatever is not plainly a graph of known operators and weights."""
    path = Path(path)
    id = file_id(path)
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            check_holes(file)
            check_members(archive, path.stat().st_size, MOST_TENSORS)
            return _read(path, id, archive)
    except zipfile.BadZipFile:
        raise PixseqError(f"{path} is no archive of torch.export", REMEDY) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, EOFError) as error:
        raise PixseqError(f"{path} is not laid out as torch.export writes it: {error!r}", REMEDY) from None


def _read(path: Path, id: str, archive: zipfile.ZipFile) -> Exported:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    models = [name for name in names if re.fullmatch(r"models/[^/]+[.]json", name)]
    if len(models) != 1 or any(name.startswith("data/aotinductor") for name in names):
        raise PixseqError(f"{path} holds {len(models)} graphs, or compiled code: one graph is needed", REMEDY)
    program = _json(archive, names[models[0]])
    stem = models[0].removeprefix("models/").removesuffix(".json")
    tensors: dict[str, Tensor] = {}
    payloads: dict[str, Tensor] = {}
    for kind in ("weights", "constants"):
        config = names.get(f"data/{kind}/{stem}_{kind}_config.json")
        for name, entry in (_json(archive, config)["config"] if config else {}).items():
            tensors[name] = _tensor(path, archive, names, kind, name, entry, payloads)
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    constants, inputs = _inputs(path, signature["input_specs"], tensors)
    outputs = [spec["user_output"]["arg"] for spec in signature["output_specs"] if "user_output" in spec]
    if len(inputs) != 1 or not outputs or "as_tensor" not in outputs[0]:
        raise PixseqError(f"{path} takes {len(inputs)} inputs and returns {len(outputs)}, one tensor is needed", REMEDY)
    output = outputs[0]["as_tensor"]["name"]
    nodes = _nodes(path, graph["nodes"], {*constants, output})
    sizes = [size.get("as_int") for size in graph["tensor_values"][inputs[0]]["sizes"]]
    if len(sizes) != 4 or sizes[1] not in (3, None):
        raise PixseqError(f"{path} takes a tensor of {sizes}, where pictures [B, 3, H, W] are needed", REMEDY)
    most = FREE + FOLDED * path.stat().st_size
    return Exported(path, id, nodes, constants, inputs[0], output, sizes[0], (sizes[2], sizes[3]), most)


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > MOST_JSON:
        raise ValueError(f"{name} has {archive.getinfo(name).file_size:,} bytes, more than {MOST_JSON:,}")
    return parse_json(archive.read(name), finite=False)  # a mask is filled with -inf


def _tensor(
    path: Path,
    archive: zipfile.ZipFile,
    names: Mapping[str, str],
    kind: str,
    name: str,
    entry: Any,
    payloads: dict[str, Tensor],
) -> Tensor:
    """A weight from its bytes, which several may share. Raises PixseqError where it is pickled."""
    if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_[0-9]+", entry["path_name"]):
        raise PixseqError(f"{path}: {name} is pickled, which could run code", REMEDY)
    meta = entry["tensor_meta"]
    dtype = DTYPES[meta["dtype"]]
    sizes, strides = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    member = names[f"data/{kind}/{entry['path_name']}"]
    if member not in payloads:
        raw = bytearray(archive.read(member))
        payloads[member] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
    stored = len(payloads[member]) - len(payloads[member]) % dtype.itemsize
    flat = payloads[member][:stored].view(dtype)
    if math.prod(sizes) > len(flat):
        raise PixseqError(
            f"{path}: {name} declares {math.prod(sizes):,} numbers, and {len(flat):,} are stored: it is cut short, or "
            "was expanded",
            "copy the file again, or export the model after .clone() of that tensor",
        )
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


def _nodes(path: Path, found: list[Mapping[str, Any]], kept: set[str]) -> tuple[Node, ...]:
    """In order; with the last that needs a value it is `done`, but for those that are `kept`."""
    nodes, needed = [], set(kept)
    for node in reversed(found):
        read = _node(path, node)
        names = set(_texts([read.args, list(read.named.values()), read.results]))
        nodes.append(replace(read, done=tuple(sorted(names - needed))))
        needed |= names
    return tuple(reversed(nodes))


def _texts(found: Any) -> Iterator[str]:
    """Every text in an argument, names of values among them."""
    for each in found.values() if isinstance(found, Mapping) else found:
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping | list | tuple):
            yield from _texts(each)


def _node(path: Path, node: Mapping[str, Any]) -> Node:
    """Raises PixseqError for an operator that is not on the list."""
    call = _operator(node["target"])
    if call is None:
        raise PixseqError(f"{path} calls {node['target']!r}, which is none of the operators that are run", REMEDY)
    positional = tuple(each["arg"] for each in node["inputs"] if each.get("kind") != 2)
    named = {each["name"]: each["arg"] for each in node["inputs"] if each.get("kind") == 2}
    return Node(call, positional, named, tuple(_result(each) for each in node["outputs"]), ())


def _operator(target: str) -> Callable | None:
    if match := re.fullmatch(r"_operator[.]([a-z]+)", target):
        return getattr(operator, match[1]) if match[1] in NUMBERS else None
    match = re.fullmatch(r"torch[.]ops[.]aten[.]([A-Za-z0-9_]+)[.]([A-Za-z0-9_]+)", target)
    if match is None or match[1] not in OPERATORS:
        return None
    packet = getattr(torch.ops.aten, match[1], None)
    found = getattr(packet, match[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload) or any(each.is_out for each in found._schema.arguments):
        return None  # an overload that writes into a tensor it is given may resize it
    arguments, results = found._schema.arguments, found._schema.returns
    if results and not any("Tensor" in str(each.type) for each in (*arguments, *results)):
        return None  # one of lists, texts or numbers, which no graph calls
    return found


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
    if kind in ("as_int", "as_ints", "as_bool", "as_bools", "as_string"):
        return value
    if kind in ("as_float", "as_floats"):
        return [_float(each) for each in value] if kind == "as_floats" else _float(value)
    if kind == "as_device":
        return device
    named: dict[str, Mapping[int, Any]] = {
        "as_scalar_type": DTYPES,
        "as_memory_format": FORMATS,
        "as_layout": {7: torch.strided},
    }
    return named[kind][value]


def _number(value: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """A number that stands there, or one that was computed before."""
    ((kind, found),) = value.items()
    return values[found] if kind == "as_name" else _float(found) if kind == "as_float" else found


def _float(value: Any) -> Any:
    """torch writes as a text what no number of JSON is."""
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value
