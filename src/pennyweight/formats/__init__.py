"""Ways to keep a matrix: one file each, which owns its bytes, and its way to disk and into the native engine.

A format is a file with

    Spec            a frozen dataclass, a kind of model/stored.py's Stored: what it costs and which tensors it takes
    MARK, PARTS     suffixes of a matrix' tensors; the one that no other format has, and all
    OPTIONAL        those of them that may be missing; may be left out
    IN_PLACE        True if the engine reads the MARK's bytes as they lie in their file
    CONFIG_FORMAT   what `quantization_config` calls it; None: not part of it
    encode(weight, spec, find, activity)    a matrix as tensors by suffix, its codes found by `find`
    spec_of, shape_of, unpack, slice_rows, slice_columns    of such tensors
    native(name, parts, in_place)           as a native matrix
    random(rows, columns, spec, generator, distinct)    tensors of nothing in particular, to be timed
    config_group(spec, targets)             its entry of `config_groups`; where there is a CONFIG_FORMAT
    BITS            numbers of bits that it keeps rows in; the axis `bits` goes by it
    codes(parts)        codes (rows, columns) int8 around zero and scales (rows, groups), w = code * scale; of formats
                        that keep rows so
    can_stack, stack    matrices on one input as one; may be left out
    join(matrices)      parts of one matrix, each one's rows below those before; may be left out where tensors are rows

On disk the parts of the matrix `x.up_proj.weight` are `x.up_proj.weight<rest of the suffix>`. Nothing here imports
torch until a tensor is there: a model is planned without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pennyweight import kinds
from pennyweight.model.stored import BFLOAT16, Stored

if TYPE_CHECKING:
    import torch

    from pennyweight.model.blocks import Block

STOCK = "pack-quantized"
"""The CONFIG_FORMAT that stock transformers reads."""

SUPER_GROUPS = 8
"""Groups that share the factors of their scales, as in ggml's Q4_K."""

_NOT_READ = {"_zero_point": "scales with zero points", "_g_idx": "groups of reordered columns"}


@dataclass(frozen=True)
class Grid:
    """What codes mean: weight = scale * code, or scale * code + minimum with codes from zero. Tensors are (rows,
    groups) where groups run along rows, (groups, columns) where they run down columns.

    `factors` (2, blocks, columns) float16 and `sixes` (2, groups, columns) uint8 below 64, where both come from scales
    of scales: scale = factors[0] * sixes[0] and minimum = -factors[1] * sixes[1], exactly, in float32.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    sixes: torch.Tensor | None = None

    @staticmethod
    def of_super(factors: torch.Tensor, sixes: torch.Tensor) -> Grid:
        wide = factors.float().repeat_interleave(SUPER_GROUPS, dim=1)[:, : sixes.shape[1]] * sixes
        return Grid(wide[0], -wide[1], factors, sixes)

    def first(self, groups: int) -> Grid:
        """Of the first `groups` groups down."""
        if self.factors is not None and self.sixes is not None:
            return Grid.of_super(self.factors[:, : -(-groups // SUPER_GROUPS)], self.sixes[:, :groups])
        return Grid(self.scale[:groups], None if self.minimum is None else self.minimum[:groups])


Find = Callable[["torch.Tensor", Stored], tuple["torch.Tensor", Grid]]
"""(codes, grid) of a matrix as a spec keeps it: a quantiser at work."""


def of(stored: Stored) -> ModuleType:
    """The file of a way to keep matrices."""
    return kinds.load("formats", stored.format)


def rows_in(bits: int) -> ModuleType:
    """The format that keeps rows in so many bits. Raises ValueError if none does."""
    for module in _all():
        if bits in getattr(module, "BITS", ()):
            return module
    raise ValueError(f"no format keeps rows in {bits} bits; there are {', '.join(map(str, row_bits()))}")


def row_bits() -> list[int]:
    """The numbers of bits that formats keep rows in."""
    return sorted(bits for module in _all() for bits in getattr(module, "BITS", ()))


def _all() -> list[ModuleType]:
    return [kinds.load("formats", name) for name in kinds.names("formats")]


def on_disk(name: str, suffix: str) -> str:
    """The tensor that a part of the matrix `name` is."""
    return name + suffix.removeprefix("weight")


def joined_in(block: Block) -> dict[str, tuple[str, ...]]:
    """Of the modules that hold several of a block's matrices those that do on disk as well, and these: where they are
    kept as stock transformers reads them, which knows no others."""
    kept = {name.removesuffix(".weight"): weight.stored for name, weight in block.tensors().items() if weight.is_matrix}
    found = {}
    for module, parts in block.joins.items():
        names = tuple(f"{block.prefix}{module}.{part}" for part in parts)
        ways = {kept.get(name) for name in names}
        if len(ways) == 1 and (way := ways.pop()) is not None and (way == BFLOAT16 or of(way).CONFIG_FORMAT == STOCK):
            found[block.prefix + module] = names
    return found


def tensors_of(name: str) -> set[str]:
    """The tensors that the matrix `name` may be on disk, whatever its format."""
    return {on_disk(name, suffix) for module in _all() for suffix in module.PARTS}


def found(name: str, there: Iterable[str]) -> ModuleType | None:
    """The format of the matrix `name` among the tensors called `there`; None if it is not there at all. Raises
    ValueError for parts that compressed-tensors has and we do not read: without them the weights would be others."""
    known = there if isinstance(there, Mapping | set | frozenset) else set(there)
    for part, meaning in _NOT_READ.items():
        if name + part in known:
            raise ValueError(f"{name} is stored with {meaning} ({name}{part}), which pennyweight does not read")
    return next((module for module in _all() if on_disk(name, module.MARK) in known), None)


def read(
    name: str,
    there: Iterable[str],
    read_tensor: Callable[[str], torch.Tensor],
    *,
    map_tensor: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The parts of the matrix `name`, by suffix; none if it is not there. What the engine could read where it lies goes
    through `map_tensor`, if there is one. Raises ValueError for parts that do not belong together."""
    module = found(name, there)
    if module is None:
        return {}

    def part(suffix: str) -> torch.Tensor:
        in_place = map_tensor is not None and module.IN_PLACE and suffix == module.MARK
        return (map_tensor if in_place and map_tensor is not None else read_tensor)(on_disk(name, suffix))

    parts = {suffix: part(suffix) for suffix in module.PARTS if on_disk(name, suffix) in there}
    if module.CONFIG_FORMAT is not None:
        _hold_together(name, module, parts)
    return parts


