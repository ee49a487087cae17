"""How many tokens an image has, so that a forecast can count images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixseq.studies.fits import OpenFit


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens an image has: those of the study, by resolution, or so many a pixel, given or taken as 1."""

    studied: Mapping[int, float]
    per_pixel: float | None

    @classmethod
    def of(cls, opened: OpenFit, per_pixel: float | None) -> ImageTokens:
        known = opened.whole.tokens_per_image or {}
        return cls({} if per_pixel else {int(side): float(count) for side, count in known.items()}, per_pixel)

    def tokens(self, resolution: int) -> float:
        """At a resolution not studied, as many a pixel as at the nearest one that was."""
        if not self.studied:
            return (self.per_pixel or 1.0) * resolution**2
        near = min(self.studied, key=lambda side: abs(math.log(side / resolution)))
        return self.studied[near] * (resolution / near) ** 2

    def text(self, resolutions: Sequence[int]) -> str:
        if self.studied:
            at = ", ".join(f"{self.tokens(side):.6g} at {side}x{side}" for side in dict.fromkeys(resolutions))
            return f"images are tokens / tokens an image, as in the study ({at})"
        if self.per_pixel:
            return f"images are tokens / ({self.per_pixel:.4g} resolution^2), as given"
        return (
            "images are tokens / resolution^2, one token a pixel, since the fit does not say (rgb has 3, patches of p "
            "pixels 1 / p^2: --tokens-per-pixel)"
        )
