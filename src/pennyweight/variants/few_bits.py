"""Fewer than 4 bits per weight, where a format keeps such rows. Asked for: transformers reads none of these formats.

Half a bit less than 4 in wide groups pays where a budget leaves no other way; a scale for every 32 columns is needed.
"""

from __future__ import annotations

from pennyweight import formats
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.stored import BFLOAT16
from pennyweight.variants import bits
from pennyweight.variants.bits import STATS, Spec, apply, reshape

__all__ = ["DEFAULT", "PLACE", "STATS", "STORES", "Spec", "apply", "options", "reshape"]

PLACE = 33
STORES = True
DEFAULT = False


def options(shape: Shape) -> list[Spec]:
    """Every number of bits below 4 that there is, in the narrowest group that divides the hidden size."""
    if not isinstance(shape, Attention | GatedMLP) or shape.stored != BFLOAT16:
        return []
    groups = [spec.group for spec in bits.options(shape) if spec.bits == 4]
    return [Spec(few, min(groups), "gptq") for few in formats.row_bits() if few < 4 and groups]
