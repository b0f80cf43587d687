"""Floats as a checkpoint has them: 16-bit or float32 rows, one tensor a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pennyweight.formats import Find, refuse_damage
from pennyweight.model.stored import BFLOAT16, Stored

if TYPE_CHECKING:
    import torch

Spec = Stored
MARK = "weight"
PARTS = (MARK,)
IN_PLACE = True
CONFIG_FORMAT = None


def encode(weight: torch.Tensor, spec: Spec, find: Find, activity: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Nothing is looked for: rounded to bfloat16."""
    return {"weight": weight.bfloat16()}


def spec_of(parts: Mapping[str, torch.Tensor]) -> Spec:
    return BFLOAT16


def shape_of(parts: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(parts["weight"].shape)


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts["weight"]


def slice_rows(parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return {"weight": parts["weight"][:rows]}


def slice_columns(parts: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    return {"weight": parts["weight"][:, :columns].contiguous()}


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool) -> Any:
    """Raises ValueError for values that are not finite, and for a type the engine does not read."""
    import torch

    from pennyweight import _native

    tensor = parts["weight"]
    refuse_damage(name, tensor)
    stored = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}.get(tensor.dtype)
    if stored is None:
        raise ValueError(f"{name} is stored as {tensor.dtype}; the engine reads float16, bfloat16 and float32")
    return _native.Matrix.wide(tensor.view(torch.uint8).numpy(), _native.Float[stored], in_place)


def random(rows: int, columns: int, spec: Spec, generator: torch.Generator, distinct: int) -> dict[str, torch.Tensor]:
    """Normal, with a standard deviation of 0.02."""
    import torch

    values = torch.empty(min(distinct, rows * columns)).normal_(0.0, 0.02, generator=generator).bfloat16()
    return {"weight": values.repeat(-(-rows * columns // len(values)))[: rows * columns].view(rows, columns)}
