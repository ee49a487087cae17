"""What a batch of pictures, or of palette ids, becomes in a scheme (section 3.2), and what encode counts of it.

Shapes: n rows of a batch (images, or views of them), T tokens a row, V values a token may have, S the side in pixels, P
the pixels of n whole pictures together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pixseq.data.described import COUNTED_LABELS

if TYPE_CHECKING:
    import numpy as np

    from pixseq.artifacts.codec import Codec
    from pixseq.data.images import ImageBatch
    from pixseq.data.token_files import TokenBatch


class Encoded(NamedTuple):
    """What one batch became.

    `rows` are tokens uint16 [n, T] or pixels uint8 [n, S, S, 3]; of whole pictures pixels [P, 3], with `shapes` [n, 2].
    `counts` says how often each number occurs in them: [V] of tokens; of pixels [3 * 256], red's bytes, green's,
    blue's. The error is that of the tokens' colours, None where nothing was rounded to a colour or there is no picture
    to compare with.
    """

    rows: np.ndarray
    counts: np.ndarray
    squared_error: float | None
    shapes: np.ndarray | None = None

    @property
    def n_rows(self) -> int:
        return len(self.rows if self.shapes is None else self.shapes)


def encoder(codec: Codec) -> Callable[[ImageBatch], Encoded]:
    """What makes of a batch of pictures the numbers of the codec's scheme."""
    import numpy as np

    from pixseq.numerics.quantize import byte_counts, nearest_table, squared_error, to_tokens

    if codec.kind == "pixels":
        return lambda batch: Encoded(batch.images, byte_counts(batch.images), None, batch.shapes)
    colors = codec.colors
    table = None if codec.palette is None else nearest_table(np.array(codec.palette))

    def encoded(batch: ImageBatch) -> Encoded:
        tokens = to_tokens(batch.images, codec.scheme, table)
        return counted(tokens, codec, 0.0 if colors is None else squared_error(batch.images, tokens, colors))

    return encoded


def counted(tokens: np.ndarray, codec: Codec, error: float | None) -> Encoded:
    """Tokens uint16 [n, T] with how often each of them occurs."""
    from pixseq.numerics.quantize import token_counts

    return Encoded(tokens, token_counts(tokens, codec.n_vocab or 0), error)


@dataclass(frozen=True)
class Tally:
    """What has been encoded so far. Saved with the chunks, so that a resumed run reports what a whole one would.

    `image` source images were used up and gave `rows` rows; `met` is what the reader met on the way. `counts` and the
    error are the sums of those of Encoded; `classes` counts the labels.
    """

    image: int = 0
    rows: int = 0
    squared_error: float | None = 0.0
    met: dict[str, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def plus(
        self, batch: ImageBatch | TokenBatch, new: Encoded, met: dict[str, int], class_names: list[str] | None
    ) -> Tally:
        import numpy as np

        labels = [] if batch.labels is None else np.minimum(batch.labels, COUNTED_LABELS - 1)
        return Tally(
            image=batch.stop,
            rows=self.rows + new.n_rows,
            squared_error=None if new.squared_error is None else (self.squared_error or 0.0) + new.squared_error,
            met=met,
            counts=_added(self.counts, new.counts),
            classes=_added(self.classes, np.bincount(labels, minlength=len(class_names or ()))),
        )

    def summary(self, codec: Codec) -> dict[str, Any]:
        import numpy as np

        from pixseq.numerics.quantize import channel_statistics, psnr_db, unigram_entropy

        counts = np.array(self.counts)
        if codec.kind == "pixels":
            mean, std = channel_statistics(counts)
            spread = {"channel_mean": [round(x, 6) for x in mean], "channel_std": [round(x, 6) for x in std]}
            return {**self.met, "rows": self.rows, **spread}
        mse = None
        if self.squared_error is not None:
            height, width, _ = codec.grid
            mse = round(self.squared_error / (self.rows * height * width), 6)
        return {
            **self.met,
            "rows": self.rows,
            "tokens_per_row": int(counts.sum()) // self.rows,
            "n_vocab": codec.n_vocab,
            "distinct_tokens": int(np.count_nonzero(counts)),
            "unigram_nats_per_token": round(unigram_entropy(counts), 6),
            "mse": mse,
            "psnr_db": psnr_db(mse) if mse else None,
        }


def _added(counts: list[int], more: np.ndarray) -> list[int]:
    """The sum of both; the shorter one goes on with zeros."""
    return [a + b for a, b in itertools.zip_longest(counts, more.tolist(), fillvalue=0)]
