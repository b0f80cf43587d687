"""A sliding window: attention sees the last W tokens, so its KV cache stops growing there.

The same weights are valid without training; texts up to W tokens are computed exactly as by the parent, which is why
scores taken on short texts are blind to windows (section on the window extension, arXiv:2602.11937).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pennyweight.model.shapes import Attention, Shape

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 20
STATS = ()
SIZES = (8192, 4096, 2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Spec:
    """Tokens seen, the current one included."""

    tokens: int

    def __str__(self) -> str:
        return f"window {self.tokens}"


def options(shape: Shape) -> list[Spec]:
    """Powers of two from 64 to 8192, below the parent's own window. Which of them a workload's context makes
    pointless is decided where offers are made."""
    if not isinstance(shape, Attention):
        return []
    return [Spec(size) for size in SIZES if shape.window is None or size < shape.window]


def reshape(shape: Shape, spec: Spec) -> Attention:
    if not isinstance(shape, Attention) or spec.tokens < 1:
        raise ValueError(f"a window of {spec.tokens} does not fit {shape}")
    return replace(shape, window=spec.tokens)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Narrow the attention's mask."""
    from pennyweight.live.blocks import set_window

    set_window(parts.block, spec.tokens)
    return parts.having(reshape(parts.shape, spec))
