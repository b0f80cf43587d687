"""What every backend must compute, on any device torch has. Slow, and meant to be read first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pennyweight.formats import zigzag


def collect(
    x: torch.Tensor, threshold: float, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (kept,) int64, ascending, of |x| * importance > threshold, and x there; NaN is never kept.

    x (columns,) float. A threshold of 0 leaves out zeros alone, a negative one nothing. `importance` (columns,), not
    negative, is 1 if not given; with the norms of the weight's columns it is WINA's criterion (arXiv:2505.19427).
    """
    size = x.abs() if importance is None else x.abs() * importance
    kept = torch.nonzero(size > threshold).flatten()
    return kept, x[kept]


def times(
    parts: Mapping[str, torch.Tensor], x: torch.Tensor, threshold: float = -1.0, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """y (rows,) = the sum of kept columns times their x, in x's type (float32 or float64).

    `parts`: what zigzag.pack made. Columns that are not kept are not looked at: NaN in their chunks does no harm.
    Raises ValueError if the tensors do not belong together or x has another length.
    """
    matrix = zigzag.unpack(parts)
    check_input(x, matrix.shape[1])
    kept, value = collect(x, threshold, importance)
    return matrix[:, kept].to(x.dtype) @ value


def in_order(index: torch.Tensor, value: torch.Tensor, order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `collect` gives, from places of columns as they lie in a matrix of this order."""
    if order is None:
        return index, value
    columns, sorting = order[index].long().sort()
    return columns, value[sorting]


def check_input(x: torch.Tensor, columns: int) -> None:
    """Raises ValueError unless x is one vector of so many columns."""
    if x.shape != (columns,):
        raise ValueError(f"x has shape {tuple(x.shape)}; the matrix multiplies vectors of shape ({columns},)")
