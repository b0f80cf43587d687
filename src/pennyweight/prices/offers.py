"""What each slot can become: choices that combine one spec per axis, with their costs and scores, as a search problem.

A combination's cost is exact: it is computed from the shape that results. Its score is the sum of its specs' scores,
each measured alone. Combinations that another one beats on every count are dropped; that changes no optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pennyweight import formats, kinds, variants
from pennyweight.disk.tensors import header_bytes
from pennyweight.model.blocks import Block
from pennyweight.model.choices import PARENT, Choice
from pennyweight.model.demand import Budget, Demand, Workload, batches
from pennyweight.model.shapes import Shape, Shapes
from pennyweight.model.slots import Slot
from pennyweight.prices.cost import Cost, Seconds, price
from pennyweight.prices.memory import workspace_bytes
from pennyweight.search import Infeasible, Problem
from pennyweight.units import show_bytes, show_seconds


def single_choices(shape: Shape, axes: Sequence[str], *, scored_tokens: int) -> list[Choice]:
    """One choice per spec that the axes offer for a shape: what has to be scored.

    A window of more than half the scored text is left out: a text that hardly reaches beyond it cannot tell its harm.
    """
    found = []
    for axis in (axis for axis in variants.order() if axis in axes):
        module = kinds.load("variants", axis)
        for spec in module.options(shape):
            window = module.reshape(shape, spec).window
            if window in (None, shape.window) or window <= scored_tokens // 2:
                found.append(Choice(((axis, spec),)))
    return found


def combinations(shape: Shape, scored: Mapping[str, float]) -> Iterator[tuple[Choice, Shape, float]]:
    """Every way to combine scored specs, at most one per axis: (choice, resulting shape, summed score).

    `scored` maps Choice.key() of single choices to scores. The parent's own comes first, with score 0.
    """

    def extend(
        choice: Choice, current: Shape, score: float, axes: Sequence[str]
    ) -> Iterator[tuple[Choice, Shape, float]]:
        if not axes:
            yield choice, current, score
            return
        yield from extend(choice, current, score, axes[1:])
        module = kinds.load("variants", axes[0])
        for spec in module.options(current):
            single = Choice(((axes[0], spec),))
            if single.key() in scored:
                longer = Choice((*choice.specs, (axes[0], spec)))
                yield from extend(longer, module.reshape(current, spec), score + scored[single.key()], axes[1:])

    yield from extend(PARENT, shape, 0.0, variants.order())


def all_shapes(shapes: Shapes, axes: Sequence[str], *, scored_tokens: int) -> set[Shape]:
    """Every shape that any combination of the axes' specs can give any slot."""
    found: set[Shape] = set()
    for shape in set(shapes.values()):
        free = {choice.key(): 0.0 for choice in single_choices(shape, axes, scored_tokens=scored_tokens)}
        found |= {resulting for _, resulting, _ in combinations(shape, free)}
    return found


@dataclass(frozen=True)
class Offer:
    """One thing a slot can become. file_bytes: its tensors and their entries in the safetensors header. also: what it
    costs under each further demand."""

    choice: Choice
    shape: Shape
    score: float
    cost: Cost
    file_bytes: int
    also: tuple[Cost, ...] = ()

    @property
    def resident_bytes(self) -> float:
        """What of them is in memory while the model runs."""
        return self.cost.resident_bytes


def file_bytes(block: Block) -> int:
    """Bytes the slot adds to the written files: tensors, and an upper bound on their header entries."""
    weights = block.tensors()
    for whole, parts in formats.joined_in(block).items():
        first, *others = (weights.pop(f"{part}.weight") for part in parts)
        rows = first.shape[0] + sum(weight.shape[0] for weight in others)
        weights[f"{whole}.weight"] = replace(first, shape=(rows, first.shape[1]))
    entries: list[tuple[str, tuple[int, ...]]] = []
    for name, weight in weights.items():
        if not weight.is_matrix:
            entries.append((name, weight.shape))
            continue
        *stack, rows, columns = weight.shape
        for suffix, (_, shape) in weight.stored.tensors(rows, columns).items():
            entries.append((formats.on_disk(name, suffix), (*stack, *shape)))
    return sum(weight.nbytes for weight in weights.values()) + header_bytes(entries)


def offers(
    block: Block,
    scored: Mapping[str, float],
    workload: Workload,
    seconds: Seconds,
    also: Sequence[Demand] = (),
) -> list[Offer]:
    """All combinations of one slot."""

    def others(shape: Shape) -> tuple[Cost, ...]:
        return tuple(price(shape, demand.workload, seconds) for demand in also)

    return [
        Offer(choice, shape, score, price(shape, workload, seconds), file_bytes(block.having(shape)), others(shape))
        for choice, shape, score in combinations(block.shape, scored)
    ]


def undominated(offered: Sequence[Offer]) -> list[Offer]:
    """Offers that no other one beats or equals on score and every cost; of equal ones the first."""
    table = np.array([[o.score, o.file_bytes, o.resident_bytes, *_running(o)] for o in offered])
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    for index in order:
        if not any((table[other] <= table[index]).all() for other in kept):
            kept.append(int(index))
    return [offered[index] for index in sorted(kept)]


def _running(offer: Offer) -> list[float]:
    """What it costs to serve every workload."""
    costs = (offer.cost, *offer.also)
    return [each for cost in costs for each in (cost.state_bytes, cost.prefill_seconds, cost.decode_seconds)]


FILE_OVERHEAD = 4096
"""Bytes set aside for what is written once per file: length words, metadata, padding (up to 40 shards)."""


