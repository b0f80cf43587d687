"""What the codes of a matrix mean, however its bytes lie: a scale for every group, and in some formats a minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUPER_GROUPS = 8
"""Groups that share the factors of their scales, as in ggml's Q4_K."""


@dataclass(frozen=True)
class Grid:
    """weight = scale * code, or scale * code + minimum with codes from zero. Tensors are (rows, groups) where groups
    run along rows, (groups, columns) where they run down columns.

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
