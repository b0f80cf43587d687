"""Rows in 3, 5 or 6 bits, packed without a gap: half a bit more a weight with a scale for 32 columns.

A matrix W (rows, columns) in b bits becomes
    <name>.weight_planes  int32 (rows, ceil(columns / 32), b): bit i of column 32 w + j's code, of word (w, i) bit j
    <name>.weight_scale   bfloat16 (rows, columns / group)
    <name>.weight_shape   int64 (2,): rows, columns
and W is (code - 2^(b - 1)) * scale with codes from 0 to 2^b - 1. compressed-tensors' own 3, 5 and 6 bits leave gaps in
words (ten, six and five codes to one); transformers does not read these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pennyweight.formats import Find, packed_int, refuse_damage
from pennyweight.model.stored import Stored, fitting

if TYPE_CHECKING:
    import torch

BITS = (3, 5, 6)
MARK = "weight_planes"
PARTS = (MARK, "weight_scale", "weight_shape")
IN_PLACE = False
CONFIG_FORMAT = "pennyweight-planes"
_WORD = 32


@dataclass(frozen=True)
class Spec(Stored):
    """Bits per code (3, 5 or 6) and columns per scale."""

    bits: int  # type: ignore[misc]
    group: int  # type: ignore[misc]
    format: ClassVar[str] = "planes"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raises ValueError for another number of bits, or groups that are empty."""
        if self.bits not in BITS or self.group < 1:
            raise ValueError(f"{self}: {', '.join(map(str, BITS))} bits, and at least one column a group")

    def over(self, columns: int) -> Spec:
        """In a smaller group, or one scale a row, where the group does not divide the columns."""
        group = fitting(self.group, columns)
        return self if group == self.group else Spec(self.bits, group)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight_planes": ("I32", (rows, -(-columns // _WORD), self.bits)),
            "weight_scale": ("BF16", (rows, columns // self.over(columns).group)),
            "weight_shape": ("I64", (2,)),
        }

    def resident_bytes(self, rows: int, columns: int) -> int:
        """In the engine's order, as rows of other bits are."""
        return packed_int.Spec(self.bits, self.group).resident_bytes(rows, columns)


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A matrix (rows, columns) as tensors by suffix."""
    own = spec.over(weight.shape[1])
    codes, grid = find(weight, own)
    return _pack(codes, grid.scale, own.bits)


def _pack(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """codes (rows, columns) around zero, scale (rows, groups)."""
    import torch

    rows, columns = codes.shape
    words = torch.empty(rows, -(-columns // _WORD), bits, dtype=torch.int32)
    place = torch.arange(_WORD)
    for first in range(0, rows, step := max(1, packed_int.BLOCK_VALUES // 8 // columns)):
        own = codes[first : first + step]
        full = torch.zeros(len(own), words.shape[1] * _WORD, dtype=torch.int64)
        full[:, :columns] = own.long() + (1 << bits - 1)
        for bit in range(bits):  # as unsigned; the highest bit of a word is a sign on disk
            word = ((full >> bit & 1).view(len(own), -1, _WORD) << place).sum(dim=-1)
            words[first : first + step, :, bit] = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
    return {
        "weight_planes": words,
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _codes(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(rows, columns) int8 around zero. Raises ValueError if the tensors do not belong together."""
    import torch

    (rows, columns), planes, bits = shape_of(parts), parts[MARK], spec_of(parts).bits
    found = torch.empty(rows, columns, dtype=torch.int8)
    place = torch.arange(_WORD, dtype=torch.int32)
    for first in range(0, rows, step := max(1, packed_int.BLOCK_VALUES // 8 // columns)):
        own = planes[first : first + step]
        code = torch.zeros(len(own), planes.shape[1], _WORD, dtype=torch.int32)
        for bit in range(bits):
            code += (own[:, :, bit, None] >> place & 1) << bit
        found[first : first + step] = code.view(len(own), -1)[:, :columns] - (1 << bits - 1)
    return found


def codes(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, columns) int8 around zero and scales (rows, groups)."""
    return _codes(parts), parts["weight_scale"]


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Raises ValueError for planes of another number of bits, and if the scales are not whole groups of the columns."""
    import torch

    (rows, columns), planes, scale = shape_of(parts), parts[MARK], parts["weight_scale"]
    if planes.dim() != 3 or planes.shape[2] not in BITS or planes.dtype != torch.int32:
        raise ValueError(f"planes of {tuple(planes.shape)} {planes.dtype}; (rows, words, 3, 5 or 6) int32 are read")
    if planes.shape[:2] != (rows, -(-columns // _WORD)):
        raise ValueError(f"planes of {tuple(planes.shape)} do not belong to {rows} x {columns}")
    if scale.dim() != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ValueError(f"scales of {tuple(scale.shape)} do not belong to {rows} x {columns}")
    return Spec(planes.shape[2], columns // scale.shape[1])


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    return packed_int.shape_of(parts)


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """code * scale in bfloat16, rounded once. Raises ValueError if the tensors do not belong together."""
    return packed_int.dequantize(_codes(parts), parts["weight_scale"])


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows, without unpacking."""
    _, columns = shape_of(parts)
    return _sliced(parts, rows, columns)


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """The first `columns` columns, without unpacking. Raises ValueError unless they are whole words and groups."""
    group = spec_of(parts).group
    if columns % group or columns % _WORD:
        raise ValueError(f"{columns} columns are not whole words and whole groups of {group}")
    return _sliced(parts, shape_of(parts)[0], columns)


def _sliced(parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> dict[str, torch.Tensor]:
    import torch

    return {
        "weight_planes": parts[MARK][:rows, : -(-columns // _WORD)].contiguous(),
        "weight_scale": parts["weight_scale"][:rows, : columns // spec_of(parts).group].contiguous(),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """Put in the order of the kernels; codes and scales stay what they are."""
    import torch

    from pennyweight import _native

    spec, (_, columns) = spec_of(parts), shape_of(parts)
    refuse_damage(f"{name}_scale", parts["weight_scale"])
    planes = parts[MARK].contiguous().flatten(1).numpy().view(np.uint8)
    scales = parts["weight_scale"].to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    return _native.Matrix.rows(planes, scales, None, columns, spec.bits, spec.group, True)


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Codes are spread evenly; the deviation of the weights is about 0.02."""
    import torch

    own, count, half = spec.over(columns), rows * columns, 1 << spec.bits - 1
    codes = torch.randint(-half, half, (min(distinct, count),), generator=generator, dtype=torch.int8)
    codes = codes.repeat(-(-count // len(codes)))[:count].view(rows, columns)
    scale = 0.02 / (0.29 * 2 * half)  # 0.29 of their range is the deviation of the codes
    return _pack(codes, torch.full((rows, columns // own.group), scale), own.bits)


def config_group(spec: Spec, targets: list[str]) -> dict[str, object]:
    """The entry of `quantization_config.config_groups`. transformers stops at the format."""
    return {**packed_int.config_group(packed_int.Spec(spec.bits, spec.group), targets), "format": CONFIG_FORMAT}
