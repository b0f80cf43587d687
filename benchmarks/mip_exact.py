"""Is the exact search exact, and is it quick at the size of a 70 B model?

Exact: random spaces of at most 100 000 choices are enumerated, and the search must return the least score that
enumeration finds. They hold mixed signs, ties, bounds of different orders of magnitude, and bounds that cannot be met:
there it must raise Infeasible, and the value it calls nearest must be the one enumeration finds. The second and third
best, two slots apart from those before, are held against enumeration too.

Quick: 80 layers of the shapes of Llama-3-70B are 160 slots, each with 70 variants under three budgets that all bind:
file bytes, memory with the KV cache of a batch, and seconds per token on an H100. Prices are the project's own. Scores
are drawn: a harm that grows with what is cut, times a log-normal sensitivity of the layer, times noise of the variant.
Variants that others dominate stay in, though `penny fit` would drop them. `seconds_160x70` is that of the slowest seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

import _bench
from pennyweight import families
from pennyweight.model.choices import Choice
from pennyweight.model.demand import Budget
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import cost, offers
from pennyweight.prices.offers import Offer
from pennyweight.search import Infeasible, Problem, mip
from pennyweight.variants import ffn_width

LARGEST_SPACE = 100_000
UNITS = np.array([1.0, 1e9, 1e-3])
LAYERS, VARIANTS = 80, 70
SHARES = {"weight_bytes": 0.35, "memory_bytes": 0.35, "tpot_seconds": 0.375}  # of the parent; so that all three bind
CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
BLOCKS = {slot: block for slot, block in families.blocks(CONFIG).items() if slot.layer is not None}
SHAPES = {slot: block.shape for slot, block in BLOCKS.items()}
ATTENTION: Any = SHAPES[Slot("mixer", 0)]
FFN: Any = SHAPES[Slot("ffn", 0)]
WIDTHS = range(28672, 0, -2048)  # 14 of them, each stored in 5 ways: 70 variants
WORKLOAD = cost.Workload(prompt=4096, new=1024, concurrency=48, context=16384)


# ------------------------------------------------------------------------------------------------------ brute force


@dataclass(frozen=True)
class Space:
    """Every choice of a problem: choices (n, slots), scores (n,), spent (n, bounds)."""

    choices: np.ndarray
    scores: np.ndarray
    spent: np.ndarray

    def within(self, limits: np.ndarray) -> np.ndarray:
        """(n,) bool, with the slack the search allows for the rounding of sums."""
        return np.asarray((self.spent <= limits + 1e-9 * np.maximum(1.0, np.abs(limits))).all(axis=1))


def enumerate_all(problem: Problem) -> Space:
    sizes = [len(score) for score in problem.scores]
    choices = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    spent = [reduce(np.add.outer, [cost[:, k] for cost in problem.costs]).ravel() for k in range(len(problem.limits))]
    return Space(choices, reduce(np.add.outer, problem.scores).ravel(), np.stack(spent, axis=1))


def random_problem(seed: int) -> tuple[Problem, Space]:
    """2 to 9 slots of 2 to 7 variants under 1 to 3 bounds; two in five of small whole numbers, hence many ties, and two
    in five with costs of both signs. Limits lie from a tenth of the range below what can be met to 60 % above."""
    rng = np.random.default_rng(seed)
    bounds, whole, mixed = int(rng.integers(1, 4)), rng.random() < 0.4, rng.random() < 0.4
    sizes = rng.integers(2, 8, rng.integers(2, 10))
    scores, costs = [], []
    for size in sizes[np.cumprod(sizes) <= LARGEST_SPACE]:
        drawn = rng.integers(-4, 9, (size, bounds)) if whole else rng.uniform(-0.4, 0.9, (size, bounds))
        costs.append((drawn if mixed else abs(drawn)) * UNITS[:bounds])
        scores.append(rng.integers(-3, 9, size).astype(float) if whole else rng.normal(size=size))
    free = Problem(tuple(scores), tuple(costs), np.full(bounds, np.inf), ("bytes", "memory", "seconds")[:bounds])
    space = enumerate_all(free)
    limits = space.spent.min(axis=0) + rng.uniform(-0.1, 0.6, bounds) * np.ptp(space.spent, axis=0)
    if whole:
        limits = np.round(limits / UNITS[:bounds]) * UNITS[:bounds]
    return replace(free, limits=limits), space


def disagreements(problem: Problem, space: Space, *, solutions: int) -> Iterator[str]:
    """What the search says otherwise than enumeration, in words; one line per solution at most."""
    allowed = space.within(problem.limits)
    earlier: list[tuple[int, ...]] = []
    for nth in range(1, solutions + 1):
        wanted = replace(problem, different_from=tuple(earlier), min_different=2)
        try:
            found = mip.solve(wanted)
        except Infeasible as err:
            if allowed.any():
                yield f"solution {nth}: called infeasible, {allowed.sum()} choices are not"
            elif nth == 1 and (wrong := wrongly_explained(problem, space, err)):
                yield wrong
            return
        if not allowed.any():
            yield f"solution {nth}: found one where there is none"
            return
        best = space.scores[allowed].min()
        if not found.optimal or abs(found.score - best) > 1e-9 * max(1.0, abs(best)):
            yield f"solution {nth}: score {found.score}, proven {found.optimal}, the best is {best}"
        if not allowed[(space.choices == np.array(found.choice)).all(axis=1)].all():
            yield f"solution {nth}: {found.choice} is not allowed"
        earlier.append(found.choice)
        allowed &= (space.choices != np.array(found.choice)).sum(axis=1) >= 2


def wrongly_explained(problem: Problem, space: Space, err: Infeasible) -> str | None:
    """A bound is to blame if the others can be met, and its nearest value is the least of the choices that meet them.

    Where no single bound is to blame, one that cannot be met even alone is named, or none if each could be.
    """
    nearest: dict[str | None, float] = {}
    for k, name in enumerate(problem.names):
        others = problem.limits.copy()
        others[k] = np.inf
        if (met := space.within(others)).any():
            nearest[name] = float(space.spent[met, k].min())
    if not nearest:
        alone = zip(problem.names, space.spent.min(axis=0), problem.limits, strict=True)
        nearest = {name: float(least) for name, least, limit in alone if least > limit}
    if err.bound is None and not nearest:
        return None
    if err.nearest is not None and err.bound in nearest:
        wanted = nearest[err.bound]
        if abs(err.nearest - wanted) <= 1e-9 * max(1.0, abs(wanted)):
            return None
    return f"blamed {err.bound} with nearest {err.nearest}, enumeration says {nearest}"


# ------------------------------------------------------------------------------------------------ 160 x 70 instances


def combined(parent: Shape, *axes: str) -> list[tuple[Choice, Shape]]:
    """Every combination of what the axes offer, the parent's own first."""
    singles = offers.single_choices(parent, axes, scored_tokens=2 * WORKLOAD.context)
    free = {choice.key(): 0.0 for choice in singles}
    return [(choice, shape) for choice, shape, _ in offers.combinations(parent, free)]


