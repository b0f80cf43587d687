"""Fewer key-value heads, in two ways that need no training (Puzzle, arXiv:2411.19146, and its public code).

mean: the K and V projections of neighbouring heads are averaged (as GQA conversion does).
best: the heads whose queries put most energy through o_proj stay as they are; the query heads of the removed ones are
attached to the kept ones and their o_proj columns set to zero, where training may revive them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Attention, Shape
from pennyweight.variants._common import Stats, set_linear, with_shape

STATS = ("output_moment",)


@dataclass(frozen=True)
class Spec:
    """KV heads to keep and how they are made."""

    heads: int
    init: Literal["mean", "best"] = "mean"

    def __str__(self) -> str:
        return f"kv {self.heads} {self.init}"


def options(shape: Shape) -> list[Spec]:
    """Every divisor of the parent's KV heads below it, made in both ways."""
    if not isinstance(shape, Attention):
        return []
    counts = [n for n in range(shape.num_kv_heads - 1, 0, -1) if shape.num_kv_heads % n == 0]
    return [Spec(n, init) for n in counts for init in ("mean", "best")]


def reshape(shape: Shape, spec: Spec) -> Attention:
    if not isinstance(shape, Attention) or spec.heads < 1 or shape.num_kv_heads % spec.heads:
        raise ValueError(f"{spec.heads} KV heads do not divide those of {shape}")
    return replace(shape, num_kv_heads=spec.heads)


def apply(parts: Parts, spec: Spec, stats: Stats) -> Parts:
    """Edit k, v and, for `best`, the order of query heads in q and o."""
    shape = parts.shape
    assert isinstance(shape, Attention)
    block = parts.block
    if spec.heads < shape.num_kv_heads:
        _mean(block, shape, spec.heads) if spec.init == "mean" else _best(
            block, shape, spec.heads, stats["output_moment"]
        )
    block.num_key_value_groups = shape.num_heads // spec.heads
    return with_shape(parts, reshape(shape, spec))


def _heads(tensor: Any, count: int) -> Any:
    """(count * head_dim, ...) -> (count, head_dim, ...)."""
    return tensor.detach().view(count, -1, *tensor.shape[1:])


def _mean(block: Any, shape: Attention, heads: int) -> None:
    for linear in (block.k_proj, block.v_proj):
        pooled = [
            _heads(t, shape.num_kv_heads)
            .float()
            .view(heads, -1, shape.head_dim, *t.shape[1:])
            .mean(dim=1)
            .flatten(0, 1)
            if t is not None
            else None
            for t in (linear.weight, linear.bias)
        ]
        set_linear(linear, *pooled)


def _best(block: Any, shape: Attention, heads: int, output_moment: Any) -> None:
    import torch

    per_group = shape.num_heads // shape.num_kv_heads
    energy = group_energy(block.o_proj.weight.detach(), output_moment, shape)
    ranked = torch.argsort(energy, descending=True, stable=True).tolist()
    kept, removed = sorted(ranked[:heads]), sorted(ranked[heads:])
    for linear in (block.k_proj, block.v_proj):
        taken = [
            _heads(t, shape.num_kv_heads)[kept].flatten(0, 1) if t is not None else None
            for t in (linear.weight, linear.bias)
        ]
        set_linear(linear, *taken)
    orphans = [g * per_group + i for g in removed for i in range(per_group)]
    share = len(orphans) // heads
    order, silent = [], []
    for position, group in enumerate(kept):
        order += [group * per_group + i for i in range(per_group)]
        adopted = orphans[position * share : (position + 1) * share]
        silent += range(len(order), len(order) + len(adopted))
        order += adopted
    q, o = block.q_proj, block.o_proj
    set_linear(
        q,
        _heads(q.weight, shape.num_heads)[order].flatten(0, 1),
        _heads(q.bias, shape.num_heads)[order].flatten(0, 1) if q.bias is not None else None,
    )
    columns = o.weight.detach().view(shape.hidden_size, shape.num_heads, shape.head_dim)[:, order].clone()
    columns[:, silent] = 0
    set_linear(o, columns.flatten(1), o.bias)


def group_energy(o_weight: Any, output_moment: Any, shape: Attention) -> Any:
    """(num_kv_heads,) mean squared norm of what each KV head's queries add to the residual stream.

    tr(O_g M_g O_g^T) with M = E[a a^T] over o_proj inputs a; Puzzle averages norms, we average their squares, which
    the second moments of the one calibration pass already hold.
    """
    import torch

    width = shape.num_heads // shape.num_kv_heads * shape.head_dim
    energies = []
    for g in range(shape.num_kv_heads):
        columns = slice(g * width, (g + 1) * width)
        part = o_weight[:, columns].float()
        energies.append(((part @ output_moment[columns, columns].float()) * part).sum())
    return torch.stack(energies)