def _hold_together(name: str, module: ModuleType, parts: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless the parts of a matrix are of the types and shapes that its spec says."""
    import torch

    types = {"U8": (torch.uint8,), "I32": (torch.int32,), "F32": (torch.float32,)}
    types |= {"I64": (torch.int64, torch.int32), "BF16": (torch.bfloat16, torch.float16)}  # as other makers have it
    optional = getattr(module, "OPTIONAL", ())
    if missing := [suffix for suffix in module.PARTS if suffix not in parts and suffix not in optional]:
        raise ValueError(f"{name} is stored as {module.MARK} without {missing[0]}; the checkpoint is damaged")
    try:
        expected = module.spec_of(parts).tensors(*module.shape_of(parts))
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err
    for suffix, tensor in parts.items():
        kind, shape = expected[suffix]
        if tensor.dtype not in types[kind] or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {suffix} is {tensor.dtype} of {tuple(tensor.shape)}; {kind} of {shape} belongs there"
            )


def numbers(parts: Mapping[str, torch.Tensor], suffix: str, count: int) -> list[int]:
    """The sizes that a small tensor holds, such as rows and columns. Raises ValueError for anything else."""
    import torch

    tensor = parts[suffix]
    if tensor.dtype not in (torch.int64, torch.int32) or tuple(tensor.shape) != (count,):
        raise ValueError(f"{suffix} is {tensor.dtype} of {tuple(tensor.shape)}; {count} sizes belong there")
    found = tensor.tolist()
    if not all(0 <= number < 2**31 for number in found):
        raise ValueError(f"{suffix} is {found}; these are no sizes")
    return found


def of_parts(parts: Mapping[str, Any]) -> ModuleType:
    """The format of a matrix' tensors by suffix."""
    return next(module for module in _all() if module.MARK in parts)


def stored_of(parts: Mapping[str, torch.Tensor]) -> Stored:
    """How a matrix is kept, as shapes say it. Raises ValueError for parts that do not belong together."""
    module = of_parts(parts)
    spec, rows = module.spec_of(parts), module.shape_of(parts)[0]
    return spec.general(rows)


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix (rows, columns), in the float type that its format computes. Raises ValueError for parts that do not
    belong together."""
    return of_parts(parts).unpack(parts)


def codes(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (rows, columns) int8 around zero and scales (rows, groups) of a matrix kept by rows so; else None."""
    module = of_parts(parts)
    return module.codes(parts) if hasattr(module, "codes") else None


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool = False) -> Any:
    """A native matrix of its tensors by suffix. `in_place`: weights that need no rearranging stay in the tensor's
    memory. Raises ValueError for values that are not finite, and for what the engine does not read."""
    return of_parts(parts).native(name, parts, in_place=in_place)


def stacked(matrices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """Matrices on one input as one matrix, where their format allows that."""
    module, *others = (of_parts(parts) for parts in matrices)
    if any(other is not module for other in others) or not hasattr(module, "stack") or not module.can_stack(matrices):
        return None
    return module.stack(matrices)


def joined(matrices: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Matrices that are kept by rows in one way, as one: each one's rows below those before."""
    module = of_parts(matrices[0])
    if hasattr(module, "join"):
        return module.join(matrices)
    return {suffix: joined_tensor(suffix, [parts[suffix] for parts in matrices]) for suffix in matrices[0]}


def joined_tensor(suffix: str, found: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of them, in formats where each tensor has a row for every row of the matrix: all that stock
    transformers reads."""
    import torch

    if suffix != "weight_shape":
        return torch.cat(list(found))
    return torch.tensor([sum(int(shape[0]) for shape in found), *found[0].tolist()[1:]], dtype=found[0].dtype)


_MOST = 1e18
"""Of weights and scales: the square of what is larger is beyond float32, and any norm behind it nothing or NaN."""


def refuse_damage(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for values that are not finite, or that no model computes with."""
    import torch

    extremes = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN is carried through
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch it again")
    if bool((extremes.abs() > _MOST).any()):
        raise ValueError(f"{name} holds values beyond {_MOST:.0e}; the checkpoint is damaged, fetch it again")
