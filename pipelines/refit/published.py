"""Runs on a published loss surface as a CSV: `published.py NAME [NOISE]`, noise as a share of the loss.

Nine budgets of 6e18 to 3e21 FLOPs with nine sizes each, 6 N D counted, as in Hoffmann et al. 2022.
"""

import csv
import sys

import numpy as np

# E, A, alpha, B, beta of L = E + A / N^alpha + B / D^beta
SURFACES = {
    "hoffmann": (1.69, 406.4, 0.34, 410.7, 0.28),  # Chinchilla's Approach 3
    "epoch": (1.817, 477.8, 0.347, 2143.9, 0.367),  # its refit in arXiv 2404.10102
}


def main(name: str, noise: float) -> None:
    E, A, alpha, B, beta = SURFACES[name]
    rng = np.random.default_rng(0)
    rows = csv.writer(sys.stdout)
    rows.writerow(["params", "tokens", "flops", "loss"])
    for flops in np.geomspace(6e18, 3e21, 9):
        best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
        for params in best * np.geomspace(0.25, 4, 9):
            tokens = flops / (6 * params)
            loss = (E + A * params**-alpha + B * tokens**-beta) * np.exp(noise * rng.standard_normal())
            rows.writerow([params, tokens, flops, loss])


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
