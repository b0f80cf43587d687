"""4-bit weights whose groups run down the output, column by column, so that a column that is not needed is not read.

SpQt's zigzag layout (arXiv:2511.04477) with tall chunks: in a tile of `tile_rows` rows every column is one contiguous
chunk of its scales and its nibbles. The taller the chunk, the less traffic a skipped column leaves behind. Bytes:
docs/formats.md; the kernels read them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pennyweight.formats import SUPER_GROUPS, Find, Grid, numbers, refuse_damage
from pennyweight.model.stored import Stored

if TYPE_CHECKING:
    import torch

UNIT_ROWS = 128
"""Rows of 64 bytes of nibbles; tiles are whole units."""

GROUPS = (32, 64, 128)

Scales = Literal["symmetric", "affine", "super"]
SCALES = get_args(Scales)

MARK = "weight_zigzag"
PARTS = (MARK, "weight_layout", "weight_row_scale", "weight_order", "weight_shape")
OPTIONAL = ("weight_row_scale", "weight_order")
IN_PLACE = True
CONFIG_FORMAT = "pennyweight-zigzag"


@dataclass(frozen=True)
class Spec(Stored):
    """`group` rows share a scale. w = scale * (code - 8), or, unless `scales` are symmetric, scale * code + minimum;
    codes are 0 to 15. Scales are float16, so are the minima of affine ones; super ones are 6 bits each times float16
    factors of 256 rows, as in ggml's Q4_K. Tiles have `tile_rows` rows, None: all. `ordered`: columns lie by how often
    they are needed."""

    bits: ClassVar[int] = 4
    down: ClassVar[bool] = True

    group: int = 64  # type: ignore[misc]
    scales: Scales = "symmetric"  # type: ignore[misc]
    tile_rows: int | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for sizes the kernels do not read."""
        groups = (32,) if self.scales == "super" else GROUPS
        tile = self.whole if self.tile_rows is None else self.tile_rows
        if self.scales not in SCALES or self.group not in groups or tile < 1 or tile % self.whole:
            raise ValueError(f"{self}: the group is one of {groups}, tile_rows a multiple of {self.whole}")

    @property
    def format(self) -> str:
        return "zigzag"

    @property
    def whole(self) -> int:
        """Rows that are not parted: a unit, or those that share factors."""
        return SUPER_GROUPS * 32 if self.scales == "super" else UNIT_ROWS

    def of(self, rows: int) -> Spec:
        """The same with tiles no taller than a matrix of so many rows needs."""
        needed = -(-rows // self.whole) * self.whole
        return replace(self, tile_rows=needed if self.tile_rows is None else min(self.tile_rows, needed))

    def general(self, rows: int) -> Spec:
        """A single tile is as tall as its matrix, however tall that is."""
        return (
            replace(self, tile_rows=None) if self == self.of(rows) == replace(self, tile_rows=None).of(rows) else self
        )

    @property
    def height(self) -> int:
        """Rows of a tile."""
        assert self.tile_rows is not None, "`of` says how tall tiles are"
        return self.tile_rows

    @property
    def chunk_bytes(self) -> int:
        """Of one column in one tile, padded to whole cache lines of 64 bytes."""
        return -(-(self.scale_bytes + self.height // 2) // 64) * 64

    @property
    def scale_bytes(self) -> int:
        """Of one column in one tile."""
        return (4 if self.scales == "affine" else 2) * self.height // self.group

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        own = self if self.tile_rows is not None else self.of(rows)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_zigzag": ("U8", (-(-rows // own.height) * columns * own.chunk_bytes,)),
            "weight_layout": ("I64", (3,)),
            "weight_row_scale": ("F32", (rows,)),
            "weight_shape": ("I64", (2,)),
        }
        return found | ({"weight_order": ("I32", (columns,))} if self.ordered else {})

    def resident_bytes(self, rows: int, columns: int) -> int:
        """All but the numbers that describe the rest."""
        return self.nbytes(rows, columns) - 8 * 5


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A matrix (rows, columns) as tensors by suffix. Each row is divided by its root mean square before it is rounded:
    groups that run down a column would otherwise have to span rows of different size. `activity` (columns,): how large
    inputs are on average; in an ordered matrix what stays lies together, and so does what is left out."""
    import torch

    rows, columns = weight.shape
    row_scale = weight.float().square().mean(dim=1).sqrt().clamp_min(1e-12)
    codes, grid = find(weight.float() / row_scale.unsqueeze(1), spec)
    order = None
    if spec.ordered:
        order = torch.arange(columns) if activity is None else activity.argsort(descending=True, stable=True)
    unsigned = codes + 8 if grid.minimum is None else codes
    return pack(unsigned.to(torch.uint8), grid, spec.of(rows), row_scale, order)


def pack(
    codes: torch.Tensor,
    grid: Grid,
    spec: Spec,
    row_scale: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """codes (rows, columns) 0 to 15; grid of (ceil(rows / group), columns) with what the spec's scales consist of;
    row_scale (rows,) float32 or None; order (columns,) int32 or None: which column each chunk is of, so that columns
    that are needed together can lie side by side -> tensors by suffix: the chunks as bytes, rows and columns, group,
    kind of scales and tile_rows, row scale and order.

    Rows that fill the last tile have code 0 and scale 0. Raises ValueError if shapes do not match the spec.
    """
    import torch

    (rows, columns), spec = codes.shape, spec if spec.tile_rows is not None else spec.of(len(codes))
    groups = -(-rows // spec.group)
    came = [part is not None for part in (grid.minimum, grid.sixes)]
    if grid.scale.shape != (groups, columns) or came != [spec.scales != "symmetric", spec.scales == "super"]:
        raise ValueError(
            f"a grid of {tuple(grid.scale.shape)}, minimum {came[0]}, does not fit {codes.shape} in {spec}"
        )
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= 15):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; 4 bits hold 0..15")
    tiles = -(-rows // spec.height)
    out = torch.zeros(tiles, columns, spec.chunk_bytes, dtype=torch.uint8)
    out[:, :, : spec.scale_bytes] = _scale_bytes(grid, spec).transpose(1, 2)
    # (tile, unit, u, high, L, e, column); byte 16 L + 4 u + e of a unit
    units = _tiled(codes.to(torch.uint8), spec.height).view(tiles, -1, 4, 2, 4, 4, columns)
    nibbles = units[:, :, :, 0] | units[:, :, :, 1] << 4
    nibbles = nibbles.permute(0, 5, 1, 3, 2, 4).reshape(tiles, columns, spec.height // 2)
    out[:, :, spec.scale_bytes : spec.scale_bytes + spec.height // 2] = nibbles
    if order is not None:
        if not torch.equal(order.long().sort().values, torch.arange(columns)):
            raise ValueError(f"an order of {tuple(order.shape)} does not name each of {columns} columns once")
        out = out[:, order.long()]
    parts = {"weight_zigzag": out.reshape(-1), **_described(rows, columns, spec)}
    if order is not None:
        parts["weight_order"] = order.int()
    if row_scale is not None:
        if row_scale.shape != (rows,):
            raise ValueError(f"row_scale {tuple(row_scale.shape)} for {rows} rows")
        parts["weight_row_scale"] = row_scale.float()
    return parts


def _described(rows: int, columns: int, spec: Spec) -> dict[str, torch.Tensor]:
    import torch

    return {
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        "weight_layout": torch.tensor([spec.group, SCALES.index(spec.scales), spec.height], dtype=torch.int64),
    }


def _scale_bytes(grid: Grid, spec: Spec) -> torch.Tensor:
    """(tiles, bytes, columns) uint8: what stands before the nibbles of each column."""
    import torch

    if grid.factors is None or grid.sixes is None:
        halves = [grid.scale] if grid.minimum is None else [grid.scale, grid.minimum]
        return torch.cat([_as_bytes(_tiled(half.half(), spec.height // spec.group)) for half in halves], dim=1)
    s, m = (_tiled(part, spec.height // spec.group).unflatten(1, (-1, 2, 4)) for part in grid.sixes)
    high = [part[:, :, 1] for part in (s, m)]  # groups 4 to 7 of a block; (tiles, blocks, 4, columns)
    sixes = [
        s[:, :, 0] | high[0] >> 4 << 6,
        m[:, :, 0] | high[1] >> 4 << 6,
        high[0] & 15 | (high[1] & 15) << 4,
    ]
    factors = [_as_bytes(_tiled(part, spec.height // spec.whole)).unflatten(1, (-1, 2)) for part in grid.factors]
    return torch.cat([*factors, *sixes], dim=2).flatten(1, 2)


def _as_bytes(halves: torch.Tensor) -> torch.Tensor:
    """(tiles, n, columns) float16 -> (tiles, 2 n, columns) uint8, the low byte first."""
    import torch

    raw = halves.contiguous().unsqueeze(3).view(torch.uint8)  # (tiles, n, columns, 2)
    return raw.permute(0, 1, 3, 2).flatten(1, 2)


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    """Raises ValueError for a layout the kernels do not read."""
    group, scales, tile_rows = numbers(parts, "weight_layout", 3)
    if not 0 <= scales < len(SCALES):
        raise ValueError(f"scales of kind {scales}; known are 0 to {len(SCALES) - 1}: {', '.join(SCALES)}")
    return Spec(group, SCALES[scales], tile_rows, "weight_order" in parts)


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns. Raises ValueError if there are not as many bytes as they take."""
    rows, columns = numbers(parts, "weight_shape", 2)
    if MARK in parts:
        _, (needed,) = (spec := spec_of(parts)).tensors(rows, columns)[MARK]
        if (there := parts[MARK].numel()) != needed:
            raise ValueError(f"{there} bytes; {rows} x {columns} in {spec} take {needed}")
    return rows, columns


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (rows, columns) in float32. Raises ValueError if the tensors do not belong together."""
    matrix = dequantize(*codes_of(parts), spec_of(parts))
    return matrix.mul_(parts["weight_row_scale"].unsqueeze(1)) if "weight_row_scale" in parts else matrix


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows, in tiles no taller than they need."""
    (codes, grid), spec = codes_of(parts), spec_of(parts).of(rows)
    row_scale = parts["weight_row_scale"][:rows] if "weight_row_scale" in parts else None
    return pack(codes[:rows], grid.first(-(-rows // spec.group)), spec, row_scale, parts.get("weight_order"))


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """The first `columns` columns. Raises ValueError for an ordered matrix, and for more than there are."""
    (_, whole), spec = shape_of(parts), spec_of(parts)
    if spec.ordered or columns > whole:
        raise ValueError(f"{columns} of {whole} columns cannot be cut from {spec}")
    chunks = parts[MARK].view(-1, whole, spec.chunk_bytes)[:, :columns]
    shape = parts["weight_shape"].clone()
    shape[1] = columns
    return {**parts, MARK: chunks.reshape(-1), "weight_shape": shape}


def can_stack(matrices: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    """Whether `stack` takes them: the same columns in the same order, the same ways of grouping, and all but the last
    end with a whole unit."""
    import torch

    specs, first = [spec_of(parts) for parts in matrices], matrices[0]
    for spec, parts in zip(specs, matrices, strict=True):
        if (spec.group, spec.scales) != (specs[0].group, specs[0].scales):
            return False
        if int(parts["weight_shape"][1]) != int(first["weight_shape"][1]) or not torch.equal(
            _order(parts), _order(first)
        ):
            return False
    return all(int(parts["weight_shape"][0]) % specs[0].whole == 0 for parts in matrices[:-1])


def _order(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The column that each chunk is of (columns,) int64."""
    import torch

    found = parts.get("weight_order")
    return torch.arange(int(parts["weight_shape"][1])) if found is None else found.long()


def stack(matrices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Matrices on one input as one matrix of a single tile: what a column of any of them needs lies in one piece, and
    one list of columns serves all. No code or scale changes. Raises ValueError for what `can_stack` refuses."""
    import torch

    if not can_stack(matrices):
        raise ValueError("matrices of different columns or groupings, or of rows that are no whole units, do not stack")
    specs = [spec_of(parts) for parts in matrices]
    shapes = [[int(n) for n in parts["weight_shape"]] for parts in matrices]
    rows, columns, whole = sum(rows for rows, _ in shapes), shapes[0][1], specs[0].whole
    spec = Spec(specs[0].group, specs[0].scales, -(-rows // whole) * whole)
    kinds = 2 if spec.scales == "affine" else 1
    pieces: list[list[torch.Tensor]] = [[] for _ in range(kinds + 1)]  # scales, minima, nibbles; each (columns, bytes)
    for parts, own, (count, _) in zip(matrices, specs, shapes, strict=True):
        tiles, kept = -(-count // own.height), -(-count // whole) * whole
        chunks = parts["weight_zigzag"].view(tiles, columns, own.chunk_bytes).transpose(0, 1)
        sizes = [2 * own.height // own.group] * kinds + [own.height // 2]
        wanted = [2 * kept // own.group] * kinds + [kept // 2]
        start = 0
        for piece, size, of_rows in zip(pieces, sizes, wanted, strict=True):
            piece.append(chunks[:, :, start : start + size].reshape(columns, -1)[:, :of_rows])
            start += size
    out = torch.zeros(columns, spec.chunk_bytes, dtype=torch.uint8)
    together = torch.cat([part for piece in pieces for part in piece], dim=1)
    out[:, : together.shape[1]] = together
    made = {"weight_zigzag": out.view(-1), **_described(rows, columns, spec)}
    if "weight_order" in matrices[0]:
        made["weight_order"] = matrices[0]["weight_order"]
    if any("weight_row_scale" in parts for parts in matrices):
        each = [
            parts.get("weight_row_scale", torch.ones(count)) for parts, (count, _) in zip(matrices, shapes, strict=True)
        ]
        made["weight_row_scale"] = torch.cat(each)
    return made


def codes_of(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Grid]:
    """What `pack` was given. Raises ValueError if there are not as many bytes as this takes."""
    import torch

    (rows, columns), spec = shape_of(parts), spec_of(parts)
    tiles = -(-rows // spec.height)
    chunks = _in_order(parts, tiles, spec)
    nibbles = chunks[:, :, spec.scale_bytes : spec.scale_bytes + spec.height // 2]
    nibbles = nibbles.reshape(tiles, columns, -1, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)  # (tile, unit, u, L, e, column)
    codes = torch.stack([nibbles & 15, nibbles >> 4], dim=3).reshape(-1, columns)[:rows]
    return codes, grid_of(parts)


def _in_order(parts: Mapping[str, torch.Tensor], tiles: int, spec: Spec) -> torch.Tensor:
    """The chunks (tiles, columns, bytes), those of column 0 first. Raises ValueError for an order that is none."""
    import torch

    columns = int(parts["weight_shape"][1])
    chunks = parts["weight_zigzag"].view(tiles, columns, spec.chunk_bytes)
    if "weight_order" not in parts:
        return chunks
    place = torch.full((columns,), -1)
    order = _order(parts)
    if order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= columns:
        raise ValueError(f"an order of {tuple(order.shape)} for {columns} columns, from {order.min()} to {order.max()}")
    place[order] = torch.arange(columns)
    if int(place.min()) < 0:
        raise ValueError(f"the order names column {int(order.mode().values)} more than once")
    return chunks[:, place]


def grid_of(parts: Mapping[str, torch.Tensor]) -> Grid:
    """The grid that `pack` was given."""
    import torch

    (rows, columns), spec = shape_of(parts), spec_of(parts)
    tiles, groups = -(-rows // spec.height), -(-rows // spec.group)
    raw = _in_order(parts, tiles, spec)[:, :, : spec.scale_bytes]

    def halves(part: torch.Tensor, count: int) -> torch.Tensor:
        """(tiles, columns, 2 n) bytes -> (count, columns) float16."""
        return part.contiguous().view(torch.float16).transpose(1, 2).reshape(-1, columns)[:count]

    if spec.scales != "super":
        parts_of = raw.chunk(2, dim=2) if spec.scales == "affine" else [raw]
        return Grid(*(halves(part, groups) for part in parts_of))
    blocks = raw.unflatten(2, (-1, 16))
    factors = [halves(blocks[..., at : at + 2].flatten(2), -(-rows // spec.whole)) for at in (0, 2)]
    first, second, both = (blocks[..., at : at + 4] for at in (4, 8, 12))
    sixes = [
        torch.cat([each & 63, low | each >> 6 << 4], dim=3).flatten(2).transpose(1, 2).reshape(-1, columns)[:groups]
        for each, low in ((first, both & 15), (second, both >> 4))
    ]
    return Grid.of_super(torch.stack(factors), torch.stack(sixes))


def dequantize(codes: torch.Tensor, grid: Grid, spec: Spec) -> torch.Tensor:
    """The matrix (rows, columns) in float32."""
    rows = len(codes)
    scale = grid.scale.float().repeat_interleave(spec.group, dim=0)[:rows]
    if grid.minimum is None:
        return (codes.float() - 8) * scale
    return codes.float() * scale + grid.minimum.float().repeat_interleave(spec.group, dim=0)[:rows]


def _tiled(part: torch.Tensor, height: int) -> torch.Tensor:
    """(tiles, height, columns), the last tile filled with zeros."""
    tiles = -(-len(part) // height)
    full = part.new_zeros(tiles * height, part.shape[1])
    full[: len(part)] = part
    return full.view(tiles, height, -1)


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """The chunks as they are."""
    from pennyweight import _native

    (rows, columns), spec, grid = shape_of(parts), spec_of(parts), grid_of(parts)
    row_scale = parts.get("weight_row_scale")
    for part, values in ((name, grid.scale), (name, grid.minimum), (f"{name}_row_scale", row_scale)):
        if values is not None:
            refuse_damage(part, values)
    return _native.Matrix.zigzag(
        parts[MARK].numpy(),
        rows,
        columns,
        spec.height,
        spec.group,
        _native.Scales[spec.scales],
        None if row_scale is None else row_scale.numpy(),
        parts["weight_order"].numpy() if spec.ordered else None,
        in_place,
    )


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Codes are spread evenly; the deviation of the weights is about 0.02."""
    import torch

    codes = torch.randint(0, 16, (min(distinct, rows * columns),), generator=generator, dtype=torch.uint8)
    codes = codes.repeat(-(-rows * columns // len(codes)))[: rows * columns].view(rows, columns)
    groups, scale = -(-rows // spec.group), 0.02 / (0.29 * 16)  # 0.29 of their range is the deviation of the codes
    if spec.scales == "super":
        factors = torch.tensor([scale, 8 * scale]).div(32).view(2, 1, 1).expand(2, -(-groups // SUPER_GROUPS), columns)
        grid = Grid.of_super(factors.half(), torch.full((2, groups, columns), 32, dtype=torch.uint8))
    else:
        minimum = torch.full((groups, columns), -8 * scale) if spec.scales == "affine" else None
        grid = Grid(torch.full((groups, columns), scale), minimum)
    order = torch.randperm(columns, generator=generator) if spec.ordered else None
    return pack(codes, grid, spec.of(rows), torch.ones(rows), order)


def config_group(spec: Spec, targets: list[str]) -> dict[str, object]:
    """The entry of `quantization_config.config_groups`. transformers stops at the format."""
    return {
        "targets": targets,
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": spec.group,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": CONFIG_FORMAT,
    }
