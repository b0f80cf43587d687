"""Matrices as the native engine keeps them, from the tensors they are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pennyweight.formats import _matrix, packed_int, zigzag


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool = False) -> Any:
    """A native matrix of its tensors by suffix, as they are on disk: `weight` alone, or the parts of our formats.
    `in_place`: weights that need no rearranging stay in the tensor's memory. Raises ValueError for values that are not
    finite, and for a type the engine does not read."""
    from pennyweight import _native

    if "weight" in parts:
        tensor = parts["weight"]
        refuse_damage(name, tensor)
        stored = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}.get(tensor.dtype)
        if stored is None:
            raise ValueError(f"{name} is stored as {tensor.dtype}; the engine reads float16, bfloat16 and float32")
        return _native.Matrix.wide(tensor.view(torch.uint8).numpy(), _native.Float[stored], in_place)
    rows, columns = _matrix.shape_of(parts)
    if "weight_zigzag" not in parts:
        spec = packed_int.spec_of(parts)
        refuse_damage(f"{name}_scale", parts["weight_scale"])
        codes = parts["weight_packed"].numpy().view(np.uint8)
        brain = parts["weight_scale"].dtype == torch.bfloat16
        scales = parts["weight_scale"].contiguous().view(torch.int16).numpy().view(np.uint16)
        return _native.Matrix.rows(codes, scales, None, columns, spec.bits, spec.group, brain)
    spec = zigzag.spec_of(parts)
    grid = zigzag.grid_of(parts)
    for half in (grid.scale, grid.minimum):
        if half is not None:
            refuse_damage(name, half)
    row_scale = parts.get("weight_row_scale")
    if row_scale is not None:
        refuse_damage(f"{name}_row_scale", row_scale)
    return _native.Matrix.zigzag(
        parts["weight_zigzag"].numpy(),
        rows,
        columns,
        spec.tile_rows,
        spec.group,
        _native.Scales[spec.scales],
        None if row_scale is None else row_scale.numpy(),
        parts["weight_order"].numpy() if "weight_order" in parts else None,
        in_place,
    )


def refuse_damage(name: str, tensor: torch.Tensor) -> None:
    extremes = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN is carried through
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch it again")
