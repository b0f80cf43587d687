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

from pennyweight.families._decoder import BLOCK, NORM
from pennyweight.heal import schedule as _schedule
from pennyweight.live.walk import Walk, autocast, run_layer, run_slot
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
    """New tensors of every changed slot, names relative to the layer; each slot sees `tokens` tokens of `ids` (rows,
    tokens). Finished slots are kept in `store` and not trained again. AdamW, cosine decay to a tenth of `lr`, which
    None leaves to `_schedule.local_lr`."""
    if lr is None:
        lr = _schedule.local_lr(parent.checkpoint.config["hidden_size"])
    positions = parent.positions(ids.shape[1])
    steps = max(1, tokens // (batch_rows * ids.shape[1]))
    slots = [slot for slot in child.shapes if slot in changed and not isinstance(child.shapes[slot], Noop)]
    healed: dict[Slot, dict[str, torch.Tensor]] = {}
    known = sum(store.get(f"heal/local/{slot}") is not None for slot in slots)
    listen.begin("heal blocks", total=len(slots), done=known, unit="blocks")
    last = max((slot.layer or 0 for slot in slots), default=-1)
    with torch.no_grad(), autocast(parent.dtype):
        hidden = parent.embedding()(ids).float()
    for index in range(last + 1):
        layer = parent.layer(index)
        with torch.no_grad(), autocast(parent.dtype):
            target = torch.cat([run_layer(layer, rows, positions) for rows in hidden.split(batch_rows)])
        for slot in [slot for slot in slots if slot.layer == index]:
            key = f"heal/local/{slot}"
            if store.get(key) is None:
                pupil: Any = child.layer(index)
                loss = _train(slot, layer, pupil, hidden, target, positions, steps, lr, batch_rows, parent.dtype)
                names = (BLOCK[slot.kind], NORM[slot.kind])
                state = {f"{n}.{k}": v for n in names for k, v in getattr(pupil, n).state_dict().items()}
                store.put_tensors(key, {name: tensor.bfloat16() for name, tensor in state.items()})
                store.put(f"heal/local-loss/{slot}", loss)
                listen.advance(len(healed) + 1)  # slots go in order: all before this one are in `healed`
            healed[slot] = store.tensors(key)
        hidden = target
    listen.end()
    return healed


def _train(
    slot: Slot,
    teacher: Any,
    pupil: Any,
    hidden: torch.Tensor,
    target: torch.Tensor,
    positions: dict[str, Any],
    steps: int,
    lr: float,
    batch_rows: int,
    dtype: torch.dtype,
) -> list[float]:
    """Loss before and after on rows kept apart; `pupil`'s slot is trained in place, in float32, or left as it was if
    training did not help."""
    trained: list[nn.Parameter] = []
    for name in (BLOCK[slot.kind], NORM[slot.kind]):
        getattr(pupil, name).float().requires_grad_(True)
        trained += list(getattr(pupil, name).parameters())
    kept = _schedule.judges(len(hidden))
    seen = max(1, len(hidden) - kept)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in pupil.named_parameters() if p.requires_grad}

    def measure() -> float:
        with torch.no_grad():
            return float(forward(hidden[-kept:], target[-kept:]))

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(dtype):
            if slot.kind == "mixer":
                middle = x + run_slot(pupil, "mixer", x, positions)
                out = middle + run_slot(teacher, "ffn", middle, positions)
            else:
                with torch.no_grad():
                    middle = x + run_slot(teacher, "mixer", x, positions)
                out = middle + run_slot(pupil, "ffn", middle, positions)
        return (out.float() - y).square().mean() / ((y - x).square().mean() + 1e-6)

    first = measure()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule.cosine(step, steps)
        rows = torch.arange(step * batch_rows, (step + 1) * batch_rows) % seen
        x, y = hidden[rows], target[rows]
        loss = forward(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    last = measure()
    if last >= first:  # a block that was nearly right can only lose to a few steps of noise
        with torch.no_grad():
            for name, p in pupil.named_parameters():
                if name in before:
                    p.copy_(before[name])
        last = first
    return [first, last]
