"""Fewer bits per weight: every matrix of the slot stored as integer codes with a scale per group of columns.

8 bits are rounded to nearest (nothing is left to win there), 4 bits by GPTQ where second moments were gathered. On
disk: compressed-tensors pack-quantized (formats/packed_int.py); `apply` leaves the dequantised values in the modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pennyweight import formats, quantize
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head, Shape
from pennyweight.model.stored import Stored

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 30
STORES = True
STATS = ("input_moment", "inner_moment")
_Matrices = Attention | GatedMLP | Dense | Embedding | Head


@dataclass(frozen=True)
class Spec:
    """Bits per code, columns per scale, and how codes are found."""

    bits: int
    group: int
    method: Literal["rtn", "gptq"] = "rtn"

    @property
    def stored(self) -> Stored:
        return formats.rows_in(self.bits).Spec(self.bits, self.group)

    def __str__(self) -> str:
        return f"int{self.bits} g{self.group}" + (" gptq" if self.method == "gptq" else "")


def options(shape: Shape) -> list[Spec]:
    """4 bits in groups of 128, 64 and 32 where they divide the hidden size; 8 bits in the widest of them.

    A matrix with other columns that the group does not divide gets a smaller group, or (an FFN of odd width) one scale
    per row.
    """
    if not isinstance(shape, _Matrices) or (isinstance(shape, Head) and shape.tied):
        return []
    method = "rtn" if isinstance(shape, Embedding | Head) else "gptq"
    groups = [group for group in (128, 64, 32) if shape.hidden_size % group == 0]
    return [Spec(8, group) for group in groups[:1]] + [Spec(4, group, method) for group in groups]


def reshape(shape: Shape, spec: Spec) -> Shape:
    if not isinstance(shape, _Matrices):
        raise ValueError(f"{shape} has no matrices to store in {spec.bits} bits")
    if shape.hidden_size % spec.group:
        raise ValueError(f"the hidden size of {shape} is not a multiple of the group {spec.group}")
    return replace(shape, stored=spec.stored)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    shape = reshape(parts.shape, spec)
    quantize.store(parts, shape, stats, spec.method)
    return parts.having(shape)
