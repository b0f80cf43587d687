"""4-bit weights whose groups run down the output, column by column, so that a column that is not needed is not read.

SpQt's zigzag layout (arXiv:2511.04477) with tall chunks: in a tile of `tile_rows` rows every column is one contiguous
chunk of its float16 scales (then minima, if affine) and its nibbles. The taller the chunk, the less traffic a skipped
column leaves behind. Bytes: docs/formats.md; the kernels read them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

UNIT_ROWS = 128
"""Rows of 64 bytes of nibbles; tiles are whole units."""

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Spec:
    """`group` rows share a scale; `affine`: w = scale * code + minimum, else scale * (code - 8). Codes are 0 to 15."""

    group: int = 64
    affine: bool = False
    tile_rows: int = 4096

    def __post_init__(self) -> None:
        """Raises ValueError for sizes the kernels do not read."""
        if self.group not in GROUPS or self.tile_rows < UNIT_ROWS or self.tile_rows % UNIT_ROWS:
            raise ValueError(f"{self}: the group is one of {GROUPS}, tile_rows a multiple of {UNIT_ROWS}")

    def of(self, rows: int) -> Spec:
        """The same with tiles no taller than a matrix of so many rows needs."""
        return Spec(self.group, self.affine, min(self.tile_rows, -(-rows // UNIT_ROWS) * UNIT_ROWS))

    @property
    def chunk_bytes(self) -> int:
        """Of one column in one tile, padded to whole cache lines of 64 bytes."""
        return -(-(self._half_bytes + self.tile_rows // 2) // 64) * 64

    @property
    def _half_bytes(self) -> int:
        return (4 if self.affine else 2) * self.tile_rows // self.group


def nbytes(rows: int, columns: int, spec: Spec) -> int:
    """Bytes of a packed matrix."""
    return -(-rows // spec.tile_rows) * columns * spec.chunk_bytes


def pack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    spec: Spec,
    minimum: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """codes (rows, columns) 0 to 15; scale and minimum (ceil(rows / group), columns) float16; row_scale (rows,) float32
    or None -> tensors by suffix: the chunks as bytes, rows and columns, group, affine and tile_rows, and the row scale.

    Rows that fill the last tile have code 0 and scale 0. Raises ValueError if shapes do not match the spec.
    """
    rows, columns = codes.shape
    groups = -(-rows // spec.group)
    for name, part in (("scale", scale), ("minimum", minimum)):
        if (part is None) != (name == "minimum" and not spec.affine) or (
            part is not None and part.shape != (groups, columns)
        ):
            raise ValueError(
                f"{name} {None if part is None else tuple(part.shape)} does not fit {codes.shape} in {spec}"
            )
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= 15):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; 4 bits hold 0..15")
    tiles = -(-rows // spec.tile_rows)
    out = torch.zeros(tiles, columns, spec.chunk_bytes, dtype=torch.uint8)
    halves = [scale] if minimum is None else [scale, minimum]
    for i, part in enumerate(halves):
        columnwise = _tiled(part.half(), spec.tile_rows // spec.group).transpose(1, 2).reshape(-1)
        raw = columnwise.view(torch.uint8).view(tiles, columns, -1)
        out[:, :, i * raw.shape[-1] : (i + 1) * raw.shape[-1]] = raw
    # (tile, unit, u, high, L, e, column); byte 16 L + 4 u + e of a unit
    units = _tiled(codes.to(torch.uint8), spec.tile_rows).view(tiles, -1, 4, 2, 4, 4, columns)
    nibbles = units[:, :, :, 0] | units[:, :, :, 1] << 4
    nibbles = nibbles.permute(0, 5, 1, 3, 2, 4).reshape(tiles, columns, spec.tile_rows // 2)
    out[:, :, spec._half_bytes : spec._half_bytes + spec.tile_rows // 2] = nibbles
    parts = {
        "weight_zigzag": out.view(-1),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        "weight_layout": torch.tensor([spec.group, spec.affine, spec.tile_rows], dtype=torch.int64),
    }
    if row_scale is not None:
        if row_scale.shape != (rows,):
            raise ValueError(f"row_scale {tuple(row_scale.shape)} for {rows} rows")
        parts["weight_row_scale"] = row_scale.float()
    return parts


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Raises ValueError for a layout the kernels do not read."""
    group, affine, tile_rows = (int(n) for n in parts["weight_layout"])
    return Spec(group, bool(affine), tile_rows)


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns. Raises ValueError if there are not as many bytes as they take."""
    packed, spec = parts["weight_zigzag"], spec_of(parts)
    rows, columns = (int(n) for n in parts["weight_shape"])
    if packed.numel() != nbytes(rows, columns, spec):
        raise ValueError(f"{packed.numel()} bytes; {rows} x {columns} in {spec} take {nbytes(rows, columns, spec)}")
    return rows, columns


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (rows, columns) in float32. Raises ValueError if the tensors do not belong together."""
    matrix = dequantize(*codes_of(parts), spec_of(parts))
    return matrix.mul_(parts["weight_row_scale"].unsqueeze(1)) if "weight_row_scale" in parts else matrix


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows, in tiles no taller than they need."""
    codes, scale, minimum = codes_of(parts)
    spec = spec_of(parts).of(rows)
    groups = -(-rows // spec.group)
    row_scale = parts["weight_row_scale"][:rows] if "weight_row_scale" in parts else None
    return pack(codes[:rows], scale[:groups], spec, None if minimum is None else minimum[:groups], row_scale)


def can_stack(matrices: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    """Whether `stack` takes them: the same columns and ways of grouping, and all but the last end with a whole unit."""
    specs = [spec_of(parts) for parts in matrices]
    alike = len(
        {(spec.group, spec.affine, int(parts["weight_shape"][1])) for spec, parts in zip(specs, matrices, strict=True)}
    )
    return alike == 1 and all(int(parts["weight_shape"][0]) % UNIT_ROWS == 0 for parts in matrices[:-1])


def stack(matrices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Matrices on one input as one matrix of a single tile: what a column of any of them needs lies in one piece, and
    one list of columns serves all. No code or scale changes. Raises ValueError for what `can_stack` refuses."""
    if not can_stack(matrices):
        raise ValueError("matrices of different columns or groupings, or of rows that are no whole units, do not stack")
    specs = [spec_of(parts) for parts in matrices]
    shapes = [[int(n) for n in parts["weight_shape"]] for parts in matrices]
    rows, columns = sum(rows for rows, _ in shapes), shapes[0][1]
    spec = Spec(specs[0].group, specs[0].affine, -(-rows // UNIT_ROWS) * UNIT_ROWS)
    pieces: list[list[torch.Tensor]] = [[], [], []]  # scales, minima, nibbles; each (columns, bytes)
    for parts, own, (count, _) in zip(matrices, specs, shapes, strict=True):
        tiles, units = -(-count // own.tile_rows), -(-count // UNIT_ROWS)
        chunks = parts["weight_zigzag"].view(tiles, columns, own.chunk_bytes).transpose(0, 1)
        size = 2 * own.tile_rows // own.group
        ends = [size, 2 * size if own.affine else size, own._half_bytes + own.tile_rows // 2]
        keep = [2 * units * UNIT_ROWS // own.group] * 2 + [units * UNIT_ROWS // 2]
        for piece, start, end, kept in zip(pieces, [0, *ends], ends, keep, strict=False):
            if end > start:
                piece.append(chunks[:, :, start:end].reshape(columns, -1)[:, :kept])
    out = torch.zeros(columns, spec.chunk_bytes, dtype=torch.uint8)
    whole = torch.cat([part for piece in pieces for part in piece], dim=1)
    out[:, : whole.shape[1]] = whole
    made = {
        "weight_zigzag": out.view(-1),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        "weight_layout": torch.tensor([spec.group, spec.affine, spec.tile_rows], dtype=torch.int64),
    }
    if any("weight_row_scale" in parts for parts in matrices):
        each = [
            parts.get("weight_row_scale", torch.ones(count)) for parts, (count, _) in zip(matrices, shapes, strict=True)
        ]
        made["weight_row_scale"] = torch.cat(each)
    return made


def codes_of(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `pack` was given: codes, scale, minimum. Raises ValueError if there are not as many bytes as this takes."""
    (rows, columns), spec = shape_of(parts), spec_of(parts)
    tiles = -(-rows // spec.tile_rows)
    chunks = parts["weight_zigzag"].view(tiles, columns, spec.chunk_bytes)
    nibbles = chunks[:, :, spec._half_bytes : spec._half_bytes + spec.tile_rows // 2]
    nibbles = nibbles.reshape(tiles, columns, -1, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)  # (tile, unit, u, L, e, column)
    codes = torch.stack([nibbles & 15, nibbles >> 4], dim=3).reshape(-1, columns)[:rows]
    return codes, *scales_of(parts)


def scales_of(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and minimum as `pack` was given them."""
    (rows, columns), spec = shape_of(parts), spec_of(parts)
    tiles, size, groups = -(-rows // spec.tile_rows), 2 * spec.tile_rows // spec.group, -(-rows // spec.group)
    chunks = parts["weight_zigzag"].view(tiles, columns, spec.chunk_bytes)
    halves = [
        chunks[:, :, i * size : (i + 1) * size]
        .clone()
        .view(-1)
        .view(torch.float16)
        .view(tiles, columns, -1)
        .transpose(1, 2)
        .reshape(-1, columns)[:groups]
        for i in range(2 if spec.affine else 1)
    ]
    return halves[0], halves[1] if spec.affine else None


def dequantize(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, spec: Spec) -> torch.Tensor:
    """The matrix (rows, columns) in float32."""
    rows = len(codes)
    wide = scale.float().repeat_interleave(spec.group, dim=0)[:rows]
    if minimum is None:
        return (codes.float() - 8) * wide
    return codes.float() * wide + minimum.float().repeat_interleave(spec.group, dim=0)[:rows]


def _tiled(part: torch.Tensor, height: int) -> torch.Tensor:
    """(tiles, height, columns), the last tile filled with zeros."""
    tiles = -(-len(part) // height)
    full = part.new_zeros(tiles * height, part.shape[1])
    full[: len(part)] = part
    return full.view(tiles, height, -1)
