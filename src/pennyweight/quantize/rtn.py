"""Round to nearest: each weight to the closest code of its group."""

from __future__ import annotations

import torch

from pennyweight.formats import Grid
from pennyweight.model.stored import Stored
from pennyweight.quantize import _grids


def prepare(moment: torch.Tensor | None) -> torch.Tensor | None:
    """Importance of each column: the mean square of its input, from `moment` (columns, columns) = mean x x^T or its
    diagonal alone.

    Raises RuntimeError if it is not finite.
    """
    if moment is None:
        return None
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if not torch.isfinite(diagonal).all():
        raise RuntimeError("second moments are not finite: the calibration pass met NaN or overflow")
    return diagonal


def quantize(weight: torch.Tensor, importance: torch.Tensor | None, spec: Stored) -> tuple[torch.Tensor, Grid]:
    """Codes (rows, columns) int8 and their grid as `_grids.grid` gives it; `importance` weighs its choice."""
    grid = _grids.grid(weight, spec, importance)
    return _grids.codes(weight, grid, spec), grid
