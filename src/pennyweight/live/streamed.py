"""A checkpoint too large to hold, answering like a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.live.walk import Walk, autocast


class Streamed:
    """One layer in memory at a time: `model(ids).logits`.

    Every call reads the whole checkpoint once, so give it many rows at once and few times.
    """

    @dataclass(frozen=True)
    class Output:
        logits: torch.Tensor

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, **ignored: Any) -> Streamed.Output:
        with autocast(self.walk.dtype):
            hidden = self.walk.embed(ids)
            for layer in self.walk.each():
                hidden = layer.run(hidden)
            return Streamed.Output(self.walk.logits(hidden))
