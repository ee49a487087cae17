"""The model card of an exported model: what it is, how it was made, how well it does, how to use it.

Its code blocks run as they stand, in the folder that holds the card's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CAUSAL_USE = """\
```python
import numpy as np
import torch
from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessor

model = ImageGPTForCausalImageModeling.from_pretrained("{name}").eval()
processor = ImageGPTImageProcessor.from_pretrained("{name}")
sos = model.config.bos_token_id  # {sos}: the last row of the embedding

# pictures from nothing
drawn = model.generate(torch.full((4, 1), sos), max_length={total}, do_sample=True, top_k=0)[:, 1:]
colours = np.rint(127.5 * (np.array(processor.clusters) + 1)).astype(np.uint8)
pictures = colours[drawn.numpy()].reshape(-1, {side}, {side}, 3)

# the loss in nats per token of a picture (here the first one drawn)
tokens = drawn[:1]  # or torch.tensor(processor(images=picture)["input_ids"])
inputs = torch.cat([torch.full((len(tokens), 1), sos), tokens[:, :-1]], dim=1)
with torch.no_grad():
    nats = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), tokens.flatten())
```"""

CLASSIFIER_USE = """\
```python
import torch
from PIL import Image
from transformers import ImageGPTForImageClassification, ImageGPTImageProcessor

model = ImageGPTForImageClassification.from_pretrained("{name}").eval()
processor = ImageGPTImageProcessor.from_pretrained("{name}")
picture = Image.new("RGB", ({side}, {side}))  # yours here
tokens = torch.as_tensor(processor(images=picture)["input_ids"][0])[None]
{inputs}
with torch.no_grad():
    label = model.config.id2label[int(model(input_ids=inputs).logits.argmax(1))]
```"""

BARE_USE = """\
```python
from transformers import ImageGPTModel

model = ImageGPTModel.from_pretrained("{name}").eval()  # no prediction head: hidden states only
```"""

CAUSAL_SOS = """\
Position p of the logits predicts pixel p, and sees the pixels before it. The input is therefore one start token and
all pixels but the last: `[{sos}, x_1 .. x_{last}]`, {n_ctx} positions, whose logits are scored against
`x_1 .. x_{n_ctx}`. The processor adds no start token, and `labels=` shifts once more and leaves out the first pixel:
compute the loss as above. `generate` truncates to the 50 likeliest colours unless it is told `top_k=0`, as the
generation_config.json here does."""

SHIFTED_SOS = """\
The classifier was trained on `[{sos}, x_1 .. x_{last}]`: one start token, then all pixels but the last. The processor
adds no start token, so build the input as above; a pipeline that feeds the pixels alone gives other, worse answers."""

PLAIN_SOS = "The classifier was trained on the pixels alone: the processor's `input_ids` are its input as they are."

TRAINED = """\
Trained on {images:,} images for {steps:,} steps. Unless they were encoded with `--resize squash`, they were cut to
their centre square and scaled, while the processor here squashes the whole picture: crop before it."""


def model_card(
    name: str,
    shape: Mapping[str, Any],
    codec: Mapping[str, Any],
    manifest: Mapping[str, Any],
    recipe: str,
    measured: Iterable[tuple[str, Mapping[str, Any]]],
) -> str:
    """Markdown with a YAML header. `recipe` is the checkpoint's config.yaml, `measured` numbers by the data's name."""
    side, v, summary = codec["height"], shape["n_vocab"], manifest["summary"]
    task = "image-classification" if shape["n_classes"] else "unconditional-image-generation"
    rows = list(_metrics(summary, measured))
    facts = {"name": name, "sos": v, "n_ctx": shape["n_ctx"], "last": shape["n_ctx"] - 1, "side": side}
    facts["total"] = shape["n_ctx"] + 1
    if shape["head"]:
        use, sos = CAUSAL_USE, CAUSAL_SOS
    elif shape["n_classes"]:
        use, sos = CLASSIFIER_USE, SHIFTED_SOS if shape["shifted"] else PLAIN_SOS
        start = f"torch.cat([torch.full((1, 1), {v}), tokens[:, :-1]], dim=1)"
        facts["inputs"] = f"inputs = {start if shape['shifted'] else 'tokens'}"
    else:
        use, sos = BARE_USE, "The start token is the last row of the embedding, {sos}."
    parts = [
        _header(name, task, rows),
        f"# {name}",
        f"An Image GPT over {side}x{side} pictures in a palette of {v} colours: {shape['n_layer']} layers, "
        f"width {shape['d_model']}, {shape['n_head']} heads, {summary['parameters']:,} parameters (without the zero "
        "biases that this form carries). Each pixel is one token, the nearest of the palette's colours "
        "(`clusters` of preprocessor_config.json), in raster order.",
        "## How to use",
        use.format(**facts),
        sos.format(**facts),
        "## Recipe",
        f"Made by `pixseq {manifest['stage']}` {manifest['version']}, content id `{manifest['id']}`, with",
        f"```yaml\n{recipe.strip()}\n```",
        "## Data",
        "\n".join(
            f"- {role}: `{Path(parent['path']).name}`, id `{parent['id']}`"
            for role, parent in manifest["inputs"].items()
        ),
        *([TRAINED.format(**summary)] if "steps" in summary else []),
        "## Metrics",
        "\n".join(["| on | metric | value |", "|---|---|---|", *(f"| {on} | {key} | {x:.6g} |" for on, key, x in rows)])
        if rows
        else "None were measured.",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(
    summary: Mapping[str, Any], measured: Iterable[tuple[str, Mapping[str, Any]]]
) -> Iterable[tuple[str, str, float]]:
    """(data, metric, value): the best validation of training, then what was measured since."""
    for key, value in (summary.get("best") or {}).items():
        if key.startswith(("val_", "ema_val_")) and isinstance(value, int | float):
            yield "validation while training", key, value
    for on, numbers in measured:
        for key, value in numbers.items():
            if isinstance(value, float):
                yield on, key, value


def _header(name: str, task: str, rows: list[tuple[str, str, float]]) -> str:
    """The YAML that the hub reads; JSON strings are YAML strings."""
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- image-gpt", "- pixseq"]
    if rows:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for on, key, value in rows:
        lines += [
            f"  - task: {{type: {task}}}",
            f"    dataset: {{name: {json.dumps(on)}, type: {json.dumps(on)}}}",
            f"    metrics: [{{type: {key}, value: {value:.6g}}}]",
        ]
    return "\n".join([*lines, "---"])
