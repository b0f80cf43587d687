"""Blockwise local distillation: every changed block learns to do what the parent's block did, on the parent's inputs.

Decoupled as in Puzzle (arXiv:2411.19146): a changed mixer is trained with the parent's frozen FFN behind it, a
changed FFN with the parent's mixer before it, so blocks never wait for each other and errors do not travel. The loss
is MSE at the layer's output over the mean square of what the parent's layer adds to the stream: 0 is perfect, 1 as
bad as leaving the layer out (the paper divides by the output's own square; we leave out the residual, which would
hide the scale).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pennyweight.heal import loop, schedule
from pennyweight.live.blocks import replace_block
from pennyweight.live.walk import Layer, Walk, autocast
from pennyweight.model.shapes import Noop
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Listener
from pennyweight.runs.store import Store


def heal(
    parent: Walk,
    child: Walk,
    changed: Collection[Slot],
    ids: torch.Tensor,
    *,
    tokens: int,
    lr: float | None,
    batch_rows: int,
    store: Store,
    listen: Listener,
) -> dict[Slot, dict[str, torch.Tensor]]:
    """New tensors of every changed slot by name on disk; each slot sees `tokens` tokens of `ids` (rows,
    tokens). Finished slots are kept in `store` and not trained again. AdamW, cosine decay to a tenth of `lr`, which
    None leaves to `schedule.local_lr`."""
    peak = schedule.local_lr(parent.checkpoint.config["hidden_size"]) if lr is None else lr
    steps = max(1, tokens // (batch_rows * ids.shape[1]))
    slots = [slot for slot in child.shapes if slot in changed and not isinstance(child.shapes[slot], Noop)]
    healed: dict[Slot, dict[str, torch.Tensor]] = {}
    known = sum(store.get(f"heal/local/{slot}") is not None for slot in slots)
    listen.begin("heal blocks", total=len(slots), done=known, unit="blocks")
    last = max((slot.layer or 0 for slot in slots), default=-1)
    with torch.no_grad(), autocast(parent.dtype):
        hidden = parent.embed(ids)
    for index in range(last + 1):
        layer = parent.layer(index)
        with torch.no_grad(), autocast(parent.dtype):
            target = layer.run(hidden, together=batch_rows)
        for slot in [slot for slot in slots if slot.layer == index]:
            key = f"heal/local/{slot}"
            if store.get(key) is None:
                pupil = child.layer(index).parts[slot]
                mixed = layer.having(slot, pupil.modules(), pupil.shape)
                loss = train(mixed, slot, hidden, target, steps, peak, batch_rows, parent.dtype)
                tensors = {name: parameter.detach().bfloat16() for name, parameter in pupil.parameters()}
                store.put_tensors(key, tensors)
                store.put(f"heal/local-loss/{slot}", loss)
                listen.advance(len(healed) + 1)  # slots go in order: all before this one are in `healed`
            healed[slot] = store.tensors(key)
        hidden = target
    listen.end()
    return healed


def train(
    layer: Layer,
    slot: Slot,
    hidden: torch.Tensor,
    target: torch.Tensor,
    steps: int,
    lr: float,
    batch_rows: int,
    dtype: torch.dtype,
    *,
    first: int = 0,
    judges: int | None = None,
) -> list[float]:
    """Loss before and after on rows kept apart. `layer` is the parent's with the pupil in one slot, whose modules are
    trained in place, in float32, or left as they were if training did not help. hidden, target (rows, tokens,
    hidden_size): what enters and what should leave it; the batches begin with number `first`. `judges`: how many rows,
    the last ones, are kept apart."""
    trained: list[nn.Parameter] = []
    for module in layer.parts[slot].modules().values():
        module.float().requires_grad_(True)
        trained += list(module.parameters())
    kept = schedule.judges(len(hidden)) if judges is None else judges
    seen = max(1, len(hidden) - kept)
    before = [parameter.detach().clone() for parameter in trained]

    def forward(rows: Any) -> torch.Tensor:
        x, y = hidden[rows], target[rows]
        with autocast(dtype):
            out = layer.run(x)
        return (out.float() - y).square().mean() / ((y - x).square().mean() + 1e-6)

    def measure() -> float:
        with torch.no_grad():
            return float(forward(slice(-kept, None)))

    at_first = measure()
    loop.run(
        lambda step: forward(torch.arange((first + step) * batch_rows, (first + step + 1) * batch_rows) % seen),
        trained,
        [loop.adamw(trained, lr)],
        steps=steps,
        rate=lambda step: schedule.cosine(step, steps),
    )
    last = measure()
    if last >= at_first:  # a block that was nearly right can only lose to a few steps of noise
        with torch.no_grad():
            for parameter, old in zip(trained, before, strict=True):
                parameter.copy_(old)
        last = at_first
    return [at_first, last]


def without(layer: Layer, slot: Slot) -> Layer:
    """A copy of the layer in which nothing stands in a slot."""
    copied = layer.fork(slot)
    parts = copied.parts[slot]
    if not isinstance(parts.shape, Noop):
        copied.parts[slot] = replace_block(parts, Noop(hidden_size=parts.shape.hidden_size))
    return copied
