"""Grids for rounding: one scale per group of columns, or of rows of a column, and where the format has one a minimum.

Shrunken ranges are tried, since clipping a few outliers often costs less than a coarser step for everything else, and
then what fits the best one's codes by least squares.
"""

from __future__ import annotations

import torch

from pennyweight.formats import SUPER_GROUPS, Grid, packed_int, trellis
from pennyweight.model.stored import Stored
from pennyweight.quantize import _trellis

# Half-range of the codes over the largest magnitude; at 15/14 that one is the int4 code 7 itself.
_SHRINKS = (15 / 14, *(1.035 - 0.035 * i for i in range(13)))
# Steps of an affine grid over the group's range: at 1/15 both ends are codes.
_STEPS = tuple(1 / (15 + 0.25 * i) for i in range(-4, 13))

_CACHED_VALUES = 2**19
"""Every range passes over its rows again: blocks of rows that stay in the cache are several times faster."""

_SMALLEST = 2.0**-14
"""float16's smallest normal number: the step of a group of zeros."""


def grid(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None = None) -> Grid:
    """The grid that minimises the squared rounding error of weight (rows, columns), columns weighted by `importance`
    (columns,) >= 0, e.g. the mean square of each input. Along rows: scales (rows, columns / group) bfloat16. Down
    columns: scales and minima (ceil(rows / group), columns) as the format keeps them; a column's importance then weighs
    all it is compared with alike.

    Raises ValueError if columns are not a multiple of the group.
    """
    rows, columns = weight.shape
    if spec.coded == "trellis":
        return _trellis.grid(weight, spec, importance)
    if not spec.down:
        if columns % spec.group:
            raise ValueError(f"{columns} columns are not a multiple of the group {spec.group}")
        step = max(1, _CACHED_VALUES // columns)
        return Grid(torch.cat([_symmetric(block, spec, importance) for block in weight.split(step)]))
    turned = torch.nn.functional.pad(weight.float(), (0, 0, 0, -rows % spec.group)).T.contiguous()
    blocks = turned.split(max(1, _CACHED_VALUES // turned.shape[1]))
    if spec.scales == "symmetric":
        return Grid(torch.cat([_symmetric(block, spec, None) for block in blocks]).T.contiguous())
    if spec.scales == "affine":
        found = [_affine(block.view(len(block), -1, spec.group)) for block in blocks]
        scale, minimum = (torch.cat(parts).T.contiguous() for parts in zip(*found, strict=True))
        return Grid(scale.half(), minimum.half())
    parts = [_super(block.view(len(block), -1, spec.group)) for block in blocks]
    factors, sixes = (torch.cat(each, dim=1).transpose(1, 2).contiguous() for each in zip(*parts, strict=True))
    return Grid.of_super(factors, sixes)


def _symmetric(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None) -> torch.Tensor:
    low, high = spec.limits
    # A group of zeros has the smallest scale there is.
    kept, smallest = (torch.float16, _SMALLEST) if spec.down else (torch.bfloat16, 1e-12)
    grouped = weight.float().view(len(weight), -1, spec.group)
    weights = None if importance is None else importance.float().view(1, -1, spec.group)
    weighted = grouped if weights is None else grouped * weights
    peak = grouped.abs().amax(dim=-1, keepdim=True)
    best = torch.full_like(peak, torch.inf)
    chosen, fitted = torch.ones_like(peak), torch.ones_like(peak)
    code, each = torch.empty(2, *grouped.shape)

    def attempt(scale: torch.Tensor) -> None:
        nonlocal best, chosen, fitted
        scale = scale.clamp_min(smallest).to(kept).float()
        torch.div(grouped, scale, out=code).round_().clamp_(low, high)
        linear = torch.mul(code, weighted, out=each).sum(dim=-1, keepdim=True)
        torch.mul(code, code, out=each)
        square = (each if weights is None else each.mul_(weights)).sum(dim=-1, keepdim=True)
        error = scale * (scale * square - 2 * linear)  # less the sum of squares, the same for all scales
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
        # The scale that would suit these codes best: least squares of the group on them.
        fit = linear / torch.where(square > 0, square, 1.0)
        fitted = torch.where(better & (fit > 0), fit, fitted)

    for shrink in _SHRINKS if spec.bits < 8 else (1.0,):
        attempt(peak * (shrink / (high + 0.5)))
    if spec.bits < 8:
        attempt(fitted)
    return chosen.squeeze(-1).to(kept)


def _affine(grouped: torch.Tensor, *, positive: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima (columns, groups) of 4-bit codes from zero for groups (columns, groups, group). `positive`: no
    minimum above zero, which is what super grids can say."""
    least, most = grouped.amin(dim=-1), grouped.amax(dim=-1)
    if positive:
        least = least.clamp_max(0)
    best = torch.full_like(least, torch.inf)
    chosen = [torch.ones_like(least), torch.zeros_like(least)]

    def attempt(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        nonlocal best
        scale = scale.clamp_min(_SMALLEST)
        code = _nearest(grouped, scale, minimum)
        error = (code * scale.unsqueeze(-1) + minimum.unsqueeze(-1) - grouped).square_().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen[0], chosen[1] = torch.where(better, scale, chosen[0]), torch.where(better, minimum, chosen[1])
        return code

    for step in _STEPS:
        code = attempt((most - least) * step, least)
        # Least squares of the group on these codes: weight = scale * code + minimum.
        mean, center = code.mean(dim=-1), grouped.mean(dim=-1)
        spread = (code.square().mean(dim=-1) - mean.square()).clamp_min(1e-9)
        scale = ((code * grouped).mean(dim=-1) - mean * center) / spread
        minimum = center - scale * mean
        if positive:
            through = (code * grouped).mean(dim=-1) / code.square().mean(dim=-1).clamp_min(1e-9)
            scale, minimum = torch.where(minimum > 0, through, scale), minimum.clamp_max(0)
        attempt(scale, minimum)
    return chosen[0], chosen[1]


def _super(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (2, columns, blocks) float16 and sixes (2, columns, groups) uint8 for groups (columns, groups, 32)."""
    columns, groups, _ = grouped.shape
    scale, minimum = _affine(grouped, positive=True)
    filled = torch.nn.functional.pad(torch.stack([scale, -minimum]), (0, -groups % SUPER_GROUPS))
    blocks = filled.view(2, columns, -1, SUPER_GROUPS)
    factors = (blocks.amax(dim=-1) / 63).clamp_min(2.0**-24).half()
    wide = factors.float().repeat_interleave(SUPER_GROUPS, dim=-1)[..., :groups]
    near = (torch.stack([scale, -minimum]) / wide).round_().clamp_(0, 63)
    # In 6 bits the nearest scale is not always the best one, and the minimum that suits it is another.
    best = torch.full_like(scale, torch.inf)
    sixes = near.clone()
    for move in (0, -1, 1):
        s = (near[0] + move).clamp_(1, 63)
        code = _nearest(grouped, s * wide[0], minimum)
        fit = ((s * wide[0]).unsqueeze(-1) * code - grouped).mean(dim=-1)
        m = (fit / wide[1]).round_().clamp_(0, 63)
        code = _nearest(grouped, s * wide[0], -m * wide[1])
        made = code * (s * wide[0]).unsqueeze(-1) - (m * wide[1]).unsqueeze(-1)
        error = (made - grouped).square_().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        sixes[0], sixes[1] = torch.where(better, s, sixes[0]), torch.where(better, m, sixes[1])
    return factors, sixes.to(torch.uint8)


def _nearest(grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    return ((grouped - minimum.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(0, 15)


def kept(scale: torch.Tensor, spec: Stored) -> torch.Tensor:
    """Scales (rows, groups) along rows as the format keeps them."""
    if spec.coded == "trellis":
        eighths, factor = trellis.factors(scale)
        return eighths.float() * factor.float().unsqueeze(1)
    return scale.to(torch.bfloat16)


def expand(part: torch.Tensor, spec: Stored, rows: int) -> torch.Tensor:
    """Each weight's scale or minimum, (rows, columns) float32."""
    if spec.down:
        return part.float().repeat_interleave(spec.group, dim=0)[:rows]
    return part.float().repeat_interleave(spec.group, dim=1)


def round_column(
    above: torch.Tensor, step: torch.Tensor, spec: Stored, codes: torch.Tensor, made: torch.Tensor
) -> None:
    """Codes int8 of one column, and what they mean in steps, into `codes` and `made`; `above` is what lies above the
    minimum, all are (rows,)."""
    if spec.coded == "trellis":
        symbols, meant = _trellis.rounded(above.unsqueeze(0), step.unsqueeze(0), spec)
        codes.copy_(symbols[0])
        made.copy_(meant[0])
    else:
        codes.copy_(torch.div(above, step, out=made).round_().clamp_(*spec.limits))


def codes(weight: torch.Tensor, grid: Grid, spec: Stored) -> torch.Tensor:
    """Nearest codes on a given grid. (rows, columns) int8."""
    if spec.coded == "trellis":
        return _trellis.codes(weight, grid, spec)
    low, high = spec.limits
    out = torch.empty(weight.shape, dtype=torch.int8)
    if spec.down:
        wide = expand(grid.scale, spec, len(weight))
        above = weight.float() if grid.minimum is None else weight.float() - expand(grid.minimum, spec, len(weight))
        return (above / wide).round_().clamp_(low, high).to(torch.int8)
    step = max(1, packed_int.BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        block = weight[start : start + step].float().view(-1, grid.scale.shape[1], spec.group)
        factor = grid.scale[start : start + step].float().unsqueeze(-1)
        out[start : start + step] = (block / factor).round_().clamp_(low, high).view(-1, weight.shape[1]).to(torch.int8)
    return out
