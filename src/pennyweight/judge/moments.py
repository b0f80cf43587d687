"""How far a slot's output moves when its matrices are kept in fewer bits, told by second moments: no child is run.

A matrix W that lost dW answers its inputs x with an error of mean square tr(dW H dW^T), H = mean x x^T: a share e =
tr(dW H dW^T) / tr(W H W^T) of what it says. A block is as wrong as its matrices together, and what it adds is a share
of the residual stream (`share` of stats.py), which the last norm and the head go by. So a slot's score is

    share * sum of e over its matrices

For embedding and head no moments are gathered: e counts all directions alike and the share is 1. It takes one product
for each matrix and way of storing instead of a pass through all layers behind it (score.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pennyweight import formats, quantize, variants
from pennyweight.disk.opened import open_checkpoint
from pennyweight.judge.stats import SlotStats, of_slot, read
from pennyweight.live.parts import Parts
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.runs.scratch import Remembered

STAT = "share"
_VALUES_AT_ONCE = 2**24


@torch.no_grad()
def errors(
    model: Path, choices: Mapping[Slot, Sequence[Choice]], stats: Path | None, codes: Path, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Task: {slot: {choice key: score}} of choices that only say how weights are kept. The slots are those of one
    layer, with its whole statistics, or of none. Codes that were found (codes.py) are used."""
    walk = Walk(open_checkpoint(model), dtype=dtype)
    tensors = {} if stats is None else read(stats)
    layer = next((walk.layer(slot.layer) for slot in choices if slot.layer is not None), None)
    found: dict[str, dict[str, float]] = {}
    for slot, offered in choices.items():
        parts = layer.parts[slot] if layer is not None else walk.embedding() if slot.kind == "embed" else walk.head()
        own = of_slot(tensors, slot.kind, codes=Remembered(codes), owner=slot)
        share = float(own[STAT]) if STAT in own else 1.0
        known: dict[str, float] = {}
        found[str(slot)] = {choice.key(): share * _error(parts, choice, own, known) for choice in offered}
    return found


def _error(parts: Parts, choice: Choice, stats: SlotStats, known: dict[str, float]) -> float:
    """Sum of the shares that a choice's matrices lose; `known` has those of ways that another choice took as well."""
    storing = variants.storing(choice)
    assert storing is not None and not variants.structural(choice), f"{choice} does more than store"
    total = 0.0
    for weight in variants.reshape(parts.shape, choice).weights():
        if weight.is_matrix and weight.stored != BFLOAT16:
            key = f"{weight.name} {weight.stored.format} {weight.stored} {storing[1].method}"
            if key not in known:
                matrix, reads = parts.matrix(weight.name).weight.detach(), parts.shape.reads.get(weight.name)
                packed = quantize.pack(matrix, reads, stats, weight.stored, storing[1].method)
                known[key] = lost(matrix, formats.unpack(packed), stats.get(f"{reads}_moment"))
            total += known[key]
    return total


def lost(weight: torch.Tensor, kept: torch.Tensor, moment: torch.Tensor | None) -> float:
    """tr(dW H dW^T) / tr(W H W^T) of a matrix (rows, columns) and what was kept of it; `moment` H (columns, columns),
    None: the identity. 0 where the matrix answers nothing."""

    def energy(matrix: torch.Tensor) -> float:
        return float(((matrix if moment is None else matrix @ moment) * matrix).sum(dtype=torch.float64))

    whole = error = 0.0
    step = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for part, near in zip(weight.split(step), kept.split(step), strict=True):
        whole, error = whole + energy(part.float()), error + energy(near.float() - part.float())
    return error / whole if whole > 0 else 0.0
