"""A library of blocks: children assembled in memory from variants made once, for trying many layouts quickly.

For models that fit in memory. Every (slot, choice) is built a single time, as it was scored; a child is then the
parent's layers with other blocks put in, run from the first changed layer on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pennyweight import texts
from pennyweight.families._decoder import BLOCK, NORM
from pennyweight.judge import score
from pennyweight.judge.stats import SlotStats, of_slot
from pennyweight.live.parts import Parts
from pennyweight.live.walk import Walk, autocast, run_layer
from pennyweight.model.choices import PARENT, Choice, Layout
from pennyweight.model.slots import Slot
from pennyweight.variants import apply


class Library:
    """Children of one parent, measured on fixed rows."""

    def __init__(self, walk: Walk, stats_of: Callable[[int], Mapping[str, torch.Tensor]], rows: texts.Rows) -> None:
        """`stats_of(layer)` gives the layer's statistics, read when first needed."""
        self._walk, self._stats_of = walk, stats_of
        self._layers = [walk.layer(index) for index in range(walk.layers)]
        self._blocks: dict[tuple[Slot, str], Any] = {}
        self._ids, self._scored = torch.from_numpy(rows.ids), torch.from_numpy(rows.scored)
        self._positions = walk.positions(self._ids.shape[1] - 1)
        with torch.no_grad(), autocast(walk.dtype):
            self._hidden = [walk.embedding()(self._ids[:, :-1]).float()]
            for layer in self._layers:
                self._hidden.append(self._run(layer, self._hidden[-1]))

    def _run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([run_layer(layer, rows, self._positions) for rows in hidden.split(4)])

    def _modules(self, slot: Slot, choice: Choice) -> tuple[Any, Any]:
        """The slot's block and norm under a choice."""
        key = (slot, choice.key())
        if key not in self._blocks:
            assert slot.layer is not None
            fork = score.fork(self._layers[slot.layer], slot.kind)
            apply(self._walk.parts(fork, slot), choice, of_slot(self._stats_of(slot.layer), slot.kind))
            self._blocks[key] = (getattr(fork, BLOCK[slot.kind]), getattr(fork, NORM[slot.kind]))
        return self._blocks[key]

    @torch.no_grad()
    def measure(self, layout: Layout) -> dict[str, float]:
        """{metric: mean} of the child against the parent on the library's rows; all zero for the parent's layout."""
        walk, embed = self._walk, Slot("embed")
        with autocast(walk.dtype):
            changed = [slot.layer for slot, choice in layout.items() if choice and slot.layer is not None]
            first = min(changed, default=walk.layers)
            hidden = self._hidden[first]
            if layout.get(embed, PARENT):
                first, embedding = 0, walk.embedding()
                apply(Parts(embedding, "embed", walk.shapes[embed]), layout[embed], SlotStats({}))
                hidden = embedding(self._ids[:, :-1]).float()
            for index in range(first, walk.layers):
                layer = copy.copy(self._layers[index])
                layer._modules = dict(layer._modules)
                for kind in ("mixer", "ffn"):
                    slot = Slot(kind, index)
                    if layout.get(slot, PARENT):
                        layer._modules[BLOCK[kind]], layer._modules[NORM[kind]] = self._modules(slot, layout[slot])
                hidden = self._run(layer, hidden)
            last = embed if walk.tied else Slot("head")
            pending = [(last, layout.get(last, PARENT), hidden)]
            sums = score.compare(walk, self._hidden[-1], pending, self._ids[:, 1:], self._scored)
        return score.mean(next(iter(sums[str(last)].values())))
