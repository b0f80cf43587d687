"""A block taken out altogether, its norms too: the residual stream passes through (Puzzle, arXiv:2411.19146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pennyweight.model.shapes import Attention, GatedMLP, Noop, Shape

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 0
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


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    from pennyweight.live.blocks import replace_block

    return replace_block(parts, reshape(parts.shape, spec))
