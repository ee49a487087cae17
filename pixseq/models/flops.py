"""Training floating point operations a token, by the conventions in use for scaling laws.

exact: 6 for each weight of a matrix product, and attention over all T^2 pairs, as the PaLM and Chinchilla papers
count. exact-causal: a causal model's attention in half, as its kernels compute it. 6nd: 6 a parameter, without
attention, which is far off for long sequences of narrow models: the ratio to exact is 1 + T / (6 D).
"""

from __future__ import annotations

COUNTINGS = ("exact", "exact-causal", "6nd")
COUNTING = COUNTINGS[0]  # wherever none is named


def training_flops(
    counting: str, parameters: int, multiplied: int, n_layer: int, d_model: int, n_ctx: int, causal: bool
) -> int:
    """`multiplied` of the `parameters` stand in matrix products; embeddings that are looked up do not."""
    if counting == "6nd":
        return 6 * parameters
    half = causal and counting == "exact-causal"
    return 6 * multiplied + n_layer * d_model * n_ctx * (6 if half else 12)
