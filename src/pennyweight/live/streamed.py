"""A checkpoint too large to hold, answering like a transformers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.live.walk import Walk, float_logits, run_layer


class Streamed:
    """A checkpoint that answers like a transformers model, holding one layer at a time: `model(ids).logits`.

    Every call reads the whole checkpoint once, so give it many rows at once and few times. `on_layer` hears how many
    layers of a call are done.
    """

    @dataclass(frozen=True)
    class Output:
        logits: torch.Tensor

    def __init__(self, walk: Walk, *, on_layer: Callable[[int], None] = lambda done: None) -> None:
        self.walk, self.on_layer = walk, on_layer

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, **ignored: Any) -> Streamed.Output:
        positions = self.walk.positions(ids.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.walk.dtype == torch.bfloat16):
            hidden = self.walk.vocabulary_matrix("embed")[ids].float()
            for index in range(self.walk.layers):
                hidden = run_layer(self.walk.layer(index), hidden, positions)
                self.on_layer(index + 1)
            return Streamed.Output(float_logits(self.walk.norm()(hidden), self.walk.vocabulary_matrix("head")))
