"""GPTQ (Frantar et al., arXiv:2210.17323): round columns one by one, let the later ones make up for the error.

Minimises ||(W - Q) X||^2 over calibration inputs through H = mean x x^T. Columns are visited by falling diagonal of
H ("act order"); the scales are fixed beforehand for the groups as stored, so the order needs no index on disk. Where
groups run along rows the scales are fitted once more at the end: of all scales for these codes the ones that minimise
the same error, in one system a row (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pennyweight.formats import Grid
from pennyweight.model.stored import Stored
from pennyweight.quantize import _grids

_BLOCK = 128
_DAMPING = 0.01  # of the mean diagonal, as in the paper


@dataclass(frozen=True)
class Prepared:
    """What all matrices with the same inputs share: H (columns, columns), importance (columns,), visiting order
    (columns,) and the upper Cholesky factor (columns, columns) of the damped inverse of H, rows and columns in that
    order."""

    moment: torch.Tensor
    importance: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor


def prepare(moment: torch.Tensor | None) -> Prepared:
    """`moment` (columns, columns) = mean x x^T over calibration inputs.

    Raises ValueError without it, RuntimeError if it is not finite or only its diagonal is left. Inputs that are always
    zero are left alone.
    """
    if moment is None:
        raise ValueError("GPTQ needs the second moments of the layer's inputs; run the calibration pass first")
    if moment.ndim == 1:
        raise RuntimeError("codes that were found are gone or damaged; the same command finds them again")
    if not torch.isfinite(moment).all():
        raise RuntimeError("second moments are not finite: the calibration pass met NaN or overflow")
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    damped = moment[order][:, order]
    diagonal = damped.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    lower = torch.linalg.cholesky(damped)
    del damped
    inverse = torch.cholesky_inverse(lower)
    del lower
    return Prepared(moment, moment.diagonal().clone(), order, torch.linalg.cholesky(inverse, upper=True))


def quantize(weight: torch.Tensor, prepared: Prepared, spec: Stored) -> tuple[torch.Tensor, Grid]:
    """Codes (rows, columns) int8 and their grid as `_grids.grid` gives it."""
    grid = _grids.grid(weight, spec, prepared.importance)
    order, factor = prepared.order, prepared.factor
    # Column by column means row by row of the transpose, which lies contiguous.
    step = _grids.expand(grid.scale, spec, len(weight))[:, order].T.contiguous()
    work = weight.float()[:, order].T.contiguous()
    lowest = None if grid.minimum is None else _grids.expand(grid.minimum, spec, len(weight))[:, order].T.contiguous()
    columns, rows = work.shape
    ordered = torch.empty(columns, rows, dtype=torch.int8)
    fits = not spec.down and spec.bits < _FINE
    steps = torch.empty(columns, rows) if fits else None
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, rows)
        for j in range(start, end):
            above = work[j] if lowest is None else work[j] - lowest[j]
            ordered[j], made = _grids.rounded(above, step[j], spec)
            if steps is not None:
                steps[order[j]] = made
            torch.sub(above, made.mul_(step[j]), out=errors[j - start]).div_(factor[j, j])
            work[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    codes = torch.empty(columns, rows, dtype=torch.int8)
    codes[order] = ordered
    if steps is not None:
        grid = Grid(_grids.kept(_fitted(weight.float(), steps.T.contiguous(), grid, prepared, spec), spec))
    return codes.T.contiguous(), grid


_FINE = 8
"""Bits from which on scales are near enough."""

_VALUES_AT_ONCE = 2**22


def _fitted(weight: torch.Tensor, steps: torch.Tensor, grid: Grid, prepared: Prepared, spec: Stored) -> torch.Tensor:
    """Scales (rows, groups) float32 that minimise the error of scale * steps; steps (rows, columns), what codes mean in
    scales. A row keeps its scales where others, as they are kept, are no better."""
    moment, damping, groups = prepared.moment, _DAMPING * prepared.importance.mean(), grid.scale.shape[1]
    some, out = max(1, _VALUES_AT_ONCE // (groups * groups + len(moment))), []
    for first in range(0, len(weight), some):
        part = slice(first, first + some)
        own, before = steps[part].view(-1, groups, spec.group), grid.scale[part].float()
        toward = (weight[part] @ moment + damping * weight[part]).view(own.shape)
        linear = (own * toward).sum(dim=-1)
        square = torch.empty(len(own), groups, groups)
        for group in range(groups):
            there = slice(group * spec.group, (group + 1) * spec.group)
            reached = (own[:, group] @ moment[there]).view(own.shape)
            reached[:, group] += damping * own[:, group]
            square[:, group] = (reached * own).sum(dim=-1)
        diagonal = square.diagonal(dim1=1, dim2=2)
        ridge = 1e-5 * diagonal.mean(dim=1, keepdim=True).clamp_min(1e-30)
        factor, failed = torch.linalg.cholesky_ex(square + torch.diag_embed(ridge.expand_as(diagonal)))
        found = torch.cholesky_solve((linear + ridge * before).unsqueeze(-1), factor).squeeze(-1)
        found = torch.where((found > 0) & (failed == 0).unsqueeze(-1) & found.isfinite(), found, before)

        def error(scale: torch.Tensor, square: torch.Tensor = square, linear: torch.Tensor = linear) -> torch.Tensor:
            return ((square @ scale.unsqueeze(-1)).squeeze(-1) * scale - 2 * linear * scale).sum(dim=-1, keepdim=True)

        better = error(_grids.kept(found, spec).float()) < error(before)
        out.append(torch.where(better, found, before))
    return torch.cat(out)
