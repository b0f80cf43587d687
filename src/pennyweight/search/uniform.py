"""The uniform baseline: one treatment for all slots of a kind, as most tools offer (every FFN to half, every matrix
to 4 bits). The best such treatment within the budget, found exactly."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from pennyweight.search import Problem, Solution, mip, solution


def solve(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0) -> Solution:
    """The best choice in which all slots of a group take variants of the same label. Deterministic.

    Raises ValueError if the problem has no labels or a group's slots share none, Infeasible as the exact search does.
    """
    started = time.perf_counter()
    if len(problem.labels) != len(problem.scores) or len(problem.groups) != len(problem.scores):
        raise ValueError("the uniform search needs a label for every variant and a group for every slot")
    groups = sorted(set(problem.groups))
    members = [[i for i, group in enumerate(problem.groups) if group == name] for name in groups]
    shared: list[list[str]] = []
    for name, slots in zip(groups, members, strict=True):
        common = set.intersection(*(set(problem.labels[i]) for i in slots))
        if not common:
            raise ValueError(f"the slots of group {name} have no variant in common")
        shared.append(sorted(common))
    position = [{label: v for v, label in enumerate(labels)} for labels in problem.labels]
    merged = dataclasses.replace(
        problem,
        scores=tuple(
            np.array([sum(problem.scores[i][position[i][label]] for i in slots) for label in labels])
            for slots, labels in zip(members, shared, strict=True)
        ),
        costs=tuple(
            np.array([sum(problem.costs[i][position[i][label]] for i in slots) for label in labels])
            for slots, labels in zip(members, shared, strict=True)
        ),
        different_from=(),
        min_different=0,
        labels=(),
        groups=(),
    )
    best = mip.solve(merged, time_limit_s=time_limit_s)
    choice = [0] * len(problem.scores)
    for slots, labels, v in zip(members, shared, best.choice, strict=True):
        for i in slots:
            choice[i] = position[i][labels[v]]
    return solution(problem, tuple(choice), optimal=False, seconds=time.perf_counter() - started)
