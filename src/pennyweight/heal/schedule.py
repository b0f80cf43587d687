"""What both ways of distilling share: how fast to learn, and which rows judge whether it helped."""

from __future__ import annotations

import math

JUDGES = 8
_LOCAL, _WHOLE = 0.5, 0.256
_WHOLE_AT = 0.045


def cosine(step: int, steps: int, *, floor: float = 0.1) -> float:
    """Share of the peak learning rate: from 1 down to `floor` over the steps, after a short linear start."""
    warm = min(1.0, (step + 1) / max(1.0, 0.05 * steps))
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def local_lr(hidden_size: int) -> float:
    """Peak learning rate of single blocks: falls with the width, as Adam's steps should (2e-3 at 256)."""
    return _LOCAL / hidden_size


def whole_lr(hidden_size: int, lost: float) -> float:
    """Peak learning rate of a whole model that lost `lost`: its distillation loss per term before the first step.

    1e-3 at a width of 256 if it lost much; proportionally less if it lost little, since a model that is nearly right
    has more to lose by large steps than to win. Constants found by trying on the reference model (docs/log.md).
    """
    return _WHOLE / hidden_size * min(1.0, lost / _WHOLE_AT)


def judges(rows: int) -> int:
    """How many of the rows, the last ones, are not trained on but say before and after how good the child is."""
    return min(JUDGES, max(1, rows // 5))
