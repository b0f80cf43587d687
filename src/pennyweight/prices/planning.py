"""What a model would need and what would fit, from its config.json alone: no weights are read, no torch imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight import families, formats, kinds
from pennyweight.model.blocks import Blocks
from pennyweight.model.demand import Budget, Workload
from pennyweight.model.shapes import Shapes, parameters
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import offers
from pennyweight.prices.cost import Seconds, computed, figures, total, workspace_bytes
from pennyweight.prices.machine import Machine
from pennyweight.search import Infeasible

CONTEXTS = (8192, 16384, 65536, 131072)


@dataclass(frozen=True)
class Plan:
    """parameters; bytes of weights at 16, 8 and 4 bits; KV bytes of one sequence by context; `figures` in Budget's
    words on the given machine; the smallest weights the axes can reach; and the verdict on the budget."""

    parameters: int
    weight_bytes: dict[int, int]
    kv_bytes: dict[int, float]
    workspace_bytes: int
    figures: dict[str, float]
    smallest_bytes: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Prospect:
    """What may become of every slot, unscored: how many choices there are to score, and all their combinations."""

    choices: int
    offered: dict[Slot, list[offers.Offer]]

    def hold_against(self, budget: Budget, shapes: Shapes, workload: Workload) -> None:
        """Raises Infeasible, in the words of the budget, if no combination meets it."""
        try:
            kinds.load("search", "mip").solve(offers.problem(self.offered, shapes, budget, workload))
        except Infeasible as err:
            raise offers.in_users_words(err, shapes, budget, workload) from None

    @property
    def smallest_bytes(self) -> float:
        return sum(min(offer.file_bytes for offer in row) for row in self.offered.values())


def prospect(
    blocks: Blocks, axes: Sequence[str], workload: Workload, seconds: Seconds, *, scored_tokens: int
) -> Prospect:
    """Every slot's undominated offers, each with a score of 0."""
    choices, offered = 0, {}
    for slot, block in blocks.items():
        singles = offers.single_choices(block.shape, axes, scored_tokens=scored_tokens)
        choices += len(singles)
        free = {choice.key(): 0.0 for choice in singles}
        offered[slot] = offers.undominated(offers.offers(block, free, workload, seconds))
    return Prospect(choices, offered)


def plan(config: dict[str, Any], workload: Workload, machine: Machine, budget: Budget, axes: Sequence[str]) -> Plan:
    """Price a model. The verdict says fits, fits after shrinking, or no, naming the bound and the nearest value."""
    blocks = families.blocks(config)
    shapes = {slot: block.shape for slot, block in blocks.items()}
    seconds = computed(machine)
    parent = figures(total(shapes, workload, seconds), workload, workspace_bytes(shapes, workload))
    found = prospect(blocks, axes, workload, seconds, scored_tokens=workload.context)
    limits = budget.bounds() or {"memory_bytes": machine.memory_bytes}
    if all(
        parent[name] <= bound if name != "tokens_per_second" else parent[name] >= bound
        for name, bound in limits.items()
    ):
        verdict = "fits as it is"
    else:
        bounded = Budget(**{k: int(v) if k.endswith("bytes") else v for k, v in limits.items()})  # type: ignore[arg-type]
        try:
            found.hold_against(bounded, shapes, workload)
            verdict = "fits after shrinking"
        except Infeasible as err:
            verdict = f"does not fit: {err}"
    return Plan(
        parameters=parameters(shapes),
        weight_bytes={bits: stored_bytes(shapes, bits) for bits in (16, 8, 4)},
        kv_bytes={tokens: sequence_kv_bytes(shapes, tokens) for tokens in sorted({workload.context, *CONTEXTS})},
        workspace_bytes=workspace_bytes(shapes, workload),
        figures=parent,
        smallest_bytes=found.smallest_bytes,
        verdict=verdict,
    )


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
