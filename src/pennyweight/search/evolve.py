"""The evolutionary baseline (after EvoPress, arXiv:2410.14649): mutate a choice inside the budget, keep what is better.

Unlike the others it may look at the *true* loss of whole children instead of a sum of scores: give `evaluate`. That
costs one forward pass per child, which is why it is a baseline and a last polish rather than the main search.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from pennyweight.search import Problem, Solution, mip, solution

EVALUATES = True  # wants to be given `evaluate`, which measures whole children


def solve(
    problem: Problem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    evaluate: Callable[[tuple[int, ...]], float] | None = None,
    evaluations: int = 400,
    start: tuple[int, ...] | None = None,
) -> Solution:
    """The best of `evaluations` children, starting from `start` (default: the exact search's choice).

    `evaluate(choice)` is what is minimised; None means the sum of scores. Equal seeds give equal choices as long as
    the time limit does not cut in. Raises Infeasible as the exact search does.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    measure = evaluate or problem.score
    best = start or mip.solve(problem, time_limit_s=time_limit_s).choice
    best_value, seen = measure(best), {best}
    for _ in range(evaluations):
        if time.perf_counter() - started > time_limit_s:
            break
        child = _mutate(problem, best, rng)
        if child in seen or not problem.allows(child):
            continue
        seen.add(child)
        value = measure(child)
        if value < best_value:
            best, best_value = child, value
    return solution(problem, best, optimal=False, seconds=time.perf_counter() - started)


def _mutate(problem: Problem, parent: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """Level switch: one to three slots get other variants, then others give way until the budget holds again.

    May come back over the budget, if no slot that was tried could give enough.
    """
    child = list(parent)
    for i in rng.choice(len(child), size=min(len(child), int(rng.integers(1, 4))), replace=False):
        child[i] = int(rng.integers(len(problem.scores[i])))
    for i in rng.permutation(len(child)):
        over = problem.spent(tuple(child)) - problem.limits
        if (over <= 0).all():
            break
        bound = int((over / np.maximum(np.abs(problem.limits), 1e-12)).argmax())
        spent = problem.costs[i][:, bound]
        cheaper = np.flatnonzero(spent < spent[child[i]])
        if len(cheaper):
            child[i] = int(rng.choice(cheaper))
    return tuple(child)
