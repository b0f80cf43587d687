"""The greedy baseline of Puzzle (arXiv:2411.19146): equal budget for every slot, easiest slots first, leftovers roll
over. Fast, and blind to trading between slots."""

from __future__ import annotations

import time

import numpy as np

from pennyweight.search import Infeasible, Problem, Solution, solution


def solve(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0) -> Solution:
    """Slots by ascending mean score take the best variant within an equal share of what is left of every limit, or,
    if nothing fits the share, the variant that overdraws it least while the rest can still be paid for.

    Raises Infeasible if it paints itself into a corner (the exact search may still find a choice).
    """
    started = time.perf_counter()
    cheapest = [cost.min(axis=0) for cost in problem.costs]
    left = problem.limits.astype(float).copy()
    order = sorted(range(len(problem.scores)), key=lambda i: (problem.scores[i].mean(), i))
    scale = np.where(problem.limits == 0, 1.0, np.abs(problem.limits))
    choice = [0] * len(order)
    for position, i in enumerate(order):
        share = left / (len(order) - position)
        reserve = np.sum([cheapest[j] for j in order[position + 1 :]], axis=0) if position + 1 < len(order) else 0.0
        payable = (problem.costs[i] <= left - reserve + 1e-9 * scale).all(axis=1)
        if not payable.any():
            raise Infeasible(None, None, None, f"greedy search found nothing payable for slot {i}")
        fits = payable & (problem.costs[i] <= share + 1e-9 * scale).all(axis=1)
        if fits.any():
            choice[i] = int(np.where(fits, problem.scores[i], np.inf).argmin())
        else:
            over = ((problem.costs[i] - share) / scale).max(axis=1)
            choice[i] = int(np.where(payable, over, np.inf).argmin())
        left = left - problem.costs[i][choice[i]]
    if not problem.allows(tuple(choice)):
        raise Infeasible(None, None, None, "greedy search ended on a choice too close to an earlier one")
    return solution(problem, tuple(choice), optimal=False, seconds=time.perf_counter() - started)
