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
    above = weight.float() if grid.minimum is None else weight - _grids.expand(grid.minimum, spec, len(weight))
    work = above[:, order].T.contiguous()
    columns, rows = work.shape
    ordered = torch.empty(columns, rows, dtype=torch.int8)
    fits = not spec.down and spec.bits < _FINE
    steps = torch.empty(columns, rows) if fits else None
    made, errors = torch.empty(2, _BLOCK, rows)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        own, upper = work[start:end], factor[start:end, start:end]
        # Rows taken together: one by one takes as long as what is done with the rows of a small matrix.
        each = zip(own, step[start:end], ordered[start:end], made, errors, upper, strict=False)
        for j, (column, scale, code, meant, error, later) in enumerate(each):
            _grids.round_column(column, scale, spec, code, meant)
            torch.sub(column, torch.mul(meant, scale, out=error), out=error).div_(later[j])
            own[j + 1 :].addr_(later[j + 1 :], error, alpha=-1)
        if steps is not None:
            steps[order[start:end]] = made[: end - start]
        work[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    codes = torch.empty(columns, rows, dtype=torch.int8)
    codes[order] = ordered
    codes = codes.T.contiguous()
    if steps is not None:
        grid = Grid(_grids.kept(_fitted(weight.float(), steps.T.contiguous(), grid, prepared, spec), spec))
    return codes, grid


_FINE = 8
"""Bits from which on scales are near enough."""

_VALUES_AT_ONCE = 2**22


def _fitted(weight: torch.Tensor, steps: torch.Tensor, grid: Grid, prepared: Prepared, spec: Stored) -> torch.Tensor:
    """Scales (rows, groups) float32 that minimise the error of scale * steps; steps (rows, columns), what codes mean in
    scales. A row keeps its scales where others, as they are kept, are no better."""
    moment, damped, groups = prepared.moment, float(_DAMPING * prepared.importance.mean()), grid.scale.shape[1]
    some, out = max(1, _VALUES_AT_ONCE // (groups * groups + len(moment))), []
    for first in range(0, len(weight), some):
        part = slice(first, first + some)
        own, before = steps[part].view(-1, groups, spec.group), grid.scale[part].float()
        toward = (weight[part] @ moment).add_(weight[part], alpha=damped)
        linear = (own * toward.view(own.shape)).sum(dim=-1)
        square = torch.empty(len(own), groups, groups)
        for group in range(groups):
            start, end = group * spec.group, (group + 1) * spec.group
            reached = (own[:, group] @ moment[start:end, :end]).view(len(own), group + 1, spec.group)
            reached[:, group] += damped * own[:, group]
            square[:, group, : group + 1] = reached.mul_(own[:, : group + 1]).sum(dim=-1)
            square[:, :group, group] = square[:, group, :group]
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
