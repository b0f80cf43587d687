"""What every search solves: pick one variant per slot, least total score, sums of costs within limits.

A problem holds plain arrays, so that a search can be checked against brute force and knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Problem:
    """scores[i] (variants of slot i,); costs[i] (variants, bounds); limits (bounds,).

    For every bound k: sum over slots of costs[i][choice[i], k] <= limits[k]; what is spent whatever is chosen has been
    taken off the limits. `different_from` lists earlier choices of which at least `min_different` slots must differ.
    labels[i] names the variants of slot i and groups[i] the slots of its kind; only the uniform search needs them.
    """

    scores: tuple[np.ndarray, ...]
    costs: tuple[np.ndarray, ...]
    limits: np.ndarray
    names: tuple[str, ...]
    different_from: tuple[tuple[int, ...], ...] = ()
    min_different: int = 0
    labels: tuple[tuple[str, ...], ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.costs) or len(self.names) != len(self.limits):
            raise ValueError("scores and costs need one array per slot, names and limits one entry per bound")
        for i, (score, cost) in enumerate(zip(self.scores, self.costs, strict=True)):
            if not len(score) or cost.shape != (len(score), len(self.limits)):
                raise ValueError(f"slot {i}: {len(score)} scores and costs {cost.shape} for {len(self.limits)} bounds")
            if not (np.isfinite(score).all() and np.isfinite(cost).all()):
                raise ValueError(f"slot {i}: scores and costs must be finite numbers")

    def spent(self, choice: tuple[int, ...]) -> np.ndarray:
        """Sum of costs per bound."""
        return np.sum([cost[v] for cost, v in zip(self.costs, choice, strict=True)], axis=0) + np.zeros(
            len(self.limits)
        )

    def score(self, choice: tuple[int, ...]) -> float:
        return float(sum(score[v] for score, v in zip(self.scores, choice, strict=True)))

    def allows(self, choice: tuple[int, ...]) -> bool:
        """Within every limit (to 1e-9 relative, the rounding of sums) and different enough from earlier choices."""
        slack = 1e-9 * np.maximum(1.0, np.abs(self.limits))
        apart = (sum(a != b for a, b in zip(choice, old, strict=True)) for old in self.different_from)
        return bool((self.spent(choice) <= self.limits + slack).all()) and all(d >= self.min_different for d in apart)


@dataclass(frozen=True)
class Solution:
    """choice[i]: index of the variant of slot i. optimal: proven, with relative gap 0."""

    choice: tuple[int, ...]
    score: float
    spent: np.ndarray
    optimal: bool
    seconds: float


@dataclass
class Infeasible(Exception):
    """No choice meets all bounds. `bound` cannot be met (given the others); `nearest` is the least limit that could.

    Both are None if only bounds together with the demand to differ from earlier choices cannot be met.
    """

    bound: str | None
    limit: float | None
    nearest: float | None
    message: str = field(default="")

    def __str__(self) -> str:
        return self.message or f"{self.bound} of {self.limit:g} cannot be met; the least possible is {self.nearest:g}"


def solution(problem: Problem, choice: tuple[int, ...], *, optimal: bool, seconds: float) -> Solution:
    """Check a choice outside the solver that made it. Raises RuntimeError if it breaks a bound."""
    if not problem.allows(choice):
        spent = dict(zip(problem.names, problem.spent(choice), strict=True))
        raise RuntimeError(f"a search returned a choice outside its bounds: spent {spent}, limits {problem.limits}")
    return Solution(choice, problem.score(choice), problem.spent(choice), optimal, seconds)
