"""The random baseline: a uniformly drawn choice, pulled inside the budget by random cheaper swaps."""

from __future__ import annotations

import time

import numpy as np

from pennyweight.search import Infeasible, Problem, Solution, solution


def solve(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0) -> Solution:
    """A feasible choice that uses the budget but no scores: draw, move random slots down until every bound holds,
    then random slots up while it still does. Equal seeds give equal choices. Raises Infeasible after the time limit."""
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    while time.perf_counter() - started < time_limit_s:
        choice = draw(problem, rng)
        if choice is not None and problem.allows(choice):
            return solution(problem, choice, optimal=False, seconds=time.perf_counter() - started)
    raise Infeasible(None, None, None, f"random search found no feasible choice in {time_limit_s:g} s")


def draw(problem: Problem, rng: np.random.Generator) -> tuple[int, ...] | None:
    """One random choice inside the limits that spends what it can, or None if the walk down got stuck."""
    scale = np.where(problem.limits == 0, 1.0, np.abs(problem.limits))
    choice = [int(rng.integers(len(score))) for score in problem.scores]
    spent = problem.spent(tuple(choice))

    def overdraft(spent: np.ndarray) -> float:
        return float(np.maximum(spent / scale - problem.limits / scale - 1e-9, 0).sum())

    slots = len(choice)
    for _ in range(200 * slots):
        if not overdraft(spent):
            break
        i = int(rng.integers(slots))
        v = int(rng.integers(len(problem.scores[i])))
        moved = spent + problem.costs[i][v] - problem.costs[i][choice[i]]
        if overdraft(moved) < overdraft(spent):
            choice[i], spent = v, moved
    if overdraft(spent):
        return None
    for _ in range(20 * slots):
        i = int(rng.integers(slots))
        v = int(rng.integers(len(problem.scores[i])))
        moved = spent + problem.costs[i][v] - problem.costs[i][choice[i]]
        if not overdraft(moved) and moved.sum() > spent.sum():
            choice[i], spent = v, moved
    return tuple(choice)
