"""The last line of a stage that makes an artifact: what came out, from its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pixseq.progress import clock

Summary = Mapping[str, Any]

CONVERTED = {  # what is counted of pictures that did not stay as they were
    "exif_rotated": "turned as EXIF says",
    "alpha_composited": "transparent, on --background",
    "animated_first_frame": "animated, the first frame",
    "cmyk": "CMYK",
    "sixteen_bit": "of 16 bits",
}


def in_brief(manifest: Mapping[str, Any]) -> str | None:
    """None where the path says it all, or the summary, of another version's run that was finished, tells less."""
    stage = manifest.get("stage")
    try:
        return f"{stage}: {BRIEFS[stage](manifest['summary'])}" if stage in BRIEFS else None
    except (KeyError, TypeError, ValueError):
        return None


def _palette(summary: Summary) -> str:
    signal = summary["psnr_db"]  # none where no pixel changes
    decibel = "" if signal is None else f" ({signal:.1f} dB)"
    fitted = f"{summary['colors']:,} colours for {summary['pixels']:,} pixels"
    return f"{fitted}, mean squared error {summary['mse']:.1f}{decibel}"


def _encoded(summary: Summary) -> str:
    rows, images = summary["rows"], summary.get("images")
    of = f" of {_count(images, 'image')}" if images not in (None, rows) else ""
    if met := [f"{summary[key]:,} {what}" for key, what in CONVERTED.items() if key in summary]:
        of += f" (converted: {'; '.join(met)})"
    if (entropy := summary.get("unigram_nats_per_token")) is None:
        return f"{_count(rows, 'picture')}{of}"
    tokens = f"{_count(rows, 'row')} of {summary['tokens_per_row']:,} tokens{of}"
    return f"{tokens}; a model has to beat their unigram entropy, {entropy:.3f} nats a token"


def _trained(summary: Summary) -> str:
    steps = f"{_count(summary['steps'], 'step')} in {clock(summary['training_seconds'])}"
    early = ", stopped early" * bool(summary["stopped_early"])
    best = summary["best"]
    if best is None:
        return f"{steps}{early}; without --val or --val-fraction nothing tells how good it is"
    figures = ", ".join(f"{name} {best[name]:.4f}" for name in ("val_accuracy", "val_loss") if name in best)
    return f"{steps}{early}; best at step {best['step']:,}: {figures}"


def _features(summary: Summary) -> str:
    layers, rows = _count(summary["layers"], "layer"), _count(summary["rows"], "row")
    return f"{layers} of width {summary['width']:,} of {rows}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


BRIEFS: dict[str, Callable[[Summary], str]] = {
    "palette fit": _palette,
    "encode": _encoded,
    "pretrain": _trained,
    "finetune": _trained,
    "features": _features,
}