def variants(parent: Shape) -> list[tuple[Choice, Shape]]:
    """70 variants of a block. Attention: KV heads, window and bits combine to 315, of which every fourth or fifth is
    kept. FFN: 14 widths, in steps finer than the project's own, each stored in 5 ways."""
    if isinstance(parent, Attention):
        found = combined(parent, "kv_heads", "window", "bits")
        return [found[i] for i in np.linspace(0, len(found) - 1, VARIANTS).round().astype(int)]
    widths = [ffn_width.Spec(width) for width in WIDTHS]
    return [
        (Choice((("ffn_width", width), *choice.specs)), shape)
        for width in widths
        for choice, shape in combined(ffn_width.reshape(parent, width), "bits")
    ]


def harm(shape: Shape) -> float:
    """What a variant costs in quality before sensitivity and noise: 0 for the parent's own, more the more is cut.

    Rounding to b bits errs by 4**-b in mean square; a scale for every g columns counts as 16 / g more bits.
    """
    assert isinstance(shape, Attention | GatedMLP)
    if isinstance(shape, Attention):
        unseen = 0.0 if shape.window is None else 1 - shape.window / WORKLOAD.context
        lost = 0.3 * (1 - shape.num_kv_heads / ATTENTION.num_kv_heads) ** 2 + 0.1 * unseen**2
    else:
        lost = (1 - shape.intermediate_size / FFN.intermediate_size) ** 2
    stored = shape.stored
    return lost if stored == BFLOAT16 else lost + 0.1 * 4.0 ** (4 - stored.bits - 16 / stored.group)


