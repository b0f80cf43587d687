"""A block taken out altogether, its norm too: the residual stream passes through (Puzzle, arXiv:2411.19146)."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Attention, GatedMLP, Noop, Shape
from pennyweight.variants._common import Stats, with_shape

STATS = ()


@dataclass(frozen=True)
class Spec:
    """Nothing to say: it is gone."""

    def __str__(self) -> str:
        return "none"


def options(shape: Shape) -> list[Spec]:
    return [Spec()] if isinstance(shape, Attention | GatedMLP) else []


def reshape(shape: Shape, spec: Spec) -> Noop:
    if not isinstance(shape, Attention | GatedMLP):
        raise ValueError(f"{shape} cannot be taken out")
    return Noop(hidden_size=shape.hidden_size)


def apply(parts: Parts, spec: Spec, stats: Stats) -> Parts:
    from pennyweight.live.blocks import SkippedAttention, SkippedMLP

    attention = isinstance(parts.shape, Attention)
    parts.replace_block(SkippedAttention(parts.block.layer_idx) if attention else SkippedMLP())
    parts.drop_norm()
    return with_shape(parts, reshape(parts.shape, spec))
