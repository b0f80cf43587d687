"""Trellis codes: 2 to 6 bits a weight that mean more together than each alone, with less error than rounding up to 5.

Down every column the bits of the weights form one stream, begun anew every 1024 rows. A weight's value is computed from
a window over the last bits of it (native/trellis.h; QTIP, arXiv:2406.11235, with a code of our own). A matrix W (rows,
columns) becomes
    <name>.weight_trellis  uint8 (columns, ceil(rows * bits / 8)): the first row's bits lowest
    <name>.weight_scale    uint8 (rows, columns / group)
    <name>.weight_factor   bfloat16 (rows,)
    <name>.weight_shape    int64 (3,): rows, columns, bits
and W is value * (scale * factor), values being integers below 2^15.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pennyweight.formats import Find, numbers, refuse_damage
from pennyweight.model.stored import Stored, fitting

if TYPE_CHECKING:
    import torch

MARK = "weight_trellis"
PARTS = (MARK, "weight_scale", "weight_factor", "weight_shape")
IN_PLACE = False
CONFIG_FORMAT = "pennyweight-trellis"
WIDTHS = (2, 3, 4, 5, 6)
RESTART = 1024
"""Rows of a stream."""

HIGHEST_SCALE = 255
_TILE, _PAIR = 64, 2
_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Spec(Stored):
    """Bits a weight, and columns that share a scale in a row."""

    bits: int = 3  # type: ignore[misc]
    group: int = 32  # type: ignore[misc]
    coded: ClassVar[str] = "trellis"
    coding_flops: ClassVar[float] = 2.0
    short: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError for a number of bits that there is no code of, or groups that are empty."""
        if self.bits not in WIDTHS or self.group < 1:
            raise ValueError(f"{self}: {WIDTHS[0]} to {WIDTHS[-1]} bits, and at least one column a group")

    @property
    def format(self) -> str:
        return "trellis"

    @property
    def limits(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - 1

    def over(self, columns: int) -> Spec:
        """In a smaller group, or one scale a row, where the group does not divide the columns."""
        group = fitting(self.group, columns)
        return self if group == self.group else Spec(self.bits, group)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight_trellis": ("U8", (columns, -(-rows * self.bits // 8))),
            "weight_scale": ("U8", (rows, columns // self.over(columns).group)),
            "weight_factor": ("BF16", (rows,)),
            "weight_shape": ("I64", (3,)),
        }

    def resident_bytes(self, rows: int, columns: int) -> int:
        """In the engine's order: tiles of 64 rows, groups filled up to whole 32 columns (native/matrices.h)."""
        group = self.over(columns).group
        filled = -(-group // 32) * 32
        of_group = filled // _PAIR * (_PAIR + _PAIR * _TILE // 8 * self.bits) + _TILE
        return -(-rows // _TILE) * (columns // group * of_group + 4 * _TILE) + 16


@functools.cache
def values(bits: int) -> np.ndarray:
    """The value of every state, int16 (2 ** window,)."""
    from pennyweight import _native

    out = np.empty(1 << _native.trellis_window(bits), np.int16)
    _native.trellis_values(bits, out)
    return out


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A matrix (rows, columns) as tensors by suffix."""
    own = spec.over(weight.shape[1])
    symbols, grid = find(weight, own)
    return pack(symbols, grid.scale, own)


def factors(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (rows, groups) in 8 bits, uint8, and the factors (rows,) bfloat16 that they are multiplied by; the
    greatest of a row becomes 255."""
    import torch

    exact = (scale.float().amax(dim=1) / HIGHEST_SCALE).clamp_min(torch.finfo(torch.bfloat16).tiny)
    # Rounded down, or what should be 255 would be 254 and something.
    factor = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    eighths = (scale.float() / factor.float().unsqueeze(1)).round().clamp(1, HIGHEST_SCALE)
    return eighths.to(torch.uint8), factor


def pack(symbols: torch.Tensor, scale: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
    """symbols (rows, columns), the bits that each weight adds; scale (rows, groups) float32, as `factors` leaves it."""
    import torch

    eighths, factor = factors(scale)
    turned = symbols.T.contiguous().numpy().astype(np.uint8)
    bits = turned[:, :, None] >> np.arange(spec.bits, dtype=np.uint8) & 1
    stream = np.packbits(bits.reshape(len(turned), -1), axis=1, bitorder="little")
    return {
        "weight_trellis": torch.from_numpy(stream),
        "weight_scale": eighths,
        "weight_factor": factor,
        "weight_shape": torch.tensor([*symbols.shape, spec.bits], dtype=torch.int64),
    }


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Raises ValueError if the scales are not whole groups of the columns, or there is no code of so many bits."""
    (rows, columns, bits), scale = numbers(parts, "weight_shape", 3), parts["weight_scale"]
    if scale.dim() != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ValueError(f"scales of {tuple(scale.shape)} do not belong to {rows} x {columns}")
    return Spec(bits, columns // scale.shape[1])


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns. Raises ValueError for a weight_shape that is none."""
    rows, columns, _ = numbers(parts, "weight_shape", 3)
    return rows, columns


def _symbols(parts: Mapping[str, torch.Tensor]) -> np.ndarray:
    """(columns, rows) uint8. Raises ValueError if the tensors do not belong together."""
    spec, (rows, columns), stream = spec_of(parts), shape_of(parts), parts[MARK]
    if tuple(stream.shape) != (columns, -(-rows * spec.bits // 8)):
        raise ValueError(f"streams of {tuple(stream.shape)} are no {spec.bits} bits of {rows} x {columns}")
    bits = np.unpackbits(stream.numpy(), axis=1, bitorder="little")[:, : rows * spec.bits]
    return (bits.reshape(columns, rows, spec.bits) << np.arange(spec.bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def made_of(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Values (columns, rows) int16 of symbols (columns, rows)."""
    table = values(bits)
    window = len(table).bit_length() - 1
    columns, rows = symbols.shape
    filled = np.zeros((columns, -(-rows // RESTART) * RESTART), np.uint16)
    filled[:, :rows] = symbols
    streams = filled.reshape(-1, RESTART)
    states = np.zeros(streams.shape, np.uint16)
    for back in range(-(-window // bits)):
        # The newest symbol is highest; of the oldest only the highest bits are left.
        place = window - bits * (back + 1)
        moved = streams[:, : RESTART - back]
        states[:, back:] |= moved << place if place >= 0 else moved >> -place
    return table[states].reshape(columns, -1)[:, :rows]


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """value * (scale * factor) in float32. Raises ValueError if the tensors do not belong together."""
    import torch

    spec, (rows, columns) = spec_of(parts), shape_of(parts)
    scale = parts["weight_scale"].float() * parts["weight_factor"].float().unsqueeze(1)
    out = torch.empty(rows, columns)
    step = max(1, _VALUES_AT_ONCE // max(1, rows) // spec.group) * spec.group
    for start in range(0, columns, step):
        made = made_of(_symbols(_columns(parts, start, min(columns, start + step))), spec.bits)
        wide = scale[:, start // spec.group : (start + step) // spec.group].repeat_interleave(spec.group, dim=1)
        torch.mul(torch.from_numpy(made.T.astype(np.float32)), wide, out=out[:, start : start + step])
    return out


def _columns(parts: Mapping[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
    """Whole groups of columns."""
    import torch

    spec, (rows, _) = spec_of(parts), shape_of(parts)
    return {
        "weight_trellis": parts[MARK][first:last],
        "weight_scale": parts["weight_scale"][:, first // spec.group : last // spec.group].contiguous(),
        "weight_factor": parts["weight_factor"],
        "weight_shape": torch.tensor([rows, last - first, spec.bits], dtype=torch.int64),
    }


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """The first `columns` columns, without unpacking. Raises ValueError if they are not whole groups."""
    group = spec_of(parts).group
    if columns % group:
        raise ValueError(f"{columns} columns are not whole groups of {group}")
    return _columns(parts, 0, columns)


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows: a value depends on no row below."""
    import torch

    spec, columns = spec_of(parts), shape_of(parts)[1]
    bits = _symbols(parts)[:, :rows, None] >> np.arange(spec.bits, dtype=np.uint8) & 1
    stream = np.packbits(bits.reshape(columns, -1), axis=1, bitorder="little")
    return {
        "weight_trellis": torch.from_numpy(stream),
        "weight_scale": parts["weight_scale"][:rows],
        "weight_factor": parts["weight_factor"][:rows],
        "weight_shape": torch.tensor([rows, columns, spec.bits], dtype=torch.int64),
    }


def join(matrices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each one's rows below those before, all but the last whole streams."""
    import torch

    shapes = [numbers(parts, "weight_shape", 3) for parts in matrices]
    assert all(rows % RESTART == 0 for rows, *_ in shapes[:-1]), "streams would not begin where they do"
    return {
        "weight_trellis": torch.cat([parts[MARK] for parts in matrices], dim=1),
        "weight_scale": torch.cat([parts["weight_scale"] for parts in matrices]),
        "weight_factor": torch.cat([parts["weight_factor"] for parts in matrices]),
        "weight_shape": torch.tensor([sum(rows for rows, *_ in shapes), *shapes[0][1:]], dtype=torch.int64),
    }


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """Put in the order of the kernels; bits and scales stay what they are."""
    from pennyweight import _native

    spec = spec_of(parts)
    refuse_damage(f"{name}_factor", parts["weight_factor"])
    scale, factor = parts["weight_scale"].contiguous().numpy(), parts["weight_factor"].float().numpy()
    return _native.Matrix.trellis(parts[MARK].contiguous().numpy(), scale, factor, spec.bits, spec.group)


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Any bits are a code; the deviation of the weights is about 0.02."""
    import torch

    own = spec.over(columns)
    size = columns * -(-rows * spec.bits // 8)
    some = torch.randint(0, 256, (min(distinct, size),), generator=generator, dtype=torch.uint8)
    deviation = float(values(spec.bits).std())
    return {
        "weight_trellis": some.repeat(-(-size // len(some)))[:size].view(columns, -1),
        "weight_scale": torch.full((rows, columns // own.group), HIGHEST_SCALE, dtype=torch.uint8),
        "weight_factor": torch.full((rows,), 0.02 / deviation / HIGHEST_SCALE, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns, spec.bits], dtype=torch.int64),
    }


def config_group(spec: Spec, targets: list[str]) -> dict[str, object]:
    """The entry of `quantization_config.config_groups`. transformers stops at the format."""
    weights = {"num_bits": spec.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": spec.group}
    return {
        "format": CONFIG_FORMAT,
        "targets": targets,
        "weights": {**weights, "dynamic": False},
        "input_activations": None,
        "output_activations": None,
    }