def fixed_spending(offered: Mapping[Slot, Sequence[Offer]], workload: Workload) -> dict[str, float]:
    """What is spent under each bound whatever is chosen. The work space is one that is enough for every choice."""
    shapes = {offer.shape for row in offered.values() for offer in row}
    return {"weight_bytes": FILE_OVERHEAD, "memory_bytes": workspace_bytes(shapes, workload)}


@dataclass(frozen=True)
class _Bound:
    """One row of the problem. `asked`: the bound in the words of Budget; `limit`: on the sum over slots."""

    name: str
    bound: str
    demand: Demand
    asked: float
    limit: float
    spent: Callable[[Offer], float]


def _rows(
    offered: Mapping[Slot, Sequence[Offer]], budget: Budget, workload: Workload, also: Sequence[Demand]
) -> list[_Bound]:
    """Of every demand. A throughput bound becomes a bound on time: sequences * new tokens / rate >= prefill + new *
    decode seconds."""
    found = []
    for number, demand in enumerate((Demand(workload=workload, budget=budget), *also)):
        fixed, new = fixed_spending(offered, demand.workload), demand.workload.new

        def cost(offer: Offer, number: int = number) -> Cost:
            return offer.also[number - 1] if number else offer.cost

        spent: dict[str, Callable[[Offer], float]] = {
            "weight_bytes": lambda o: o.file_bytes,
            "memory_bytes": lambda o, cost=cost: o.resident_bytes + cost(o).state_bytes,
            "ttft_seconds": lambda o, cost=cost: cost(o).prefill_seconds,
            "tpot_seconds": lambda o, cost=cost: cost(o).decode_seconds,
            "tokens_per_second": lambda o, cost=cost, new=new: cost(o).prefill_seconds + new * cost(o).decode_seconds,
        }
        for bound, asked in demand.budget.bounds().items():
            limit = demand.workload.concurrency * new / asked if bound == "tokens_per_second" else asked
            name = f"{bound} of {demand}" if number else bound
            found.append(_Bound(name, bound, demand, asked, limit - fixed.get(bound, 0), spent[bound]))
    return found


def problem(
    offered: Mapping[Slot, Sequence[Offer]],
    budget: Budget,
    workload: Workload,
    also: Sequence[Demand] = (),
    *,
    different_from: Sequence[tuple[int, ...]] = (),
    min_different: int = 0,
) -> Problem:
    """The search problem of one budget and workload, and of further demands that the offers are priced for. Every slot
    takes part, also those with a single offer."""
    rows = _rows(offered, budget, workload, also)
    return Problem(
        scores=tuple(np.array([o.score for o in row]) for row in offered.values()),
        costs=tuple(
            np.array([[float(each.spent(o)) for each in rows] for o in row]).reshape(len(row), len(rows))
            for row in offered.values()
        ),
        limits=np.array([float(each.limit) for each in rows]),
        names=tuple(each.name for each in rows),
        different_from=tuple(different_from),
        min_different=min_different,
        labels=tuple(tuple(str(o.choice) for o in row) for row in offered.values()),
        groups=tuple(slot.kind for slot in offered),
    )


Found = TypeVar("Found")


def met(budget: Budget, workload: Workload, solve: Callable[[Workload], Found]) -> Iterator[tuple[Workload, Found]]:
    """Every batch that meets the budget, and what `solve` finds for it, fewest sequences at once first: the one grid
    that a plan, its solution and the margins of that are looked for on.

    Raises Infeasible when all have been tried and none meets it: the one that misses its bound by the least share.
    """
    failed: list[Infeasible] = []
    grid = batches(budget, workload)
    some = False
    for batch in grid:
        try:
            found = solve(batch)
        except Infeasible as err:
            told = f"{err}, {at_once(batch.concurrency)}"
            failed.append(err if len(grid) == 1 else Infeasible(err.bound, err.limit, err.nearest, told))
            continue
        some = True
        yield batch, found
    if not some:
        raise min(failed, key=_miss)


def _miss(err: Infeasible) -> float:
    """How far a bound is from what could be met, as a ratio; 1: not at all."""
    if not err.limit or not err.nearest:
        return math.inf
    return max(err.limit / err.nearest, err.nearest / err.limit)


def in_users_words(
    err: Infeasible,
    offered: Mapping[Slot, Sequence[Offer]],
    budget: Budget,
    workload: Workload,
    also: Sequence[Demand] = (),
) -> Infeasible:
    """The same failure as numbers of the budget: the bound as asked, and the nearest one that could be met."""
    if err.bound is None or err.nearest is None:
        return err
    rows = _rows(offered, budget, workload, also)
    found = next(row for row in rows if row.name == err.bound)
    if found.bound == "tokens_per_second":
        nearest = found.demand.workload.concurrency * found.demand.workload.new / err.nearest
        message = f"{found.name} of {found.asked:.4g} cannot be met; the most possible is {nearest:.4g}"
    else:
        nearest = err.nearest + fixed_spending(offered, found.demand.workload).get(found.bound, 0)
        show = show_bytes if found.bound.endswith("bytes") else show_seconds
        message = f"{found.name} of {show(found.asked)} cannot be met; the least possible is {show(nearest)}"
        if found.bound.endswith("bytes"):
            nearest = math.ceil(nearest)
            message += f" ({nearest} bytes)"
    if len(rows) > 1:
        message += ", given the other bounds"
    return Infeasible(found.name, found.asked, nearest, message)


def at_once(sequences: int) -> str:
    """How many sequences run together, in words."""
    return f"with {sequences} sequence{'s' if sequences > 1 else ''} at once"
