"""The model card of an exported model: what it is, how it was made, how well it does, how to use it.

Its code blocks run as they stand, in the folder that holds the card's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pixseq.text import code_block, code_span, markdown, shown

Row = tuple[str, str, float]  # data, metric, value

CAUSAL_USE = """\
```python
import numpy as np
import torch
from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessor

model = ImageGPTForCausalImageModeling.from_pretrained({name!r}).eval()
processor = ImageGPTImageProcessor.from_pretrained({name!r})
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

CAUSAL_IDS_USE = """\
```python
import torch
from transformers import ImageGPTForCausalImageModeling

model = ImageGPTForCausalImageModeling.from_pretrained({name!r}).eval()
sos = model.config.bos_token_id  # {sos}: the last row of the embedding

# palette ids of {side}x{side} pixels, row by row
drawn = model.generate(torch.full((4, 1), sos), max_length={total}, do_sample=True, top_k=0)[:, 1:]

# the loss in nats per token of a picture's ids (here the first one drawn)
tokens = drawn[:1]  # yours here
inputs = torch.cat([torch.full((len(tokens), 1), sos), tokens[:, :-1]], dim=1)
with torch.no_grad():
    nats = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), tokens.flatten())
```"""

CLASSIFIER_USE = """\
```python
import torch
from PIL import Image
from transformers import ImageGPTForImageClassification, ImageGPTImageProcessor

model = ImageGPTForImageClassification.from_pretrained({name!r}).eval()
processor = ImageGPTImageProcessor.from_pretrained({name!r})
picture = Image.new("RGB", ({side}, {side}))  # yours here
tokens = torch.as_tensor(processor(images=picture)["input_ids"][0])[None]
{inputs}
with torch.no_grad():
    label = model.config.id2label[int(model(input_ids=inputs).logits.argmax(1))]
```"""

CLASSIFIER_IDS_USE = """\
```python
import torch
from transformers import ImageGPTForImageClassification

model = ImageGPTForImageClassification.from_pretrained({name!r}).eval()
tokens = torch.zeros((1, {n_ctx}), dtype=torch.long)  # the palette ids of your picture here
{inputs}
with torch.no_grad():
    label = model.config.id2label[int(model(input_ids=inputs).logits.argmax(1))]
```"""

BARE_USE = """\
```python
from transformers import ImageGPTModel

