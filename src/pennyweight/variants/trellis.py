"""Trellis codes: few bits a weight with less error than rounded codes of as many (formats/trellis.py).

Asked for: only pennyweight's engine reads them, and reading takes arithmetic, so that few bits save memory more than
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pennyweight.formats import trellis
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head, Shape
from pennyweight.model.stored import BFLOAT16, Stored
from pennyweight.variants.bits import STATS, apply, reshape

__all__ = ["DEFAULT", "PLACE", "STATS", "STORES", "Spec", "apply", "options", "reshape"]

PLACE = 34
STORES = True
DEFAULT = False
_GROUPS = (64, 32)


@dataclass(frozen=True)
class Spec:
    """Bits a weight, columns per scale, and how codes are found."""

    bits: int
    group: int
    method: Literal["rtn", "gptq"] = "gptq"

    @property
    def stored(self) -> Stored:
        return trellis.Spec(self.bits, self.group)

    def __str__(self) -> str:
        return f"trellis{self.bits} g{self.group}" + (" gptq" if self.method == "gptq" else "")


def options(shape: Shape) -> list[Spec]:
    """2 to 5 bits for blocks, 3 to 5 for embeddings and the head, in groups of 64 or else 32 where these divide the
    hidden size. With 6 bits rounding is as good."""
    group = next((group for group in _GROUPS if shape.hidden_size % group == 0), None)
    if group is None or shape.stored != BFLOAT16:
        return []
    if isinstance(shape, Embedding) or (isinstance(shape, Head) and not shape.tied):
        return [Spec(bits, group, "rtn") for bits in (3, 4, 5)]
    return [Spec(bits, group) for bits in (2, 3, 4, 5)] if isinstance(shape, Attention | GatedMLP | Dense) else []
