"""What a model would need and what would fit, from its config.json alone: no weights are read, no torch imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight import kinds
from pennyweight.model.demand import Budget, Workload
from pennyweight.model.shapes import Shape, Shapes, parameters
from pennyweight.model.slots import Slot
from pennyweight.model.stored import Stored
from pennyweight.prices import offers
from pennyweight.prices.cost import computed, figures, kv_bytes, total, workspace_bytes
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


def slots(config: dict[str, Any]) -> dict[Slot, Shape]:
    """Slots and shapes of a config. Raises ValueError for an unknown family or a config it cannot read."""
    return kinds.family_of(config["model_type"]).slots(config)


def plan(config: dict[str, Any], workload: Workload, machine: Machine, budget: Budget, axes: Sequence[str]) -> Plan:
    """Price a model. The verdict says fits, fits after shrinking, or no, naming the bound and the nearest value."""
    shapes = slots(config)
    seconds = computed(machine)
    parent = figures(total(shapes, workload, seconds), workload, workspace_bytes(shapes, workload))
    offered = {}
    for slot, shape in shapes.items():
        free = {choice.key(): 0.0 for choice in offers.single_choices(shape, axes, scored_tokens=workload.context)}
        offered[slot] = offers.undominated(offers.offers(slot, shape, free, workload, seconds))
    smallest = sum(min(offer.file_bytes for offer in row) for row in offered.values())
    limits = budget.bounds() or {"memory_bytes": machine.memory_bytes}
    if all(
        parent[name] <= bound if name != "tokens_per_second" else parent[name] >= bound
        for name, bound in limits.items()
    ):
        verdict = "fits as it is"
    else:
        bounded = Budget(**{k: int(v) if k.endswith("bytes") else v for k, v in limits.items()})  # type: ignore[arg-type]
        try:
            kinds.load("search", "mip").solve(offers.problem(offered, shapes, bounded, workload))
            verdict = "fits after shrinking"
        except Infeasible as err:
            verdict = f"does not fit: {offers.in_users_words(err, shapes, bounded, workload)}"
    return Plan(
        parameters=parameters(shapes),
        weight_bytes={bits: stored_bytes(shapes, bits) for bits in (16, 8, 4)},
        kv_bytes={tokens: sequence_kv_bytes(shapes, tokens) for tokens in sorted({workload.context, *CONTEXTS})},
        workspace_bytes=workspace_bytes(shapes, workload),
        figures=parent,
        smallest_bytes=smallest,
        verdict=verdict,
    )


def sequence_kv_bytes(shapes: Shapes, tokens: int) -> float:
    """KV cache of one sequence, all layers, bfloat16."""
    return sum(kv_bytes(shape, tokens) for shape in shapes.values())


def stored_bytes(shapes: Shapes, bits: int, group: int = 128) -> int:
    """All weights with every matrix at the same bits (norms and biases stay at 16)."""
    count = 0
    for shape in shapes.values():
        for weight in shape.weights():
            stored = Stored() if bits == 16 else Stored(bits, group)
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