def instance(seed: int) -> Problem:
    """160 slots of 70 variants; file bytes, memory and decode seconds are bounded at a share of the parent's."""
    rng = np.random.default_rng(seed)
    seconds = cost.computed(cost.Machine.load("h100"))
    made = {"mixer": variants(ATTENTION), "ffn": variants(FFN)}
    offered: dict[Slot, list[Offer]] = {}
    for slot, block in BLOCKS.items():
        sensitivity = rng.lognormal(sigma=1.0)
        noise = rng.lognormal(sigma=0.3, size=VARIANTS)
        offered[slot] = [
            Offer(
                choice,
                shape,
                sensitivity * harm(shape) * factor,
                cost.price(shape, WORKLOAD, seconds),
                offers.file_bytes(block.having(shape)),
            )
            for (choice, shape), factor in zip(made[slot.kind], noise, strict=True)
        ]
    whole = cost.model_figures(SHAPES, WORKLOAD, seconds)
    budget = Budget(
        weight_bytes=int(SHARES["weight_bytes"] * whole["weight_bytes"]),
        memory_bytes=int(SHARES["memory_bytes"] * whole["memory_bytes"]),
        tpot_seconds=SHARES["tpot_seconds"] * whole["tpot_seconds"],
    )
    return offers.problem(offered, budget, WORKLOAD)


# ------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    problems, diverse, seeds = (200, 40, 3) if quick else (600, 150, 8)
    infeasible, mismatches = 0, 0
    for seed in range(problems):
        problem, space = random_problem(seed)
        infeasible += not space.within(problem.limits).any()
        wrong = list(disagreements(problem, space, solutions=3 if seed < diverse else 1))
        mismatches += bool(wrong)
        for line in wrong:
            print(f"space {seed}: {line}", flush=True)
    print(f"{problems} spaces, {infeasible} of them infeasible, {diverse} solved three times: {mismatches} mismatches")
    slowest, proven = 0.0, 0
    for seed in range(seeds):
        problem = instance(seed)
        assert [len(score) for score in problem.scores] == [VARIANTS] * 2 * LAYERS
        found = mip.solve(problem)
        slowest, proven = max(slowest, found.seconds), proven + found.optimal
        shares = ", ".join(
            f"{name} {s:.3%}" for name, s in zip(problem.names, found.spent / problem.limits, strict=True)
        )
        print(
            f"instance {seed}: {found.seconds:.2f} s, objective {found.score:.6f}, "
            f"{'proven' if found.optimal else 'NOT proven'}; spent of the limits: {shares}",
            flush=True,
        )
    keys = {
        "problems": problems,
        "infeasible": infeasible,
        "mismatches": mismatches,
        "instances_160x70": seeds,
        "solved_160x70": proven,
        "seconds_160x70": slowest,
    }
    bars = [
        _bench.bar("random spaces", problems, ">=", 200),
        _bench.bar("mismatches with brute force", mismatches, "==", 0),
        _bench.bar("slowest 160 x 70, seconds", slowest, "<", 5),
        _bench.bar("160 x 70 left unproven", seeds - proven, "==", 0),
    ]
    return _bench.finish("mip_exact", quick, keys, bars)


if __name__ == "__main__":
    sys.exit(main())
