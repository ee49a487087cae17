"""The words that options, stages and configurations let choose from; each stands once, here."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
Weights = Literal["model", "best", "last", "ema"]

Resize = Literal["crop", "squash", "whole"]
SquareResize = Literal["crop", "squash"]
Filter = Literal["bilinear", "bicubic", "box", "hamming", "lanczos"]
OnError = Literal["fail", "skip"]
Scheme = Literal["palette", "rgb", "gray", "pixels"]
Part = Literal["train", "val"]

Objective = Literal["ar", "bert"]  # of Image GPT
Target = Literal["norm-pixels", "pixels", "codes"]  # of AIM
PretrainingAttention = Literal["causal", "prefix"]  # of AIM
Attention = Literal["causal", "prefix", "bidirectional"]
Augment = Literal["none", "flip", "crop-flip", "resized-crop", "resized-crop-jitter"]

Pool = Literal["mean", "none"]
FeatureType = Literal["float32", "float16"]
ProbeMethod = Literal["logistic", "knn", "attentive"]
LowDataChoice = Literal["subset", "all"]
LogisticSolver = Literal["pixseq", "sklearn"]
Drop = Literal["head", "classifier"]

FitMethod = Literal["varpro", "direct", "isoflop"]
