"""How the codes of a matrix are found: one file a method. And matrices as formats keep them, their codes found so.

A method is a file with `prepare(moment)`, once for all matrices that multiply an activation of this second moment, and
`quantize(weight, prepared, spec) -> (codes, grid)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight import formats, kinds
from pennyweight.model.shapes import Shape
from pennyweight.model.stored import BFLOAT16, Stored

if TYPE_CHECKING:
    import torch

    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

_VALUES_AT_ONCE = 2**25


def pack(
    weight: torch.Tensor, reads: str | None, stats: SlotStats, stored: Stored, method: str
) -> dict[str, torch.Tensor]:
    """The tensors, by suffix, that a matrix is when it is `stored` so. A `method` finds its codes and may look at the
    moments of the activation that it `reads` (model/shapes.py); without moments of its width they are rounded."""
    moment = f"{reads}_moment"
    fits = moment in stats and len(stats[moment]) == weight.shape[1]  # not so for a child narrower than the parent
    quantizer = kinds.load("quantize", method if fits else "rtn")
    prepared = stats.prepared(moment, quantizer) if fits else None

    def find(matrix: torch.Tensor, spec: Stored) -> Any:
        return quantizer.quantize(matrix, prepared, spec)

    activity = stats[moment].diagonal() if fits else None
    return formats.of(stored).encode(weight.detach(), stored, find, activity)


def store(parts: Parts, shape: Shape, stats: SlotStats, method: str) -> None:
    """Replace every matrix of a slot by what `shape` leaves of its values, in place."""
    for weight in shape.weights():
        if not weight.is_matrix or weight.stored == BFLOAT16:
            continue
        matrix, reads = parts.matrix(weight.name).weight.detach(), shape.reads.get(weight.name)
        # Where groups run along rows these do not depend on each other: a large embedding is never held twice.
        rows = len(matrix) if weight.stored.down else max(1, _VALUES_AT_ONCE // matrix.shape[1])
        for part in matrix.split(rows):
            part.copy_(formats.unpack(pack(part, reads, stats, weight.stored, method)))
