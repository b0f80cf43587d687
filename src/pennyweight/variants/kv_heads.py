"""Fewer key-value heads, in two ways that need no training (Puzzle, arXiv:2411.19146, and its public code).

mean: the K and V projections of neighbouring heads are averaged (as GQA conversion does).
best: the heads whose queries put most energy through o_proj stay as they are; the query heads of the removed ones are
attached to the kept ones and their o_proj columns set to zero, where training may revive them. Ours: the columns of the
heads that stay are fitted in least squares to what all of them gave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pennyweight.live.least_squares import without
from pennyweight.model.shapes import Attention, Shape

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 10
STATS = ("inner_moment",)
TRAINS = True


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


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Edit k, v and, for `best`, the order of query heads in q and o."""
    shape = parts.shape
    assert isinstance(shape, Attention)
    inner = None
    if spec.heads < shape.num_kv_heads and spec.init == "mean":
        _mean(parts, spec.heads)
    elif spec.heads < shape.num_kv_heads:
        inner = _best(parts, spec.heads, stats["inner_moment"])
    parts.block.num_key_value_groups = shape.num_heads // spec.heads
    if hasattr(parts.block, "num_key_value_heads"):  # by which what comes out of a joined matrix is taken apart
        parts.block.num_key_value_heads = spec.heads
    return parts.having(reshape(shape, spec), inner=inner)


def _heads(tensor: Any, count: int) -> Any:
    """(count * head_dim, ...) -> (count, head_dim, ...)."""
    return tensor.detach().view(count, -1, *tensor.shape[1:])


def _regroup(parts: Parts, matrices: tuple[str, ...], count: int, new: Any) -> None:
    """Change the heads of projections: `new` maps (count, head_dim, ...) of their weights, biases and, where that spans
    all heads, the weights of their norm."""
    from pennyweight.live.parts import set_linear

    for name in matrices:
        linear, norm = parts.matrix(name), name.replace("_proj", "_norm")
        bias = None if linear.bias is None else new(_heads(linear.bias, count)).flatten(0, 1)
        set_linear(linear, new(_heads(linear.weight, count)).flatten(0, 1), bias)
        if getattr(parts.shape, "qk_norm", None) == "all heads" and norm in ("q_norm", "k_norm"):
            weight = parts.parameter(norm)
            weight.data = new(_heads(weight, count)).flatten(0, 1).contiguous()


def _mean(parts: Parts, heads: int) -> None:
    shape: Any = parts.shape

    def pooled(own: Any) -> Any:
        return own.float().view(heads, -1, *own.shape[1:]).mean(dim=1).to(own.dtype)

    _regroup(parts, ("k_proj", "v_proj"), shape.num_kv_heads, pooled)


def _best(parts: Parts, heads: int, inner_moment: Any) -> Any:
    """Which inner channel of before stands where; -1 for those of heads that now attend to another one's keys."""
    import torch

    from pennyweight.live.parts import set_linear

    shape: Any = parts.shape
    o = parts.matrix("o_proj")
    per_group = shape.num_heads // shape.num_kv_heads
    energy = group_energy(o.weight.detach(), inner_moment, shape)
    ranked = torch.argsort(energy, descending=True, stable=True).tolist()
    kept, removed = sorted(ranked[:heads]), sorted(ranked[heads:])
    _regroup(parts, ("k_proj", "v_proj"), shape.num_kv_heads, lambda own: own[kept])
    orphans = [g * per_group + i for g in removed for i in range(per_group)]
    share = len(orphans) // heads
    order, silent = [], []
    for position, group in enumerate(kept):
        order += [group * per_group + i for i in range(per_group)]
        adopted = orphans[position * share : (position + 1) * share]
        silent += range(len(order), len(order) + len(adopted))
        order += adopted
    _regroup(parts, ("q_proj",), shape.num_heads, lambda own: own[order])
    heads_of = torch.arange(shape.inner_size).view(shape.num_heads, shape.head_dim)
    speaking = [place for place in range(len(order)) if place not in silent]
    staying = heads_of[[order[place] for place in speaking]].flatten()
    columns = torch.zeros(shape.hidden_size, shape.num_heads, shape.head_dim)
    fitted = without(o.weight.detach(), inner_moment, staying)
    columns[:, speaking] = fitted.view(shape.hidden_size, len(speaking), shape.head_dim)
    set_linear(o, columns.flatten(1), o.bias)
    channels = heads_of[order]
    channels[silent] = -1
    return channels.flatten()


def group_energy(o_weight: Any, inner_moment: Any, shape: Attention) -> Any:
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
        energies.append(((part @ inner_moment[columns, columns].float()) * part).sum())
    return torch.stack(energies)
