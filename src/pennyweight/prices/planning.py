"""What a model would need and what would fit, from its config.json alone: no weights are read, no torch imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from pennyweight import families, formats, kinds, variants
from pennyweight.model.blocks import Blocks
from pennyweight.model.demand import Budget, Demand, Workload, batches
from pennyweight.model.shapes import Shapes, parameters
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import offers
from pennyweight.prices.cost import Seconds, computed, model_figures, price
from pennyweight.prices.machine import Machine
from pennyweight.prices.memory import workspace_bytes
from pennyweight.search import Infeasible, Solution
from pennyweight.units import show_bytes

CONTEXTS = (8192, 16384, 65536, 131072)


@dataclass(frozen=True)
class Plan:
    """parameters; bytes of weights at 16, 8 and 4 bits; the most tokens the model takes (None: it does not say); KV
    bytes of one sequence by context; `figures` in Budget's words on the given machine and the work space, both by how
    many sequences run at once; `also`: figures under each further demand; the smallest weights the axes can reach; and
    the verdict on the budget."""

    parameters: int
    weight_bytes: dict[int, int]
    longest: int | None
    kv_bytes: dict[int, float]
    workspace_bytes: dict[int, int]
    figures: dict[int, dict[str, float]]
    also: list[dict[str, float]]
    smallest_bytes: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Offered = Mapping[Slot, list[offers.Offer]]


@dataclass(frozen=True)
class Prospect:
    """What may become of every slot, unscored: how many choices there are to score, and all their combinations, by the
    batches that the budget allows. The parent's own come first. `also`: further demands, which have to be met too."""

    choices: int
    workload: Workload
    offered: Mapping[Workload, Offered]
    also: tuple[Demand, ...] = ()

    def hold_against(self, budget: Budget) -> None:
        """Raises Infeasible, in the words of the budget, if no combination meets it in any batch."""

        def solve(batch: Workload) -> Solution:
            cheapest = {slot: offers.undominated(row) for slot, row in self.offered[batch].items()}
            try:
                return kinds.load("search", "mip").solve(offers.problem(cheapest, budget, batch, self.also))
            except Infeasible as err:
                raise offers.in_users_words(err, cheapest, budget, batch, self.also) from None

        next(offers.met(budget, self.workload, solve))

    def meets(self, budget: Budget) -> bool:
        try:
            self.hold_against(budget)
        except Infeasible:
            return False
        return True

    def within(self, axes: Collection[str]) -> Prospect:
        """What remains of it if only these axes may change something."""

        def inside(row: Sequence[offers.Offer]) -> list[offers.Offer]:
            return [offer for offer in row if all(axis in axes for axis, _ in offer.choice.specs)]

        left = {w: {slot: inside(row) for slot, row in table.items()} for w, table in self.offered.items()}
        return Prospect(self.choices, self.workload, left, self.also)

    @property
    def smallest_bytes(self) -> float:
        table = next(iter(self.offered.values()))
        return sum(min(offer.file_bytes for offer in row) for row in table.values())


def prospect(
    blocks: Blocks,
    axes: Sequence[str],
    budget: Budget,
    workload: Workload,
    seconds: Seconds,
    also: Sequence[Demand] = (),
    *,
    scored_tokens: int,
) -> Prospect:
    """Every slot's offers, each with a score of 0. Raises ValueError for an axis that does not exist."""
    for axis in axes:
        kinds.load("variants", axis)
    singles = {
        slot: offers.single_choices(block.shape, axes, scored_tokens=scored_tokens) for slot, block in blocks.items()
    }
    free = {slot: {choice.key(): 0.0 for choice in own} for slot, own in singles.items()}
    first, *others = batches(budget, workload)
    offered = {first: {slot: offers.offers(block, free[slot], first, seconds, also) for slot, block in blocks.items()}}
    for batch in others:  # the same offers at other costs
        cost = cache(partial(price, workload=batch, seconds=seconds))
        offered[batch] = {
            slot: [dataclasses.replace(offer, cost=cost(offer.shape)) for offer in row]
            for slot, row in offered[first].items()
        }
    return Prospect(sum(map(len, singles.values())), workload, offered, tuple(also))


