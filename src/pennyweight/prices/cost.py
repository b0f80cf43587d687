"""What a model costs to run: bytes and seconds, computed from shapes or looked up in measurements.

Costs of slots add up, which is what lets a search choose one variant per slot. Memory follows Puzzle (arXiv:2411.19146,
section on constraints) with corrections: KV bytes use head_dim, never hidden_size / num_heads, and everything is
counted as the engine allocates it (memory.py). Seconds are either *computed* (a roofline over a machine's description)
or *measured* on this machine (measure.py); one search uses one kind and the report says which.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

from pennyweight.model.demand import Workload
from pennyweight.model.shapes import Shape, Shapes
from pennyweight.prices.machine import Machine
from pennyweight.prices.memory import seen_bytes, sequence_bytes, workspace_bytes


@dataclass(frozen=True)
class Cost:
    """Of one slot or of a whole model. weight_bytes: on disk; resident_bytes: of them in memory. state_bytes: KV cache
    at full context, all sequences. decode_seconds: one token for every sequence."""

    weight_bytes: float = 0.0
    resident_bytes: float = 0.0
    state_bytes: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


Seconds = Callable[[Shape, Workload], tuple[float, float]]
"""Prefill and decode seconds of one slot; decode is one token for every sequence of the workload."""


def computed(machine: Machine) -> Seconds:
    """Roofline: a block takes as long as its memory traffic or its arithmetic, whichever is longer.

    An expert weight is read if any sequence of the batch is routed to it: a share 1 - (1 - k/E)^B of the experts
    under uniform routing. Windows shorten what attention reads. Sparse matrices are read in part while tokens are
    written; each sequence of a batch leaves out its own channels, so that the share read is 1 - (1 - kept)^B.
    """
    bandwidth, flops = machine.bandwidth * machine.bandwidth_share, machine.flops * machine.flops_share

    def seconds(shape: Shape, workload: Workload) -> tuple[float, float]:
        weights = tuple(shape.read())
        if not weights:
            return 0.0, 0.0
        batch = workload.concurrency
        prefill_tokens = batch * workload.prompt
        decode_bytes = sum(w.nbytes * (1 - (1 - w.active * w.kept) ** batch) for w in weights)
        decode_bytes += batch * seen_bytes(shape, workload, workload.mean_length)
        prefill_bytes = sum(w.nbytes * (1 - (1 - w.active) ** prefill_tokens) for w in weights)
        if shape.makes_logits:  # only the last position of a prompt needs them
            prefill_tokens = batch
        coding = sum(w.stored.coding_flops * w.parameters * w.active for w in weights)
        prefill_flops = coding + prefill_tokens * shape.flops + batch * shape.prompt_mixing_flops(workload.prompt)
        decode_flops = coding + batch * (shape.flops + shape.mixing_flops(workload.mean_length))
        return (
            machine.block_seconds + max(prefill_bytes / bandwidth, prefill_flops / flops),
            machine.block_seconds + max(decode_bytes / bandwidth, decode_flops / flops),
        )

    return seconds


def price(shape: Shape, workload: Workload, seconds: Seconds) -> Cost:
    """The cost of one slot."""
    state = workload.concurrency * sequence_bytes(shape, workload)
    return Cost(shape.nbytes, shape.resident_bytes, state, *seconds(shape, workload))


def total(shapes: Shapes, workload: Workload, seconds: Seconds) -> Cost:
    """The cost of a whole model: the sum over its slots."""
    return reduce(add, (price(shape, workload, seconds) for shape in shapes.values()), Cost())


def model_figures(shapes: Shapes, workload: Workload, seconds: Seconds) -> dict[str, float]:
    """A whole model's cost in the words of Budget."""
    return figures(total(shapes, workload, seconds), workload, workspace_bytes(shapes.values(), workload))


def figures(cost: Cost, workload: Workload, workspace: int) -> dict[str, float]:
    """The same of a cost and the work space beside it."""
    serve_seconds = cost.prefill_seconds + workload.new * cost.decode_seconds
    return {
        "weight_bytes": cost.weight_bytes,
        "memory_bytes": cost.resident_bytes + cost.state_bytes + workspace,
        "ttft_seconds": cost.prefill_seconds,
        "tpot_seconds": cost.decode_seconds,
        "tokens_per_second": workload.concurrency * workload.new / serve_seconds if serve_seconds else math.inf,
    }


def paged_kv_bytes(shapes: Shapes, tokens: int, *, batched_tokens: int, bytes_per_value: float = 2) -> float:
    """KV bytes that a paged server (vLLM V1) reserves for one sequence of `tokens` tokens.

    Such a server groups layers by what they cache, pads every group to one size and keeps window layers a slack of
    two prefill chunks: min(tokens, window - 1 + 2 * batched_tokens). The padding is what least padding costs. This is
    more than state_bytes: a window saves less than its share of the cache.
    """
    groups = Counter((shape.window, shape.cached_values) for shape in shapes.values() if shape.cached_values)

    def reserved(group_size: int) -> float:
        values = 0.0
        for (window, width), layers in groups.items():
            kept = tokens if window is None else min(tokens, window - 1 + 2 * batched_tokens)
            values += width * kept * math.ceil(layers / group_size) * group_size
        return values

    return bytes_per_value * min(reserved(size) for size in set(groups.values())) if groups else 0.0
