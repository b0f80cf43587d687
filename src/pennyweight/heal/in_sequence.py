"""What a block writes into the residual stream, fitted again once the blocks before it are the child's.

Variants are fitted to what the parent's block gave on the parent's inputs (live/least_squares.py), as if nothing before
them had changed. Here the child's layers are passed one after the other, and the matrix that each block writes with
(o_proj, down_proj, or the one of a linear block) is changed by the D that minimises

    E |h + W z - (g + (W + D) z)|^2 + r |D|^2

h + W z being the parent's stream behind the block, g the child's before it and z the child's own inner activation: so a
block takes back what it can of the error that came in. r is DAMPING times the mean square of z. Closed form, two
moments of one block at a time, on text that healing reads too. It is what GPTAQ (arXiv:2504.02692) does for the
rounding of a matrix, done for the shape of blocks. Blocks with a norm behind them are left out: what they write is not
linear in W.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from pennyweight.heal import schedule
from pennyweight.heal.local import without
from pennyweight.live import magnitudes
from pennyweight.live.least_squares import solve
from pennyweight.live.parts import Parts, set_linear
from pennyweight.live.walk import Layer, Walk, autocast
from pennyweight.model.shapes import Noop
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Listener
from pennyweight.runs.store import Store

DAMPING = 1e-2  # 1e-3 and 1e-1 gave the same to 0.3 % (docs/log.md)
_KINDS = ("mixer", "ffn")  # in the order in which a layer runs them


@torch.no_grad()
def fit(
    parent: Walk,
    child: Walk,
    changed: Collection[Slot],
    ids: torch.Tensor,
    *,
    tokens: int,
    batch_rows: int,
    store: Store,
    listen: Listener,
) -> dict[str, torch.Tensor]:
    """The child's new matrices by name on disk, bfloat16, from `tokens` tokens of `ids` (rows, tokens).

    Layers before the first of the slots that are `changed` stay as they are. The last rows are not fitted to: where the
    error there does not fall the matrix stays. Finished matrices are kept in `store` and not fitted again.
    """
    kept = schedule.judges(len(ids))
    some = min(len(ids) - kept, -(-tokens // ids.shape[1]))
    ids = torch.cat([ids[: max(1, some)], ids[-kept:]])
    first = min(slot.layer for slot in changed if slot.layer is not None)
    found: dict[str, torch.Tensor] = {}
    listen.begin("fit in sequence", total=parent.layers, unit="layers")
    with autocast(parent.dtype):
        taught = own = parent.embed(ids)
        for theirs in parent.each():
            if theirs.index < first:
                taught = own = theirs.run(taught, together=batch_rows)
                listen.advance(theirs.index + 1)
                continue
            ours = child.layer(theirs.index)
            for kind, other in zip(_KINDS, reversed(_KINDS), strict=True):
                half = without(ours, Slot(other, ours.index))
                taught = without(theirs, Slot(other, theirs.index)).run(taught, together=batch_rows)
                found |= _kept(half, Slot(kind, ours.index), own, taught, kept, batch_rows, store)
                own = half.run(own, together=batch_rows)
            listen.advance(theirs.index + 1)
    listen.end()
    return found


def _kept(
    half: Layer, slot: Slot, entering: torch.Tensor, wanted: torch.Tensor, judges: int, batch_rows: int, store: Store
) -> dict[str, torch.Tensor]:
    """The slot's new matrix by name on disk, which is put in place; nothing if it stays."""
    parts, key = half.parts[slot], f"heal/fitted/{slot}"
    name = _writes(parts)
    if name is None:
        return {}
    linear, on_disk = parts.matrix(name), parts.place.tensor(name)
    if store.get(key) is None:
        before = linear.weight.detach().clone()
        error = _error(half, entering[-judges:], wanted[-judges:], batch_rows)
        change = _change(half, slot, linear, entering[:-judges], wanted[:-judges], batch_rows)
        set_linear(linear, before.float() + change, linear.bias)
        fitted = _error(half, entering[-judges:], wanted[-judges:], batch_rows)
        if fitted >= error:
            set_linear(linear, before, linear.bias)
        store.put_tensors(key, {on_disk: linear.weight.detach().bfloat16()})
        store.put(f"heal/fitted-loss/{slot}", [error, min(error, fitted)])
    tensors = store.tensors(key)
    set_linear(linear, tensors[on_disk], linear.bias)
    return tensors


def _writes(parts: Parts) -> str | None:
    """The name of the one matrix whose products join the residual stream as they are."""
    shape = parts.shape
    if isinstance(shape, Noop) or parts.norm("post_norm") is not None:
        return None
    last = shape.readers("inner") or shape.readers("input")
    return last[0] if len(last) == 1 else None


def _change(
    half: Layer, slot: Slot, linear: Any, entering: torch.Tensor, wanted: torch.Tensor, batch_rows: int
) -> torch.Tensor:
    """D of the module's equation, (outputs, inputs) float32."""
    parts, heard = half.parts[slot], []
    moment, cross = torch.zeros(linear.in_features, linear.in_features), torch.zeros(linear.weight.shape)

    def hear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.append(magnitudes.entering(args, kwargs).flatten(0, -2).float())

    handle = parts.reader("inner" if parts.shape.readers("inner") else "input").register_forward_pre_hook(
        hear, with_kwargs=True
    )
    try:
        for start in range(0, len(entering), batch_rows):
            rows = slice(start, start + batch_rows)
            left = (wanted[rows] - half.run(entering[rows])).flatten(0, -2).float() / parts.place.residual
            with torch.autocast("cpu", enabled=False):  # moments in bfloat16 would not be positive definite
                inner = heard.pop()
                moment.addmm_(inner.T, inner)
                cross.addmm_(left.T, inner)
    finally:
        handle.remove()
    with torch.autocast("cpu", enabled=False):
        return solve(cross, moment, damping=DAMPING)


def _error(half: Layer, entering: torch.Tensor, wanted: torch.Tensor, batch_rows: int) -> float:
    """Mean square by which the child's stream is off behind the block, over that of the parent's."""
    off = (half.run(entering, together=batch_rows) - wanted).float().square().mean()
    return float(off / wanted.float().square().mean().clamp_min(1e-30))
