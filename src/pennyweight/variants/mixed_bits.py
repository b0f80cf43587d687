"""Two widths in one block: 8 bits for the matrix that reads what the block has computed (o_proj, down_proj) and 4 for
those that read its input, or the other way round.

Which of them suffers more from 4 bits differs from block to block; llama.cpp's K_M mixes decide it by rule, here the
search does. Between 4 and 8 bits for all there is nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pennyweight import quantize
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.stored import BFLOAT16
from pennyweight.variants import bits

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 32
STORES = True
DEFAULT = False
STATS = bits.STATS


@dataclass(frozen=True)
class Spec:
    """Bits of the matrices that read the block's input and of the one that reads its inner activation."""

    entering: int
    inner: int
    group: int
    method: Literal["rtn", "gptq"] = "gptq"

    def __str__(self) -> str:
        return f"int{self.entering}/{self.inner} g{self.group}" + (" gptq" if self.method == "gptq" else "")


def options(shape: Shape) -> list[Spec]:
    """Both ways round, in the widest group of 128, 64 and 32 that divides the hidden size."""
    if not isinstance(shape, Attention | GatedMLP) or shape.stored != BFLOAT16:
        return []
    groups = [group for group in (128, 64, 32) if shape.hidden_size % group == 0]
    return [Spec(*pair, group) for group in groups[:1] for pair in ((4, 8), (8, 4))]


def reshape(shape: Shape, spec: Spec) -> Shape:
    if not isinstance(shape, Attention | GatedMLP):
        raise ValueError(f"{shape} has no inner activation")
    entering, inner = (bits.Spec(count, spec.group).stored for count in (spec.entering, spec.inner))
    return replace(shape, stored=entering, apart=tuple((name, inner) for name in shape.readers("inner")))


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    shape = reshape(parts.shape, spec)
    quantize.store(parts, shape, stats, spec.method)
    return parts.having(shape)
