"""Children assembled in memory from variants made once, for trying many layouts quickly.

For models that fit in memory. Every (slot, choice) is built a single time, as it was scored; a child is then the
parent's layers with other blocks put in, run from the first changed layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pennyweight import texts
from pennyweight.judge import score
from pennyweight.judge.stats import SlotStats, of_slot
from pennyweight.live.parts import Parts
from pennyweight.live.walk import Walk, autocast
from pennyweight.model.choices import PARENT, Choice, Layout
from pennyweight.model.slots import Slot
from pennyweight.runs.scratch import Remembered
from pennyweight.variants import apply

_TOGETHER = 4  # rows


class Assembled:
    """Children of one parent, measured on fixed rows."""

    def __init__(
        self,
        walk: Walk,
        stats_of: Callable[[int], Mapping[str, torch.Tensor]],
        rows: texts.Rows,
        *,
        codes: Remembered | None = None,
        library: Path | None = None,
    ) -> None:
        """`stats_of(layer)` gives the layer's statistics, read when first needed; `codes`: those that were found;
        `library`: the folder of variants that were trained."""
        self._walk, self._stats_of, self._codes, self._library = walk, stats_of, codes, library
        self._layers = list(walk.each())
        self._blocks: dict[tuple[Slot, str], Parts] = {}
        self._ids, self._scored = torch.from_numpy(rows.ids), torch.from_numpy(rows.scored)
        with torch.no_grad(), autocast(walk.dtype):
            self._hidden = [walk.embed(self._ids[:, :-1])]
            for layer in self._layers:
                self._hidden.append(layer.run(self._hidden[-1], together=_TOGETHER))

    def _parts(self, slot: Slot, choice: Choice) -> Parts:
        """The slot's modules under a choice."""
        key = (slot, choice.key())
        if key not in self._blocks:
            assert slot.layer is not None
            parts = self._layers[slot.layer].fork(slot).parts[slot]
            own = of_slot(self._stats_of(slot.layer), slot.kind, codes=self._codes, owner=slot, library=self._library)
            self._blocks[key] = apply(parts, choice, own)
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
                first, parts = 0, walk.embedding()
                apply(parts, layout[embed], SlotStats({}, codes=self._codes))
                hidden = parts.root(self._ids[:, :-1]).float()
            for layer in self._layers[first:]:
                for slot in layer.parts:
                    if layout.get(slot, PARENT):
                        parts = self._parts(slot, layout[slot])
                        layer = layer.having(slot, parts.modules(), parts.shape)
                hidden = layer.run(hidden, together=_TOGETHER)
            last = walk.logits_slot
            pending = [(last, layout.get(last, PARENT), hidden)]
            sums = score.compare(walk, self._hidden[-1], pending, self._ids[:, 1:], self._scored, codes=self._codes)
        return score.mean(next(iter(sums[str(last)].values())))
