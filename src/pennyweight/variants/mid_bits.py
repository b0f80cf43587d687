"""Five and six bits per weight, between the two widths that transformers reads. Asked for: it does not read these.

They fill the gap between 4 bits and 8, for embeddings and the head as well, which have no other width in between.
"""

from __future__ import annotations

from pennyweight.model.shapes import Shape
from pennyweight.model.stored import BFLOAT16
from pennyweight.variants import bits
from pennyweight.variants.bits import STATS, Spec, apply, reshape

__all__ = ["DEFAULT", "PLACE", "STATS", "STORES", "Spec", "apply", "options", "reshape"]

PLACE = 35
STORES = True
DEFAULT = False


def options(shape: Shape) -> list[Spec]:
    """5 bits in the narrowest group that divides the hidden size, 6 in the widest; found as codes of 4 bits are."""
    if getattr(shape, "stored", None) != BFLOAT16:
        return []
    fours = [spec for spec in bits.options(shape) if spec.bits == 4]
    groups = [spec.group for spec in fours]
    return [Spec(5, min(groups), fours[0].method), Spec(6, max(groups), fours[0].method)] if fours else []
