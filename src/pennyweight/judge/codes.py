"""Codes that quantisers find, once: GPTQ of one matrix takes as long as many passes through its layer, and the same
matrix is wanted in the same bits for every chunk of scored text, by several axes, by a stopped run that goes on.

They are kept as formats keep them, a file for each matrix (or part of a large one), way of storing and method, named by
what they were made of: the matrix' own bytes, and whose activations it was fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from pennyweight import kinds, quantize, variants
from pennyweight.disk.opened import open_checkpoint
from pennyweight.judge.stats import of_slot, read
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Shape, Weight
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.runs import executor
from pennyweight.runs.scratch import Remembered


def wanted(shape: Shape, choices: Iterable[Choice]) -> dict[str, tuple[Weight, str]]:
    """The matrices of a slot, each as it is to be kept, and the method that finds its codes, that `choices` which only
    say how weights are kept need; once each, whichever axis asks, by a name for them."""
    found: dict[str, tuple[Weight, str]] = {}
    for choice in choices:
        storing = variants.storing(choice)
        if storing is None or variants.structural(choice):
            continue
        method = storing[1].method
        for weight in variants.reshape(shape, choice).weights():
            if weight.is_matrix and weight.stored != BFLOAT16 and not quantize.quick(weight.stored, method):
                found[f"{weight.name} {weight.stored.format} {weight.stored} {method}"] = weight, method
    return found


def spent(shape: Shape, axes: Sequence[str]) -> set[str]:
    """Moments of a slot of which the diagonal is enough once the codes of its own matrices are kept: those that no
    other axis reads, of activations that no other axis leaves as wide under other matrices."""
    found = set()
    for activation in ("input", "inner"):
        name, needed = f"{activation}_moment", False
        for module in (kinds.load("variants", axis) for axis in axes if not variants.stores(axis)):
            for spec in module.options(shape):
                after = module.reshape(shape, spec)
                as_wide = _width(after, activation) == _width(shape, activation)
                needed |= name in module.STATS or (bool(after.readers(activation)) and as_wide)
        if not needed:
            found.add(name)
    return found


def _width(shape: Shape, activation: str) -> int:
    return shape.hidden_size if activation == "input" else shape.inner_size


@torch.no_grad()
def find(
    model: Path, choices: Mapping[Slot, Sequence[Choice]], stats: Path | None, folder: Path, dtype: torch.dtype
) -> dict[str, list[str]]:
    """Task: find the codes of every choice, as far as `folder` does not keep them. The slots are those of one layer,
    with its statistics, or of none. {slot and matrix (wanted): names of files}."""
    walk = Walk(open_checkpoint(model), dtype=dtype)
    tensors = {} if stats is None else read(stats)
    layer = next((walk.layer(slot.layer) for slot in choices if slot.layer is not None), None)
    files: dict[str, list[str]] = {}
    for slot, offered in choices.items():
        parts = layer.parts[slot] if layer is not None else walk.embedding() if slot.kind == "embed" else walk.head()
        kept = Remembered(folder)
        own = of_slot(tensors, slot.kind, codes=kept, owner=slot)
        for name, (weight, method) in wanted(parts.shape, offered).items():
            matrix, reads = parts.matrix(weight.name).weight.detach(), parts.shape.reads.get(weight.name)
            kept.used.clear()
            quantize.pack(matrix, reads, own, weight.stored, method)
            files[f"{slot} {name}"] = list(kept.used)
            executor.tick()
    return files