def plan(
    config: dict[str, Any],
    workload: Workload,
    machine: Machine,
    budget: Budget,
    axes: Sequence[str],
    also: Sequence[Demand] = (),
    *,
    scored_tokens: int = 512,
) -> Plan:
    """Price a model. The verdict says fits, fits after shrinking and to what, or no, naming the bound and the nearest
    value. Raises ValueError for an axis that does not exist."""
    blocks = families.blocks(config)
    shapes = {slot: block.shape for slot, block in blocks.items()}
    seconds, longest = computed(machine), config.get("max_position_embeddings")
    limits = budget.bounds() or {"memory_bytes": machine.memory_bytes}
    bounded = Budget(**{k: int(v) if k.endswith("bytes") else v for k, v in limits.items()})  # type: ignore[arg-type]
    scored_tokens = min(scored_tokens, longest or scored_tokens)
    found = prospect(blocks, axes, bounded, workload, seconds, also, scored_tokens=scored_tokens)
    contexts = {workload.context, *CONTEXTS} if longest is None else {workload.context, longest, *CONTEXTS}
    return Plan(
        parameters=parameters(shapes),
        weight_bytes={bits: stored_bytes(shapes, bits) for bits in (16, 8, 4)},
        longest=longest,
        kv_bytes={
            tokens: sequence_kv_bytes(shapes, tokens)
            for tokens in sorted(contexts)
            if longest is None or tokens <= longest
        },
        workspace_bytes={batch.concurrency: workspace_bytes(shapes.values(), batch) for batch in found.offered},
        figures={batch.concurrency: model_figures(shapes, batch, seconds) for batch in found.offered},
        also=[model_figures(shapes, demand.workload, seconds) for demand in also],
        smallest_bytes=found.smallest_bytes,
        verdict=_verdict(found, bounded, shapes),
    )


def _verdict(found: Prospect, budget: Budget, shapes: Shapes) -> str:
    for batch, table in found.offered.items():
        alone = {slot: row[:1] for slot, row in table.items()}
        if offers.problem(alone, budget, batch, found.also).allows((0,) * len(alone)):
            return "fits as it is" + (f", {offers.at_once(batch.concurrency)}" if len(found.offered) > 1 else "")
    try:
        found.hold_against(budget)
    except Infeasible as err:
        return f"does not fit: {err}"
    axes = _enough(found, budget)
    least, whole = found.within(axes).smallest_bytes, stored_bytes(shapes, 16)
    how = f"{axes[0]} alone leaves" if len(axes) == 1 else f"{' and '.join(axes)} together leave"
    share = f"{least / whole:.0%} of the parent's {show_bytes(whole)} in 16 bits"
    return f"fits after shrinking: {how} {show_bytes(least)} of weights at the least, {share}"


def _enough(found: Prospect, budget: Budget) -> list[str]:
    """Few axes that meet a budget which all of them meet. How weights are kept comes first and taking blocks out last,
    as it changes most; then what can be left out again is."""
    tables = found.offered.values()
    offered = {axis for table in tables for row in table.values() for offer in row for axis, _ in offer.choice.specs}
    axes: list[str] = []
    for axis in reversed([axis for axis in variants.order() if axis in offered]):
        axes.append(axis)
        if found.within(axes).meets(budget):
            break
    for axis in axes[:-1]:
        fewer = [other for other in axes if other != axis]
        if found.within(fewer).meets(budget):
            axes = fewer
    return axes


def sequence_kv_bytes(shapes: Shapes, tokens: int) -> float:
    """KV cache of one sequence, all layers, bfloat16."""
    return sum(shape.state_bytes(tokens) for shape in shapes.values())


def stored_bytes(shapes: Shapes, bits: int, group: int = 128) -> int:
    """All weights with every matrix at the same bits (norms, biases and routers stay at 16)."""
    count = 0
    for shape in shapes.values():
        for weight in shape.weights():
            stored = BFLOAT16 if bits == 16 or weight.exact else formats.rows_in(bits).Spec(bits, group)
            count += dataclasses.replace(weight, stored=stored).nbytes
    return count


def kv_saving(parent: Shapes, child: Shapes, tokens: int) -> float:
    """Share of the parent's KV bytes that the child saves at a context of `tokens`."""
    return 1 - sequence_kv_bytes(child, tokens) / sequence_kv_bytes(parent, tokens)


def mean_kv_saving(parent: Shapes, child: Shapes, workload: Workload) -> float:
    """The saving averaged over the cache's growth from prompt to prompt + new tokens (1024 points)."""
    points = [workload.prompt + round(workload.new * i / 1023) for i in range(1024)]
    spent = [sum(sequence_kv_bytes(shapes, tokens) for tokens in points) for shapes in (parent, child)]
    return 1 - spent[1] / spent[0]
