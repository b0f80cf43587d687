"""A checkpoint too large to hold, answering like a transformers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.live.walk import Walk, autocast


class Streamed:
    """One layer in memory at a time: `model(ids).logits`.

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
        with autocast(self.walk.dtype):
            hidden = self.walk.embed(ids)
            for layer in self.walk.each():
                hidden = layer.run(hidden)
                self.on_layer(layer.index + 1)
                del layer  # before the next one needs its room
            return Streamed.Output(self.walk.logits(hidden))
