"""Files as torch.export writes them, by hand: a graph of calls, each (operator, results, arguments)."""

import json
import zipfile


def tensor(name):
    return {"as_tensor": {"name": name}}


def ints(*values):
    return {"as_ints": list(values)}


def call(target, result, *args, **named):
    """`result` is a name, or a list of names; numbers and lists of them are written as such."""
    found = {"as_tensors": [{"name": each} for each in result]} if isinstance(result, list) else tensor(result)
    if target.startswith("_operator"):
        found = {"as_sym_int": {"as_name": result}}
    inputs = [{"name": "", "arg": _arg(arg), "kind": 1} for arg in args]
    inputs += [{"name": name, "arg": _arg(arg), "kind": 2} for name, arg in named.items()]
    target = target if target.startswith("_operator") else f"torch.ops.aten.{target}"
    return {"target": target, "inputs": inputs, "outputs": [found]}


def _arg(value):
    kinds = {int: "as_int", float: "as_float", bool: "as_bool", str: "as_string"}
    if isinstance(value, dict):
        return value
    return ints(*value) if isinstance(value, list) else {kinds[type(value)]: value}


def write(path, *nodes, weights=(), compress=zipfile.ZIP_STORED):
    """It takes x [B, 3, H, W] and returns y; `weights` are (name, sizes, strides, bytes) of float32."""
    program = {
        "graph_module": {
            "graph": {"nodes": list(nodes), "tensor_values": {"x": {"sizes": [{}, {"as_int": 3}, {}, {}]}}},
            "signature": {
                "input_specs": [{"user_input": {"arg": tensor("x")}}]
                + [{"parameter": {"arg": {"name": name}, "parameter_name": name}} for name, *_ in weights],
                "output_specs": [{"user_output": {"arg": tensor("y")}}],
            },
        }
    }
    config = {
        name: {
            "path_name": f"weight_{i}",
            "use_pickle": False,
            "tensor_meta": {
                "dtype": 7,
                "sizes": [{"as_int": n} for n in sizes],
                "strides": [{"as_int": n} for n in strides],
                "storage_offset": {"as_int": 0},
            },
        }
        for i, (name, sizes, strides, _) in enumerate(weights)
    }
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("model/models/model.json", json.dumps(program))
        archive.writestr("model/data/weights/model_weights_config.json", json.dumps({"config": config}))
        for i, (*_, data) in enumerate(weights):
            archive.writestr(f"model/data/weights/weight_{i}", data)
    return path