model = ImageGPTModel.from_pretrained({name!r}).eval()  # no prediction head: hidden states only
```"""

CAUSAL_SOS = """\
Position p of the logits predicts pixel p, and sees the pixels before it. The input is therefore one start token and
all pixels but the last: `[{sos}, x_1 .. x_{last}]`, {n_ctx} positions, whose logits are scored against
`x_1 .. x_{n_ctx}`. {adds}`labels=` shifts once more and leaves out the first pixel: compute the loss as
above. `generate` truncates to the 50 likeliest colours unless it is told `top_k=0`, as the generation_config.json here
does."""

SHIFTED_SOS = """\
The classifier was trained on `[{sos}, x_1 .. x_{last}]`: one start token, then all pixels but the last.
{adds}A pipeline that feeds the pixels alone gives other, worse answers: build the input as above."""

PLAIN_SOS = "The classifier was trained on the pixels alone: {ids} are its input as they are."

BARE_SOS = "{adds}The start token is the last row of the embedding, {sos}."

RUN = "The run took {steps:,} steps over {images:,} images."

SQUASHED = """\
Unless they were encoded with `--resize squash`, they were cut to their centre square and scaled, while the processor
here squashes the whole picture: crop before it."""

NO_PALETTE = """\
The model reads ids of a palette of {sos} colours that was not recorded, so no image processor
(preprocessor_config.json) is here: turn pictures into ids with the palette that the training data had."""

IMPORTED = "The weights came from elsewhere: how they were trained is not recorded here."


def model_card(
    name: str,
    shape: Mapping[str, Any],
    side: int,
    known: bool,
    manifest: Mapping[str, Any],
    weights: str,
    parameters: int,
    recipe: str,
    measured: Iterable[tuple[str, Mapping[str, Any]]],
) -> str:
    """Markdown with a YAML header.

    `side` is of the pictures; `known` says whether their palette is: else there is no processor.
    `shape` and `parameters` are of what is exported, `manifest` is the checkpoint's, which may have one head more.
    `weights` names the set of weights, `recipe` is config.yaml, `measured` the numbers of these weights by the data's
    name.
    """
    v, summary = shape["n_vocab"], manifest["summary"]
    colours = (
        "the nearest of the palette's colours (`clusters` of preprocessor_config.json)" if known else "a palette id"
    )
    task, use = _use(name, shape, side, known)
    rows = list(_measured(measured, shape))
    best = _best(summary.get("best") or {}, weights, shape)
    parts = [
        _header(name, task, rows),
        f"# {markdown(name)}",
        f"An Image GPT over {side}x{side} pictures in a palette of {v} colours: {shape['n_layer']} layers, "
        f"width {shape['d_model']}, {shape['n_head']} heads, {parameters:,} parameters (without the zero "
        f"biases that this form carries). Each pixel is one token, {colours}, in raster order.",
        *([] if known else [NO_PALETTE.format(sos=v)]),
        "## How to use",
        use,
        "## Recipe",
        f"Made by {code_span('pixseq ' + manifest['stage'])} {markdown(manifest['version'])}, "
        f"content id {code_span(manifest['id'])}{_part(summary, weights, shape)}, with",
        code_block(recipe, "yaml"),
        "## Data",
        "\n".join(
            f"- {markdown(role)}: {markdown(Path(str(parent.get('path'))).name)}, id {code_span(parent.get('id'))}"
            for role, parent in manifest["inputs"].items()
        ),
        _run(summary, known),
        "## Metrics",
        _table([*best, *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def _use(name: str, shape: Mapping[str, Any], side: int, known: bool) -> tuple[str, str]:
    """The hub's name of what the model does, and how to use it: code, then where the start token stands."""
    v, n_ctx = shape["n_vocab"], shape["n_ctx"]
    facts = {"name": name, "sos": v, "n_ctx": n_ctx, "last": n_ctx - 1, "total": n_ctx + 1, "side": side}
    facts["adds"] = "The processor adds no start token. " if known else ""
    facts["ids"] = "the processor's `input_ids`" if known else "palette ids"
    if shape["head"]:
        task, use, sos = "unconditional-image-generation", CAUSAL_USE if known else CAUSAL_IDS_USE, CAUSAL_SOS
    elif shape["n_classes"]:
        task, use = "image-classification", CLASSIFIER_USE if known else CLASSIFIER_IDS_USE
        sos = SHIFTED_SOS if shape["shifted"] else PLAIN_SOS
        start = f"torch.cat([torch.full((1, 1), {v}), tokens[:, :-1]], dim=1)"
        facts["inputs"] = f"inputs = {start if shape['shifted'] else 'tokens'}"
    else:
        task, use, sos = "image-feature-extraction", BARE_USE, BARE_SOS
    return task, f"{use.format(**facts)}\n\n{sos.format(**facts)}"


def _run(summary: Mapping[str, Any], processed: bool) -> str:
    if not all(isinstance(summary.get(key), int) for key in ("steps", "images")):
        return IMPORTED
    return RUN.format(**summary) + (f" {SQUASHED}" if processed else "")


def _part(summary: Mapping[str, Any], weights: str, shape: Mapping[str, Any]) -> str:
    """What of the checkpoint is exported, where it is not all of it."""
    some = (
        ""
        if weights == "model"
        else f", its weights {code_span(weights)} of id {code_span(summary['weights'][weights])}"
    )
    if summary["shape"].get("head", True) and not shape["head"]:
        return f"{some} without the prediction head"
    if summary["shape"]["n_classes"] and not shape["n_classes"]:
        return f"{some} without the classifier"
    return some


def _fits(key: str, shape: Mapping[str, Any]) -> bool:
    """Whether a number is of a head that is exported."""
    return bool(shape["n_classes"] if "accuracy" in key else shape["head"])


def _best(best: Mapping[str, Any], weights: str, shape: Mapping[str, Any]) -> Iterator[Row]:
    """The best validation of training. It is not always that of the weights exported, which may be the last."""
    start = "ema_val_" if weights == "ema" else "val_"
    joint = "val_accuracy" in best  # the loss is then that of both heads, and says nothing of one
    for key, value in best.items():
        number = isinstance(value, int | float)
        if number and key.startswith(start) and _fits(key, shape) and not (joint and "loss" in key):
            yield f"validation while training, best at step {best['step']}", key, value


def _measured(measured: Iterable[tuple[str, Mapping[str, Any]]], shape: Mapping[str, Any]) -> Iterator[Row]:
    for on, numbers in measured:
        for key, value in numbers.items():
            if isinstance(value, float) and _fits(key, shape):
                yield on, key, value


def _table(rows: list[Row]) -> str:
    if not rows:
        return "None were measured."
    cells = [(markdown(on), markdown(key), f"{value:.6g}") for on, key, value in rows]
    return "\n".join(["| on | metric | value |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)])


def _header(name: str, task: str, rows: Iterable[Row]) -> str:
    """The YAML that the hub reads, with the numbers that are surely of these weights."""
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["image-gpt", "pixseq"]}
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": shown(on), "type": shown(on)},
            "metrics": [{"type": shown(key), "value": float(f"{value:.6g}")}],
        }
        for on, key, value in rows
    ]
    if results:
        content["model-index"] = [{"name": shown(name), "results": results}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)}---"
