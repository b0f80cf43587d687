"""How the codes of a matrix are found: one file a method. And matrices as formats keep them, their codes found so.

A method is a file with `prepare(moment)`, once for all matrices that multiply an activation of this second moment, and
`quantize(weight, prepared, spec) -> (codes, grid)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pennyweight import formats, kinds
from pennyweight.model.shapes import Shape
from pennyweight.model.stored import BFLOAT16, Stored

if TYPE_CHECKING:
    import torch

    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

_VALUES_AT_ONCE = 2**23
_WHOLE = 1024  # rows that trellis codes do not part


def pack(
    weight: torch.Tensor, reads: str | None, stats: SlotStats, stored: Stored, method: str
) -> dict[str, torch.Tensor]:
    """The tensors, by suffix, that a matrix is when it is `stored` so. A `method` finds its codes and may look at the
    moments of the activation that it `reads` (model/shapes.py); without moments they are rounded."""
    parts = [_pack(part, reads, stats, stored, method) for part in _parts(weight, stored)]
    return parts[0] if len(parts) == 1 else formats.joined(parts)


def _parts(weight: torch.Tensor, stored: Stored) -> Iterator[torch.Tensor]:
    """Where groups run along rows these do not depend on each other: a large embedding is never held twice."""
    some = max(1, _VALUES_AT_ONCE // weight.shape[1] // _WHOLE) * _WHOLE
    yield from weight.split(len(weight) if stored.down else some)


def _pack(
    weight: torch.Tensor, reads: str | None, stats: SlotStats, stored: Stored, method: str
) -> dict[str, torch.Tensor]:
    moment = f"{reads}_moment"
    fits = moment in stats
    assert not fits or len(stats[moment]) == weight.shape[1], f"{moment} of {len(stats[moment])} for {weight.shape[1]}"
    name = method if fits else "rtn"

    def find_all() -> dict[str, torch.Tensor]:
        quantizer = kinds.load("quantize", name)
        prepared = stats.prepared(moment, quantizer) if fits else None

        def find(matrix: torch.Tensor, spec: Stored) -> Any:
            return quantizer.quantize(matrix, prepared, spec)

        activity = _diagonal(stats[moment]) if fits else None
        return formats.of(stored).encode(weight.detach(), stored, find, activity)

    if stats.codes is None or quick(stored, name):
        return find_all()
    return stats.codes.of(weight, f"{stored.format} {stored} {name} {stats.named(moment) if fits else None}", find_all)


def quick(stored: Stored, method: str) -> bool:
    """Whether codes are found in less time than it takes to read them back."""
    return method == "rtn" and stored.bits >= 8


def _diagonal(moment: torch.Tensor) -> torch.Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()


def store(parts: Parts, shape: Shape, stats: SlotStats, method: str) -> None:
    """Replace every matrix of a slot by what `shape` leaves of its values, in place."""
    for weight in shape.weights():
        if not weight.is_matrix or weight.stored == BFLOAT16:
            continue
        matrix, reads = parts.matrix(weight.name).weight.detach(), shape.reads.get(weight.name)
        for part in _parts(matrix, weight.stored):
            part.copy_(formats.unpack(_pack(part, reads, stats, weight.stored, method)))
