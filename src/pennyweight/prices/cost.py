"""What a model costs to run: bytes and seconds, computed from shapes or looked up in measurements.

Costs of slots add up, which is what lets a search choose one variant per slot. Memory follows Puzzle (arXiv:2411.19146,
section on constraints) with one correction: KV bytes use head_dim, never hidden_size / num_heads. Seconds are either
*computed* (a roofline over a machine's description) or *measured* on this machine (measure.py); one search uses one
kind and the report says which.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

from pennyweight.model.demand import Workload
from pennyweight.model.shapes import Attention, Embedding, Head, Norm, Shape, Shapes, Weight
from pennyweight.prices.machine import Machine

KV_BYTES = 2  # keys and values are cached in bfloat16


@dataclass(frozen=True)
class Cost:
    """Of one slot or of a whole model. state_bytes: KV cache at full context, all sequences. decode_seconds: one
    token for every sequence."""

    weight_bytes: float = 0.0
    state_bytes: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def weight_bytes(shape: Shape) -> int:
    """Bytes of the slot's tensors on disk."""
    return sum(weight.nbytes for weight in shape.weights())


def kv_bytes(shape: Shape, tokens: int, *, bytes_per_value: float = KV_BYTES) -> float:
    """KV cache of one sequence of `tokens` tokens: 2 * num_kv_heads * head_dim * min(tokens, window) values."""
    if not isinstance(shape, Attention):
        return 0
    kept = tokens if shape.window is None else min(tokens, shape.window)
    return 2 * shape.num_kv_heads * shape.head_dim * kept * bytes_per_value


def workspace_bytes(shapes: Shapes, workload: Workload) -> int:
    """Activations at the widest block of prefill in 512-token chunks, and the logits of every sequence, in float32."""
    tokens = min(workload.prompt, 512) * workload.concurrency
    blocks = [shape for shape in shapes.values() if not isinstance(shape, Embedding | Norm | Head)]
    widest = max((weight.shape[0] for shape in blocks for weight in shape.weights()), default=0)
    hidden = max(shape.hidden_size for shape in shapes.values())
    vocab = max((shape.vocab_size for shape in shapes.values() if isinstance(shape, Head)), default=0)
    return 4 * (tokens * (4 * hidden + 2 * widest) + workload.concurrency * vocab)


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
        if isinstance(shape, Norm) or not list(_read_weights(shape)):
            return 0.0, 0.0
        batch = workload.concurrency
        prefill_tokens = batch * workload.prompt
        per_token = sum(2 * w.parameters * w.active for w in _read_weights(shape) if len(w.shape) > 1)
        decode_bytes = sum(w.nbytes * (1 - (1 - w.active * w.kept) ** batch) for w in _read_weights(shape))
        decode_bytes += batch * kv_bytes(shape, workload.mean_length)
        prefill_bytes = sum(w.nbytes * (1 - (1 - w.active) ** prefill_tokens) for w in _read_weights(shape))
        if isinstance(shape, Embedding | Head):  # only the last position of a prompt needs logits
            prefill_tokens = batch
        prefill_flops = prefill_tokens * per_token + batch * _attention_flops(shape, workload.prompt)
        decode_flops = batch * (per_token + _attention_flops_per_token(shape, workload.mean_length))
        return (
            machine.block_seconds + max(prefill_bytes / bandwidth, prefill_flops / flops),
            machine.block_seconds + max(decode_bytes / bandwidth, decode_flops / flops),
        )

    return seconds


def makes_logits(shape: Embedding | Head) -> bool:
    """Whether the slot holds the matrix of the logits: the embedding if it is tied, else the head. It is what their
    time is charged to, since how it is stored is chosen there."""
    return shape.tied == isinstance(shape, Embedding)


def _read_weights(shape: Shape) -> Iterable[Weight]:
    """Weights that a token's computation reads whole: of an embedding that is not the head as well it is one row."""
    if isinstance(shape, Embedding | Head) and not makes_logits(shape):
        return ()
    return tuple(shape.weights())


def _attention_flops_per_token(shape: Shape, length: int) -> float:
    if not isinstance(shape, Attention):
        return 0.0
    seen = length if shape.window is None else min(length, shape.window)
    return 4.0 * shape.num_heads * shape.head_dim * seen


def _attention_flops(shape: Shape, tokens: int) -> float:
    if not isinstance(shape, Attention):
        return 0.0
    window = tokens if shape.window is None else min(tokens, shape.window)
    pairs = window * (window + 1) / 2 + (tokens - window) * window
    return 4.0 * shape.num_heads * shape.head_dim * pairs


def price(shape: Shape, workload: Workload, seconds: Seconds) -> Cost:
    """The cost of one slot."""
    state = workload.concurrency * kv_bytes(shape, workload.context)
    return Cost(weight_bytes(shape), state, *seconds(shape, workload))


def total(shapes: Shapes, workload: Workload, seconds: Seconds) -> Cost:
    """The cost of a whole model: the sum over its slots."""
    return reduce(add, (price(shape, workload, seconds) for shape in shapes.values()), Cost())


def figures(cost: Cost, workload: Workload, workspace: int) -> dict[str, float]:
    """A model's cost in the words of Budget."""
    serve_seconds = cost.prefill_seconds + workload.new * cost.decode_seconds
    return {
        "weight_bytes": cost.weight_bytes,
        "memory_bytes": cost.weight_bytes + cost.state_bytes + workspace,
        "ttft_seconds": cost.prefill_seconds,
        "tpot_seconds": cost.decode_seconds,
        "tokens_per_second": workload.concurrency * workload.new / serve_seconds if serve_seconds else math.inf,
    }


def paged_kv_bytes(shapes: Shapes, tokens: int, *, batched_tokens: int, bytes_per_value: float = KV_BYTES) -> float:
    """KV bytes that a paged server (vLLM V1) reserves for one sequence of `tokens` tokens.

    Such a server groups layers by what they cache, pads every group to one size and keeps window layers a slack of
    two prefill chunks: min(tokens, window - 1 + 2 * batched_tokens). The padding is what least padding costs. This is
    more than kv_bytes: a window saves less than its share of the cache.
    """
    groups: dict[tuple[int | None, int], int] = {}
    for shape in shapes.values():
        if isinstance(shape, Attention):
            key = (shape.window, shape.num_kv_heads * shape.head_dim)
            groups[key] = groups.get(key, 0) + 1

    def reserved(group_size: int) -> float:
        values = 0.0
        for (window, width), layers in groups.items():
            kept = tokens if window is None else min(tokens, window - 1 + 2 * batched_tokens)
            values += 2 * width * kept * math.ceil(layers / group_size) * group_size
        return values

    return bytes_per_value * min(reserved(size) for size in set(groups.values())) if groups else 0.0
