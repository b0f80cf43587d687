"""Trellis codes of a matrix: scales, and the sequences that come nearest (formats/trellis.py)."""

from __future__ import annotations

import functools

import numpy as np
import torch

from pennyweight import _native
from pennyweight.formats import Grid, trellis
from pennyweight.model.stored import Stored

_TRIED = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
"""Scales over the one that gives a group the deviation of the code's values: outliers ask for more."""

_DEVIATIONS = (0.1, 0.15, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
_VALUES_AT_ONCE = 2**22


@functools.cache
def _coder(bits: int, threads: int) -> _native.TrellisCoder:
    return _native.TrellisCoder(bits, threads)


def nearest(x: torch.Tensor, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols (columns, rows) uint8 and their values float32 for x (columns, rows) in the unit of values; squared
    differences count by `weight`, of the same shape."""
    symbols, made = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape)
    coder = _coder(bits, torch.get_num_threads())
    coder.nearest(x.contiguous().numpy(), weight.contiguous().numpy(), symbols.numpy(), made.numpy())
    return symbols, made


@functools.cache
def _deviation(bits: int) -> float:
    return float(trellis.values(bits).std())


@functools.cache
def _errors(bits: int) -> np.ndarray:
    """Mean squared error of normally distributed weights of each of _DEVIATIONS, of a code whose values have deviation
    1."""
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal((8, trellis.RESTART)).astype(np.float32))
    unit, found = _deviation(bits), []
    for deviation in _DEVIATIONS:
        x = normal * (deviation * unit)
        found.append(float((x - nearest(x, torch.ones_like(x), bits)[1]).square().mean()) / unit**2)
    return np.array(found)


def grid(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None) -> Grid:
    """Scales (rows, columns / group) float32, as 8 bits times a row's factor keep them: of those tried that with the
    least error to expect, columns weighted by `importance` (columns,)."""
    step = max(1, _VALUES_AT_ONCE // weight.shape[1])
    found = torch.cat([_scales(block, spec, importance) for block in weight.split(step)])
    eighths, factor = trellis.factors(found)
    return Grid(eighths.float() * factor.float().unsqueeze(1))


def _scales(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None) -> torch.Tensor:
    unit, errors = _deviation(spec.bits), _errors(spec.bits)
    farthest = float(trellis.values(spec.bits).max()) / unit
    grouped = weight.float().view(len(weight), -1, spec.group)
    weights = torch.ones(1) if importance is None else importance.float().view(1, -1, spec.group)
    weights = weights / weights.mean(dim=-1, keepdim=True).clamp_min(1e-30)
    deviation = grouped.square().mean(dim=-1).sqrt().clamp_min(1e-12)
    best, chosen = torch.full_like(deviation, torch.inf), deviation.clone()
    for tried in _TRIED:
        scale = deviation * tried
        within = float(np.interp(1 / tried, _DEVIATIONS, errors))
        beyond = (grouped.abs() / scale.unsqueeze(-1) - farthest).clamp_min_(0).square_().mul_(weights).mean(dim=-1)
        error = scale.square() * (within + beyond)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen / unit


def codes(weight: torch.Tensor, grid: Grid, spec: Stored) -> torch.Tensor:
    """Symbols (rows, columns) int8 of the nearest sequences."""
    rows, columns = weight.shape
    out = torch.empty(columns, rows, dtype=torch.int8)
    step = max(1, _VALUES_AT_ONCE // rows // spec.group) * spec.group
    for start in range(0, columns, step):
        scale = grid.scale[:, start // spec.group : (start + step) // spec.group].repeat_interleave(spec.group, dim=1).T
        out[start : start + step] = rounded(weight[:, start : start + step].float().T, scale, spec)[0]
    return out.T.contiguous()


def rounded(weight: torch.Tensor, scale: torch.Tensor, spec: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols and values of columns (columns, rows), `scale` of the same shape."""
    symbols, made = nearest(weight / scale, (scale / scale.mean()).square_(), spec.bits)
    return symbols.to(torch.int8), made
