"""Integer weights as compressed-tensors stores them: `pack-quantized`, symmetric, one scale per group of columns.

A matrix W (rows, columns) becomes
    <name>.weight_packed  int32 (rows, ceil(columns * bits / 32)): codes + 2**(bits-1), lowest bits first
    <name>.weight_scale   bfloat16 (rows, columns / group); float16 where others wrote it so
    <name>.weight_shape   int64 (2,): rows, columns
and W is code * scale with codes in [-2**(bits-1), 2**(bits-1) - 1]. vLLM and transformers read this layout; packing
is ours because the library packs whole models, and we go matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pennyweight.formats import STOCK, Find, Grid, numbers, refuse_damage
from pennyweight.model.stored import Stored, fitting

if TYPE_CHECKING:
    import torch

BITS = (4, 8)
BLOCK_VALUES = 2**22
"""Large matrices are worked on in blocks of rows of about this many values, to bound what is held in between."""

MARK = "weight_packed"
PARTS = (MARK, "weight_scale", "weight_shape")
IN_PLACE = False
CONFIG_FORMAT = STOCK


@dataclass(frozen=True)
class Spec(Stored):
    """bits per code (4 or 8) and columns per scale."""

    bits: int  # type: ignore[misc]
    group: int  # type: ignore[misc]

    @property
    def format(self) -> str:
        return "packed_int"

    def over(self, columns: int) -> Spec:
        """In a smaller group, or one scale a row, where the group does not divide the columns."""
        group = fitting(self.group, columns)
        return self if group == self.group else Spec(self.bits, group)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Codes of a row are packed into whole words."""
        return {
            "weight_packed": ("I32", (rows, -(-columns * self.bits // 32))),
            "weight_scale": ("BF16", (rows, columns // self.over(columns).group)),
            "weight_shape": ("I64", (2,)),
        }

    def resident_bytes(self, rows: int, columns: int) -> int:
        """In the engine's order: tiles of 16 rows, groups filled up to whole 32 columns (native/matrices.h, Rows)."""
        group = self.over(columns).group
        tiles, filled = -(-rows // 16), -(-group // 32) * 32
        return tiles * columns // group * (16 * filled * self.bits // 8 + 16 * 2)


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A matrix (rows, columns) as tensors by suffix."""
    own = spec.over(weight.shape[1])
    return pack(*find(weight, own), own)


def pack(codes: torch.Tensor, grid: Grid, spec: Spec) -> dict[str, torch.Tensor]:
    """codes (rows, columns) integer, scales (rows, columns / group) bfloat16 -> the three tensors by suffix.

    Raises ValueError if shapes do not match the spec or a code is out of range.
    """
    import torch

    (rows, columns), scale = codes.shape, grid.scale
    low, high = spec.limits
    if spec.bits not in BITS or spec.group < 1:
        raise ValueError(f"{spec} cannot be packed: bits must be one of {BITS}, the group at least 1")
    if columns % spec.group or scale.shape != (rows, columns // spec.group):
        raise ValueError(f"codes {tuple(codes.shape)} and scale {tuple(scale.shape)} do not fit group {spec.group}")
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; {spec.bits} bits hold {low}..{high}")
    per_word = 32 // spec.bits
    packed = torch.zeros(rows, -(-columns // per_word), dtype=torch.int32)
    for i in range(per_word):
        lane = codes[:, i::per_word].to(torch.int32) - low
        packed[:, : lane.shape[1]] |= lane << (spec.bits * i)
    return {
        "weight_packed": packed,
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Bits and group, read off the shapes of the three tensors. Raises ValueError if these leave the bits open (up to 4
    columns fit one word in 4 bits and in 8), and for scales in other than 16 bits."""
    import torch

    rows, columns = shape_of(parts)
    bits = [b for b in BITS if parts["weight_packed"].shape == (rows, -(-columns // (32 // b)))]
    groups = parts["weight_scale"].shape[-1] if parts["weight_scale"].dim() == 2 else 0
    if len(bits) != 1 or not groups or columns % groups or parts["weight_scale"].shape != (rows, groups):
        shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        raise ValueError(f"{shapes} is no packed matrix of {rows} x {columns} in {BITS} bits")
    if parts["weight_scale"].dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"scales are stored as {parts['weight_scale'].dtype}; bfloat16 and float16 are read")
    return Spec(bits[0], columns // groups)


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns. Raises ValueError for a weight_shape that is none."""
    rows, columns = numbers(parts, "weight_shape", 2)
    return rows, columns


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix in the type of its scales, exactly what compressed-tensors and vLLM compute: code * scale, rounded
    once.

    Raises ValueError if the three tensors do not belong together.
    """
    import torch

    spec = spec_of(parts)
    rows, columns = shape_of(parts)
    out = torch.empty(rows, columns, dtype=parts["weight_scale"].dtype)
    step = max(1, BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        part = _codes(parts["weight_packed"][start : start + step], spec, columns)
        out[start : start + step] = _times(part, parts["weight_scale"][start : start + step])
    return out


def codes(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, columns) int8 and scales (rows, groups). Raises ValueError as `unpack`."""
    import torch

    spec, (_, columns) = spec_of(parts), shape_of(parts)
    words = parts["weight_packed"].split(max(1, BLOCK_VALUES // columns))
    return torch.cat([_codes(part, spec, columns).to(torch.int8) for part in words]), parts["weight_scale"]


def _codes(words: torch.Tensor, spec: Spec, columns: int) -> torch.Tensor:
    """Of packed rows, (rows, columns) int32."""
    import torch

    low, _ = spec.limits
    mask = (1 << spec.bits) - 1
    unpacked = torch.stack([(words >> (spec.bits * i)) & mask for i in range(32 // spec.bits)], dim=-1)
    return unpacked.view(len(words), -1)[:, :columns] + low


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code * scale in bfloat16; codes (rows, columns), scale (rows, groups)."""
    import torch

    return _times(codes, scale.to(torch.bfloat16))


def _times(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=scale.dtype)
    step = max(1, BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        block, factor = codes[start : start + step], scale[start : start + step]
        grouped = block.to(scale.dtype).view(len(block), scale.shape[1], columns // scale.shape[1])
        out[start : start + step] = (grouped * factor.unsqueeze(-1)).view(len(block), columns)
    return out


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows, without unpacking."""
    shape = parts["weight_shape"].clone()
    shape[0] = rows
    return {
        "weight_packed": parts["weight_packed"][:rows],
        "weight_scale": parts["weight_scale"][:rows],
        "weight_shape": shape,
    }


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """The first `columns` columns, without unpacking. Raises ValueError unless they are whole words and groups."""
    spec, words = spec_of(parts), columns * spec_of(parts).bits // 32
    if columns * spec.bits % 32 or columns % spec.group:
        raise ValueError(f"{columns} columns are not whole words and whole groups of {spec}")
    shape = parts["weight_shape"].clone()
    shape[1] = columns
    return {
        "weight_packed": parts["weight_packed"][:, :words].contiguous(),
        "weight_scale": parts["weight_scale"][:, : columns // spec.group].contiguous(),
        "weight_shape": shape,
    }


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """Put in the order of the kernels; codes and scales stay what they are."""
    import torch

    from pennyweight import _native

    spec, (_, columns) = spec_of(parts), shape_of(parts)
    refuse_damage(f"{name}_scale", parts["weight_scale"])
    codes = parts["weight_packed"].numpy().view(np.uint8)
    brain = parts["weight_scale"].dtype == torch.bfloat16
    scales = parts["weight_scale"].contiguous().view(torch.int16).numpy().view(np.uint16)
    return _native.Matrix.rows(codes, scales, None, columns, spec.bits, spec.group, brain)


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Codes are spread evenly; the deviation of the weights is about 0.02."""
    import torch

    own, (low, high) = spec.over(columns), spec.limits
    codes = torch.randint(low, high + 1, (min(distinct, rows * columns),), generator=generator, dtype=torch.int8)
    codes = codes.repeat(-(-rows * columns // len(codes)))[: rows * columns].view(rows, columns)
    scale = 0.02 / (0.29 * (high - low + 1))  # 0.29 of their range is the deviation of the codes
    return pack(codes, Grid(torch.full((rows, columns // own.group), scale)), own)


def config_group(spec: Spec, targets: list[str]) -> dict[str, object]:
    """The entry of `quantization_config.config_groups` that declares these modules stored this way. A group that is no
    multiple of 32 is a whole row."""
    return {
        "targets": targets,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if spec.group % 32 else "group",
            "group_size": None if spec.group % 32 else spec.group,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
