"""What a score on a part of the text says of the score on all of it.

Texts differ in how much they show damage, and mostly all choices alike. So a sum over the first stretches of text is
carried over to the whole by the ratio that those choices have which were scored on both: their geometric mean, of the
same slot if it has any (ratios of a sum would be those of the worst choice). And how sure it is goes by what the
stretches of one choice vary beside those of all, in pairs: a stretch where everything loses much tells nothing apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pennyweight.model.slots import Slot


@dataclass(frozen=True)
class Estimate:
    """Mean over the whole text, and the standard error of that: 0 if all of it was scored."""

    mean: float
    error: float


Stretches = Mapping[Slot, Mapping[str, np.ndarray]]
"""By slot and choice, sums over the first stretches of the text, as many as were scored."""


def estimates(sums: Stretches, tokens: Sequence[int]) -> dict[Slot, dict[str, Estimate]]:
    """The mean per token of every choice. `tokens`: of each stretch of the whole text. Sums are not negative; an
    estimate of fewer than two stretches has an infinite error."""
    counts = np.asarray(tokens, dtype=float)
    usual: dict[int, np.ndarray] = {}

    def profile(part: int) -> np.ndarray:
        """What a stretch of a part loses beside the mean of the part, on average of all choices."""
        if part not in usual:
            own = [found[:part] / counts[:part] for of in sums.values() for found in of.values() if len(found) >= part]
            shares = [each / each.mean() for each in own if each.mean() > 0]
            usual[part] = np.mean(shares, axis=0) if shares else np.ones(part)
        return usual[part]

    def ratios(of: Mapping[str, np.ndarray], part: int) -> list[float]:
        """log(mean of all / mean of the part), of choices that were scored on both."""
        whole = [found for found in of.values() if len(found) == len(counts) and found[:part].sum() > 0]
        scale = math.log(counts[:part].sum() / counts.sum())
        return [math.log(found.sum() / found[:part].sum()) + scale for found in whole]

    def estimate(slot: Slot, found: np.ndarray) -> Estimate:
        part = len(found)
        mean = float(found.sum() / counts[:part].sum())
        if part == len(counts):
            return Estimate(mean, 0.0)
        known = ratios(sums[slot], part) or [each for of in sums.values() for each in ratios(of, part)]
        carried = math.exp(float(np.mean(known))) if known else 1.0
        if part < 2:
            return Estimate(carried * mean, math.inf)
        beside = found / counts[:part] - mean * profile(part)
        error = math.sqrt(float(beside.var(ddof=1)) / part * (1 - part / len(counts)))
        return Estimate(carried * mean, carried * error)

    return {slot: {key: estimate(slot, found) for key, found in of.items()} for slot, of in sums.items()}
