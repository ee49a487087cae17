"""Weights of other programs, for fuzz.py: a sound example of each form, and what imports it."""

import json

import numpy as np
from conftest import write_pixels

IMPORT = "import {} HERE -o OUT"


def reader(form):
    def read(folder):
        from pixseq.interop.huggingface import read_hf
        from pixseq.interop.openai import read_openai

        return {"hf": read_hf, "openai": read_openai}[form](folder)

    return read, f"import {form} HERE -o OUT"


def hf_tensors(folder):
    """The small files of an ImageGPT folder; returns its tensors."""
    import torch

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4, "vocab_size": 5}
    names = {"id2label": {"0": "a", "1": "b"}, "pixseq": {"shifted": True, "class_names": ["a", "b"]}}
    (folder / "config.json").write_text(json.dumps({"model_type": "imagegpt", **sizes, **names}))
    clusters = [[x / 4, 0.0, -0.5] for x in range(4)]
    content = {"size": {"height": 2, "width": 2}, "clusters": clusters}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    d = 4
    shapes = {"wte.weight": (5, d), "wpe.weight": (4, d), "ln_f.weight": (d,), "h.0.ln_1.weight": (d,)}
    shapes |= {"h.0.attn.c_attn.weight": (d, 3 * d), "h.0.attn.c_attn.bias": (3 * d,), "h.0.ln_2.weight": (d,)}
    shapes |= {"h.0.attn.c_proj.weight": (d, d), "h.0.attn.c_proj.bias": (d,), "h.0.mlp.c_fc.weight": (d, 4 * d)}
    shapes |= {"h.0.mlp.c_fc.bias": (4 * d,), "h.0.mlp.c_proj.weight": (4 * d, d), "h.0.mlp.c_proj.bias": (d,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def huggingface(folder, kept):
    import torch

    torch.save(hf_tensors(folder), folder / "pytorch_model.bin")
    return reader("hf")


def huggingface_old(folder, kept):
    """As torch saved before it wrote zips."""
    import torch

    torch.save(hf_tensors(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return reader("hf")


def safetensors(folder, kept):
    from safetensors.torch import save_file

    save_file(hf_tensors(folder), folder / "model.safetensors", metadata={"format": "pt"})
    return reader("hf")


def safetensors_sharded(folder, kept):
    from safetensors.torch import save_file

    tensors = hf_tensors(folder)
    table = {name: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(table.values()):
        save_file({name: x for name, x in tensors.items() if table[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return reader("hf")


def openai(folder, kept):
    from bundle_writer import write_bundle
    from openai_graph import variables

    arrays = variables(layers=1, heads=1, size=4, colours=5, context=4)
    arrays |= {"global_step": np.asarray(1000, np.int64), "beta1_power": np.asarray(0.5, np.float32)}
    write_bundle(folder / "model.ckpt-1000", arrays, shards=2)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    np.save(folder / "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (5, 3)))
    return reader("openai")


def aim(folder, kept):
    import torch
    from test_import_aim import backbone, probe_head

    torch.save(backbone(8, 1), folder / "b.pth")
    torch.save(probe_head(8, 3), folder / "h.pth")

    def read(folder):
        from pixseq.interop.aim import read_aim

        read_aim(folder / "b.pth", folder / "h.pth", n_heads=2, size=8)

    return read, "import aim HERE/b.pth --head HERE/h.pth --heads 2 --size 8 -o OUT"


def exported(folder, kept):
    """A graph of torch.export, run on a few pictures."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.relu(self.conv(x)).mean((2, 3)))

    with torch.random.fork_rng():
        batch = torch.export.Dim("batch", min=1, max=512)
        program = torch.export.export(Net().eval(), (torch.rand(3, 3, 4, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    write_pixels(kept / "x.zarr", count=4, side=4)

    def read(folder):
        from pixseq.interop.torch_export import open_exported

        with torch.inference_mode():
            open_exported(folder / "net.pt2").features(torch.zeros(2, 3, 4, 4))

    return read, "features HERE/net.pt2 KEPT/x.zarr -o OUT"


KINDS = (huggingface, huggingface_old, safetensors, safetensors_sharded, openai, aim, exported)
