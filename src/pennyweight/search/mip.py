"""The exact search: a mixed-integer program solved to a relative gap of zero by HiGHS (scipy.optimize).

x[i, v] = 1 if slot i takes variant v: minimise sum s x, subject to one variant per slot, the bounds, and for every
earlier choice y: sum x y <= slots - min_different (Puzzle, arXiv:2411.19146, equations of its search section).

Departure: the program is solved on a *core* of columns. The linear relaxation gives a bound z and a reduced cost for
every column; a column whose reduced cost exceeds UB - z is in no choice better than UB. So the cheapest columns are
solved first, and their optimum either proves itself or says how many columns to add. 160 slots of 70 variants under
three bounds take 1-2 s on two cores this way, 2-10 s in one piece.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, vstack

from pennyweight.search import Infeasible, Problem, Solution, solution

_CORE_COLUMNS_PER_SLOT = 4
_INFEASIBLE = 2  # status of both linprog and milp


def solve(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0) -> Solution:
    """The best choice, proven. Deterministic; `seed` is not used.

    Raises Infeasible with the binding bound and the nearest value that could be met; RuntimeError if HiGHS finds no
    answer within the time limit. A choice that is feasible but not proven best in time has optimal=False.
    """
    started = time.perf_counter()
    excluded: list[tuple[int, ...]] = []
    while True:
        program = _program(problem, np.concatenate(problem.scores), problem.limits, excluded)
        answer = _solve(program, time_limit_s)
        if answer is None:
            raise _explain(problem, time_limit_s)
        columns, proven = answer
        choice = _choice(problem, columns)
        if problem.allows(choice):
            return solution(problem, choice, optimal=proven, seconds=time.perf_counter() - started)
        # HiGHS lets a bound be passed by 1e-6 of itself, a budget in bytes does not: forbid this choice, go on.
        excluded.append(choice)
        if time.perf_counter() - started > time_limit_s:
            raise RuntimeError(f"{len(excluded)} choices in a row were over a bound by rounding; loosen it slightly")


@dataclass(frozen=True)
class _Program:
    """minimise objective x; one_each x = 1; rows x <= upper; x binary. Scaled: see _program."""

    objective: np.ndarray
    one_each: csr_matrix
    rows: csr_matrix
    upper: np.ndarray
    slot_of: np.ndarray
    slots: int


def _program(
    problem: Problem, objective: np.ndarray, limits: np.ndarray, excluded: Sequence[tuple[int, ...]] = ()
) -> _Program:
    sizes = [len(score) for score in problem.scores]
    slot_of = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.arange(len(slot_of))
    bounded = np.isfinite(limits)
    spent = np.concatenate(problem.costs).T[bounded]
    # HiGHS's tolerances are absolute: rows are brought near 1 (bytes dwarf seconds), the objective up to 1e6, or a
    # choice worse by 1e-6 nats would count as equal.
    row_scale = np.maximum(np.abs(limits[bounded]), np.abs(spent).max(axis=1, initial=0)) + 1e-300
    rows, upper = [csr_matrix(spent / row_scale[:, None])], [limits[bounded] / row_scale]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    cuts = [(old, problem.min_different) for old in problem.different_from] + [(old, 1) for old in excluded]
    for old, min_different in cuts:
        row = csr_matrix(
            (np.ones(len(sizes)), (np.zeros(len(sizes), int), offsets + np.asarray(old))), (1, len(columns))
        )
        rows.append(row)
        upper.append(np.array([float(len(sizes) - min_different)]))
    return _Program(
        objective=objective * _scale(objective),
        one_each=csr_matrix((np.ones(len(columns)), (slot_of, columns))),
        rows=csr_matrix(vstack(rows)),
        upper=np.concatenate(upper),
        slot_of=slot_of,
        slots=len(sizes),
    )


def contenders(
    problem: Problem, lower: Sequence[np.ndarray], *, time_limit_s: float = 60.0
) -> tuple[Solution, tuple[np.ndarray, ...]]:
    """The best choice, and for every variant of every slot whether it could be in one as good if its own score were
    less by what `lower` (of the shape of the scores) says: if its reduced cost, so lowered, is within the gap between
    the best choice and the linear bound. Raises as `solve` does."""
    best = solve(problem, time_limit_s=time_limit_s)
    scores = np.concatenate(problem.scores)
    program = _program(problem, scores, problem.limits)
    relaxed = _relaxed(program)
    assert relaxed is not None
    bound, reduced = relaxed
    scale = _scale(scores)
    least = reduced - scale * np.concatenate(lower)
    able = least <= max(0.0, scale * best.score - bound) * (1 + 1e-9) + 1e-6
    ends = np.cumsum([len(score) for score in problem.scores])[:-1]
    return best, tuple(np.split(able, ends))


def _scale(objective: np.ndarray) -> float:
    span = np.abs(objective).max(initial=0)
    return 1e6 / span if span > 0 else 1.0


def _relaxed(program: _Program) -> tuple[float, np.ndarray] | None:
    """(optimum of the linear relaxation, reduced cost of every column), scaled; None if infeasible."""
    relaxed: Any = linprog(
        program.objective,
        A_ub=program.rows if len(program.upper) else None,
        b_ub=program.upper if len(program.upper) else None,
        A_eq=program.one_each,
        b_eq=np.ones(program.slots),
        bounds=(0, None),
        method="highs",
    )
    if relaxed.status == _INFEASIBLE:
        return None
    if relaxed.x is None:
        raise RuntimeError(f"HiGHS could not solve the linear relaxation: {relaxed.message}")
    reduced = program.objective - relaxed.eqlin.marginals[program.slot_of]
    if len(program.upper):
        reduced = reduced - program.rows.T @ relaxed.ineqlin.marginals
    return float(relaxed.fun), reduced


def _solve(program: _Program, time_limit_s: float) -> tuple[np.ndarray, bool] | None:
    """(chosen columns, proven optimal), or None if infeasible."""
    relaxed = _relaxed(program)
    if relaxed is None:
        return None
    bound, reduced = relaxed
    gap = float(np.sort(reduced)[min(len(reduced) - 1, _CORE_COLUMNS_PER_SLOT * program.slots)])
    deadline = time.perf_counter() + time_limit_s
    while True:
        core = np.flatnonzero(reduced <= gap * (1 + 1e-9) + 1e-6)
        whole = len(core) == len(reduced)
        result: Any = milp(
            program.objective[core],
            constraints=[
                LinearConstraint(program.one_each[:, core], 1, 1),
                LinearConstraint(program.rows[:, core], -np.inf, program.upper),  # pyright: ignore[reportArgumentType]
            ],
            integrality=np.ones(len(core)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": max(0.1, deadline - time.perf_counter())},
        )
        late = time.perf_counter() > deadline
        if result.x is None:
            if whole and result.status == _INFEASIBLE:
                return None
            if late:
                raise RuntimeError(f"HiGHS gave no choice within {time_limit_s:g} s: {result.message}")
            gap = np.inf if gap <= 0 else 4 * gap
            continue
        needed = result.fun - bound
        if needed <= gap or whole or late:
            return core[result.x > 0.5], result.status == 0 and (needed <= gap or whole)
        gap = needed


def _choice(problem: Problem, columns: np.ndarray) -> tuple[int, ...]:
    starts = np.concatenate([[0], np.cumsum([len(score) for score in problem.scores])[:-1]])
    return tuple(int(column - start) for column, start in zip(columns, starts, strict=True))


def _explain(problem: Problem, time_limit_s: float) -> Infeasible:
    """Find the bound to blame: one that fails given the others, else one of several that fail even alone."""
    slack = 1e-9 * np.maximum(1.0, np.abs(problem.limits))
    for k in range(len(problem.limits)):
        others = problem.limits.copy()
        others[k] = np.inf
        answer = _solve(_program(problem, np.concatenate([cost[:, k] for cost in problem.costs]), others), time_limit_s)
        if answer is not None:
            nearest = float(problem.spent(_choice(problem, answer[0]))[k])
            if nearest > problem.limits[k] + slack[k]:
                return Infeasible(problem.names[k], float(problem.limits[k]), nearest)
    alone = np.array([sum(cost[:, k].min() for cost in problem.costs) for k in range(len(problem.limits))])
    for k in np.flatnonzero(alone > problem.limits + slack):
        return Infeasible(problem.names[k], float(problem.limits[k]), float(alone[k]))
    if problem.different_from:
        return Infeasible(None, None, None, "no further choice differs enough from the earlier ones within the bounds")
    return Infeasible(None, None, None, "the bounds cannot be met together; loosen at least two of them")
