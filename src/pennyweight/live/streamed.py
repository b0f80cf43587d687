"""A checkpoint too large to hold, answering like a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.live.walk import Walk, autocast, float_logits


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
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, **ignored: Any) -> Streamed.Output:
        with autocast(self.walk.dtype):
            return Streamed.Output(self.walk.logits(self._states(ids)))

    def read(self, ids: torch.Tensor) -> None:
        """Keep what leaves the last layer for these rows, so that `by_row` does not walk for them again."""
        with torch.no_grad(), autocast(self.walk.dtype):
            self._kept = ids, self._states(ids)

    def by_row(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits (tokens, vocab) of one row after the other: the model is read once, now or by `read` before, and no
        more than one row's logits are held."""
        if self._kept is None or not torch.equal(self._kept[0], ids):
            self.read(ids)
        assert self._kept is not None
        norm, matrix = self.walk.norm(), self.walk.matrix(self.walk.logits_slot)
        return (self.walk.finished(float_logits(norm(row), matrix)) for row in self._kept[1])

    def _states(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.walk.embed(ids)
        for layer in self.walk.each():
            hidden = layer.run(hidden)
            self.on_layer(layer.index + 1)
            del layer  # before the next one needs its room
        return hidden
