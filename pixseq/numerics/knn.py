"""k nearest neighbours: DINO's weighted vote by cosine (Caron et al. 2021, appendix F.1), which fits nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pixseq.numerics.labelled import Labelled
from pixseq.numerics.voting import tally

NEIGHBOURS = 20
TEMPERATURE = 0.07
CELLS_AT_ONCE = 1 << 23  # of a table of rows against other rows


def knn_predict(
    train: Labelled,
    queries: np.ndarray,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    advance: Callable[[int], None] = lambda rows: None,
    device: str = "cpu",
) -> np.ndarray:
    """The class of each query row: its k nearest rows by cosine vote with weight exp(cosine / temperature).

    `advance` hears of rows that are done. Raises ValueError if train has fewer than k rows. Blocks of queries meet
    blocks of rows on `device`: CELLS_AT_ONCE cosines and eight times as many features, whatever the labels are.
    """
    import torch

    rows, width = train.X.shape
    if k > rows:
        raise ValueError(f"k is {k}, but there are only {rows} training rows")
    classes, labels = np.unique(train.row_labels, return_inverse=True)
    here = min(rows, max(k, 8 * CELLS_AT_ONCE // width))  # rows of a block
    block = max(1, CELLS_AT_ONCE // max(here, width, len(classes)))

    def unit(X: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(X).to(device), eps=float(np.finfo(np.float32).tiny))

    known = unit(train.X) if rows == here else None
    predictions = np.empty(len(queries), classes.dtype)
    for start in range(0, len(queries), block):
        asked = unit(queries[start : start + block])
        cosines = torch.empty(len(asked), 0, device=device)
        nearest = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for first in range(0, rows, here):
            part = unit(train.X[first : first + here]) if known is None else known
            best, which = (asked @ part.T).topk(min(k, len(part)))
            cosines, nearest = torch.cat([cosines, best], 1), torch.cat([nearest, which + first], 1)
            cosines, which = cosines.topk(min(k, cosines.shape[1]))
            nearest = nearest.gather(1, which)
        weights = torch.exp(cosines.double() / temperature).cpu().numpy()
        votes = tally(labels[nearest.cpu().numpy()], weights, len(classes))
        predictions[start : start + block] = classes[votes.argmax(axis=1)]
        advance(len(asked))
    return predictions
