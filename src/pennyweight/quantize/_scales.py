"""One scale per group of columns, or of rows of a column: shrunken ranges are tried, since clipping a few outliers
often costs less than a coarser step for everything else, and then the least-squares scale of the best one's codes."""

from __future__ import annotations

import torch

from pennyweight.formats import packed_int
from pennyweight.slots import Stored

# Half-range of the codes over the largest magnitude; at 15/14 that one is the int4 code 7 itself.
_SHRINKS = (15 / 14, *(1.035 - 0.035 * i for i in range(13)))

_CACHED_VALUES = 2**19
"""Every range passes over its rows again: blocks of rows that stay in the cache are several times faster."""


def scales(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, columns / group) bfloat16 scales that minimise the squared rounding error, columns weighted by
    `importance` (columns,) >= 0, e.g. the mean square of each input. For groups that run down:
    (ceil(rows / group), columns) float16; a column's importance then weighs all it is compared with alike.

    Raises ValueError if columns are not a multiple of the group.
    """
    rows, columns = weight.shape
    if spec.down:
        turned = torch.nn.functional.pad(weight.float(), (0, 0, 0, -rows % spec.group)).T.contiguous()
        step = max(1, _CACHED_VALUES // turned.shape[1])
        return torch.cat([_block_scales(block, spec, None) for block in turned.split(step)]).T.contiguous()
    if columns % spec.group:
        raise ValueError(f"{columns} columns are not a multiple of the group {spec.group}")
    step = max(1, _CACHED_VALUES // columns)
    return torch.cat([_block_scales(block, spec, importance) for block in weight.split(step)])


def _block_scales(weight: torch.Tensor, spec: Stored, importance: torch.Tensor | None) -> torch.Tensor:
    low, high = packed_int.limits(spec.bits)
    # A group of zeros has the smallest scale there is; 2^-14 is float16's smallest normal number.
    kept, smallest = (torch.float16, 2.0**-14) if spec.down else (torch.bfloat16, 1e-12)
    grouped = weight.float().view(len(weight), -1, spec.group)
    weights = None if importance is None else importance.float().view(1, -1, spec.group)
    peak = grouped.abs().amax(dim=-1, keepdim=True)
    best = torch.full_like(peak, torch.inf)
    chosen, fitted = torch.ones_like(peak), torch.ones_like(peak)

    def attempt(scale: torch.Tensor) -> None:
        nonlocal best, chosen, fitted
        scale = scale.clamp_min(smallest).to(kept).float()
        code = (grouped / scale).round_().clamp_(low, high)
        weighted = code if weights is None else code * weights
        error = (grouped - code * scale).square_()
        error = (error if weights is None else error * weights).sum(dim=-1, keepdim=True)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
        # The scale that would suit these codes best: least squares of the group on them.
        square = (code * weighted).sum(dim=-1, keepdim=True)
        fit = (grouped * weighted).sum(dim=-1, keepdim=True) / torch.where(square > 0, square, 1.0)
        fitted = torch.where(better & (fit > 0), fit, fitted)

    for shrink in _SHRINKS if spec.bits < 8 else (1.0,):
        attempt(peak * (shrink / (high + 0.5)))
    if spec.bits < 8:
        attempt(fitted)
    return chosen.squeeze(-1).to(kept)


def expand(scale: torch.Tensor, spec: Stored, rows: int) -> torch.Tensor:
    """Each weight's scale, (rows, columns) float32."""
    if spec.down:
        return scale.float().repeat_interleave(spec.group, dim=0)[:rows]
    return scale.float().repeat_interleave(spec.group, dim=1)


def codes(weight: torch.Tensor, scale: torch.Tensor, spec: Stored) -> torch.Tensor:
    """Nearest codes for given scales. (rows, columns) int8."""
    low, high = packed_int.limits(spec.bits)
    out = torch.empty(weight.shape, dtype=torch.int8)
    if spec.down:
        return (weight.float() / expand(scale, spec, len(weight))).round_().clamp_(low, high).to(torch.int8)
    step = max(1, packed_int.BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        block = weight[start : start + step].float().view(-1, scale.shape[1], spec.group)
        factor = scale[start : start + step].float().unsqueeze(-1)
        out[start : start + step] = (block / factor).round_().clamp_(low, high).view(-1, weight.shape[1]).to(torch.int8)
    return out
