"""A packed matrix as the tensors it consists of, whichever of our formats they are in.

On disk the parts of `model.layers.0.mlp.up_proj.weight` are `model.layers.0.mlp.up_proj.weight_<part>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from pennyweight.formats import packed_int, zigzag
from pennyweight.formats._grid import Grid
from pennyweight.model.stored import Stored

_PARTS = ("packed", "scale", "zigzag", "layout", "row_scale", "order", "shape")
SUFFIXES = tuple(f"weight_{part}" for part in _PARTS)
_NOT_READ = {"zero_point": "scales with zero points", "g_idx": "groups of reordered columns"}


def parts(name: str, there: Iterable[str], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of the matrix `name` among the tensors called `there`, by suffix; none if it is not packed. Raises
    ValueError for parts that compressed-tensors has and we do not read: without them the weights would be others."""
    known = there if isinstance(there, Mapping | set | frozenset) else set(there)
    for part, meaning in _NOT_READ.items():
        if f"{name}_{part}" in known:
            raise ValueError(f"{name} is stored with {meaning} ({name}_{part}), which pennyweight does not read")
    return {f"weight_{part}": read(f"{name}_{part}") for part in _PARTS if f"{name}_{part}" in known}


def shape_of(found: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = (int(n) for n in found["weight_shape"])
    return rows, columns


def stored_of(found: Mapping[str, torch.Tensor]) -> Stored:
    """How the matrix is kept. Raises ValueError for parts that do not belong together."""
    if "weight_zigzag" in found:
        spec = zigzag.spec_of(found)
        return Stored(4, spec.group, down=True, scales=spec.scales, ordered="weight_order" in found)
    return packed_int.spec_of(found)


def unpack(found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (rows, columns), bfloat16 or float32 as its format computes it. Raises ValueError for parts that do
    not belong together."""
    return zigzag.unpack(found) if "weight_zigzag" in found else packed_int.unpack(found)


def pack(
    codes: torch.Tensor,
    grid: Grid,
    stored: Stored,
    *,
    row_scale: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Codes and grid as quantisers give them (quantize/_grids.py). `row_scale` (rows,) and `order` (columns,) only
    where groups run down (formats/zigzag.py)."""
    if not stored.down:
        return packed_int.pack(codes, grid, stored.over(codes.shape[1]))
    spec = zigzag.Spec(stored.group, stored.scales)
    whole = zigzag.Spec(stored.group, stored.scales, -(-len(codes) // spec.whole) * spec.whole)
    signed = grid.minimum is None
    return zigzag.pack((codes + 8 if signed else codes).to(torch.uint8), grid, whole, row_scale, order)
