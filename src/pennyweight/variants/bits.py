"""Fewer bits per weight: every matrix of the slot stored as integer codes with a scale per group of columns.

8 bits are rounded to nearest (nothing is left to win there), 4 bits by GPTQ where second moments were gathered. On
disk: compressed-tensors pack-quantized (formats/packed_int.py); `apply` leaves the dequantised values in the modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pennyweight import formats, kinds
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head, Shape
from pennyweight.model.stored import Stored

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 30
STORES = True
STATS = ("input_moment", "inner_moment")
_VALUES_AT_ONCE = 2**25
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

    A matrix with other columns that the group does not divide (an FFN of odd width) gets one scale per row.
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


def pack(weight: Any, reads: str | None, stats: SlotStats, stored: Stored, method: str) -> dict[str, Any]:
    """The tensors, by suffix, that a matrix is when it is `stored` so. Its codes are found by a `method` of quantize/,
    which may look at the moments of the activation that it `reads` (model/shapes.py)."""
    moment = f"{reads}_moment"
    fits = moment in stats and len(stats[moment]) == weight.shape[1]  # not so for a child narrower than the parent
    quantizer = kinds.load("quantize", method if fits else "rtn")
    prepared = stats.prepared(moment, quantizer) if fits else None
    activity = stats[moment].diagonal() if fits else None
    find = functools.partial(_find, quantizer, prepared)
    return formats.of(stored).encode(weight.detach(), stored, find, activity)


def _find(quantizer: Any, prepared: Any, weight: Any, spec: Stored) -> Any:
    return quantizer.quantize(weight, prepared, spec)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Replace every matrix by its dequantised values, in place. Rows do not depend on each other: a large embedding is
    done in parts, so that it is never held twice."""
    for name, linear in parts.matrices().items():
        for rows in linear.weight.detach().split(max(1, _VALUES_AT_ONCE // linear.weight.shape[1])):
            packed = pack(rows, parts.shape.reads.get(name), stats, spec.stored, spec.method)
            rows.copy_(formats.unpack(packed))
    return parts.having(reshape(parts.shape, spec))
