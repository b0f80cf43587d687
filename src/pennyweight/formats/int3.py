"""Rows in 3 bits, packed without a gap: half a bit more than 3 a weight with a scale for 32 columns.

A matrix W (rows, columns) becomes
    <name>.weight_planes  int32 (rows, ceil(columns / 32), 3): bit b of column 32 i + j's code, of word (i, b) bit j
    <name>.weight_scale   bfloat16 (rows, columns / group)
    <name>.weight_shape   int64 (2,): rows, columns
and W is (code - 4) * scale with codes from 0 to 7. compressed-tensors' own 3 bits put ten codes into a word, which is
3.2; transformers does not read these. The engine holds them as 4-bit codes: they save disk, not memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pennyweight.formats import Find, packed_int
from pennyweight.model.stored import Stored

if TYPE_CHECKING:
    import torch

BITS = (3,)
MARK = "weight_planes"
PARTS = (MARK, "weight_scale", "weight_shape")
IN_PLACE = False
CONFIG_FORMAT = "pennyweight-int3"
_WORD = 32


@dataclass(frozen=True)
class Spec(Stored):
    """Columns per scale; always 3 bits."""

    bits: int = 3  # type: ignore[misc]
    group: int = 32  # type: ignore[misc]
    format: ClassVar[str] = "int3"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raises ValueError for another number of bits, or groups that are empty."""
        if self.bits != 3 or self.group < 1:
            raise ValueError(f"{self}: 3 bits, and at least one column a group")

    def over(self, columns: int) -> Spec:
        """With one scale a row where the group does not divide the columns."""
        return self if columns % self.group == 0 else Spec(3, columns)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight_planes": ("I32", (rows, -(-columns // _WORD), 3)),
            "weight_scale": ("BF16", (rows, columns // self.over(columns).group)),
            "weight_shape": ("I64", (2,)),
        }

    def resident_bytes(self, rows: int, columns: int) -> int:
        """The engine holds 4-bit codes."""
        return packed_int.Spec(4, self.over(columns).group).resident_bytes(rows, columns)


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A matrix (rows, columns) as tensors by suffix."""
    own = spec.over(weight.shape[1])
    codes, grid = find(weight, own)
    return _pack(codes, grid.scale)


def _pack(codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes (rows, columns) -4 to 3, scale (rows, groups)."""
    import torch

    rows, columns = codes.shape
    full = torch.zeros(rows, -(-columns // _WORD) * _WORD, dtype=torch.int64)
    full[:, :columns] = codes.long() + 4
    bits = full.view(rows, -1, 1, _WORD) >> torch.arange(3).view(3, 1) & 1
    words = (bits << torch.arange(_WORD)).sum(dim=-1)  # as unsigned; the highest bit is a sign on disk
    return {
        "weight_planes": torch.where(words >= 2**31, words - 2**32, words).to(torch.int32),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _planes(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(rows, columns) int8, -4 to 3. Raises ValueError if the tensors do not belong together."""
    import torch

    (rows, columns), planes = shape_of(parts), parts[MARK]
    if planes.shape != (rows, -(-columns // _WORD), 3) or planes.dtype != torch.int32:
        raise ValueError(f"planes of {tuple(planes.shape)} {planes.dtype} are no 3 bits of {rows} x {columns}")
    bits = planes.unsqueeze(-1) >> torch.arange(_WORD, dtype=torch.int32) & 1
    codes = (bits << torch.arange(3, dtype=torch.int32).view(3, 1)).sum(dim=2)
    return (codes.view(rows, -1)[:, :columns] - 4).to(torch.int8)


def codes(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, columns) int8, -4 to 3, and scales (rows, groups)."""
    return _planes(parts), parts["weight_scale"]


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Raises ValueError if the scales are not whole groups of the columns."""
    (rows, columns), scale = shape_of(parts), parts["weight_scale"]
    if scale.dim() != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ValueError(f"scales of {tuple(scale.shape)} do not belong to {rows} x {columns}")
    return Spec(3, columns // scale.shape[1])


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    return packed_int.shape_of(parts)


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """code * scale in bfloat16, rounded once. Raises ValueError if the tensors do not belong together."""
    spec_of(parts)
    return packed_int.dequantize(_planes(parts), parts["weight_scale"])


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return _pack(_planes(parts)[:rows], parts["weight_scale"][:rows])


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """Raises ValueError if they are not whole groups."""
    group = spec_of(parts).group
    if columns % group:
        raise ValueError(f"{columns} columns are not whole groups of {group}")
    return _pack(_planes(parts)[:, :columns], parts["weight_scale"][:, : columns // group])


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """As 4-bit codes of the same values."""
    from pennyweight.formats import Grid

    spec = spec_of(parts)
    wider = packed_int.pack(_planes(parts), Grid(parts["weight_scale"]), packed_int.Spec(4, spec.group))
    return packed_int.native(name, wider, in_place=in_place)


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Codes are spread evenly; the deviation of the weights is about 0.02."""
    import torch

    own, count = spec.over(columns), rows * columns
    codes = torch.randint(-4, 4, (min(distinct, count),), generator=generator, dtype=torch.int8)
    codes = codes.repeat(-(-count // len(codes)))[:count].view(rows, columns)
    return _pack(codes, torch.full((rows, columns // own.group), 0.02 / (0.29 * 8)))


def config_group(spec: Spec, targets: list[str]) -> dict[str, object]:
    """The entry of `quantization_config.config_groups`. transformers stops at the format."""
    return {**packed_int.config_group(packed_int.Spec(3, spec.group), targets), "format": CONFIG_FORMAT}
