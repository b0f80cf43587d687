"""Global distillation: the whole child learns to think like the parent.

Loss = sum over layers of (1 - cos(child hidden, parent hidden)) + KL(parent || child), without the language-modelling
loss, which Puzzle found to hurt (arXiv:2411.19146, section on global distillation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pennyweight.heal import loop, schedule
from pennyweight.live.walk import autocast
from pennyweight.runs.events import Listener, waiting
from pennyweight.runs.store import Store

_CHECKPOINT = "heal/whole/checkpoint"
_CHECKPOINT_S = 20.0


def heal(
    parent: Any,
    child: Any,
    ids: torch.Tensor,
    *,
    tokens: int,
    lr: float | None,
    batch_rows: int,
    dtype: torch.dtype,
    store: Store,
    listen: Listener,
) -> None:
    """Train `child` (float32 weights) in place on `tokens` tokens of `ids` (rows, tokens); both transformers models.

    The last rows are not trained on: if the loss there has not fallen, the child is left as it came. Goes on from the
    last checkpoint in `store`, to the same weights as a run that was never stopped. AdamW, cosine decay to a tenth of
    `lr`, which None leaves to `schedule.whole_lr`.
    """
    steps = max(1, tokens // (batch_rows * ids.shape[1]))
    named = dict(child.named_parameters())
    child.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in named.items()}
    kept = schedule.judges(len(ids))
    seen, judges = max(1, len(ids) - kept), ids[-kept:]

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with autocast(dtype):
            with torch.no_grad():
                taught = parent(batch, use_cache=False, output_hidden_states=True)
            return distillation_loss(child(batch, use_cache=False, output_hidden_states=True), taught)

    with waiting(listen, "loss unhealed"), torch.no_grad():
        first = float(forward(judges))
    if lr is None:
        lr = schedule.whole_lr(child.config.hidden_size, first / (child.config.num_hidden_layers + 1))
    optimizer = loop.adamw(named.values(), lr)
    done = 0
    if store.get(_CHECKPOINT) is not None:
        tensors = store.tensors(_CHECKPOINT)
        done = int(tensors.pop("step"))
        loop.restore(tensors, named, [optimizer])
    losses = (store.get("heal/whole/losses") or [])[:done]

    def hear(step: int, loss: torch.Tensor) -> None:
        losses.append(float(loss))
        listen.advance(step, loss=losses[-1])

    def save(step: int) -> None:
        earlier = store.path(_CHECKPOINT)
        store.put("heal/whole/losses", losses)
        store.put_tensors(_CHECKPOINT, {**loop.state(named, [optimizer]), "step": torch.tensor(step)})
        if earlier is not None and earlier != store.path(_CHECKPOINT):
            earlier.unlink(missing_ok=True)

    listen.begin("heal model", total=steps, done=done, unit="steps")
    loop.run(
        lambda step: forward(ids[torch.arange(step * batch_rows, (step + 1) * batch_rows) % seen]),
        named.values(),
        [optimizer],
        steps=steps,
        rate=lambda step: schedule.cosine(step, steps),
        first=done,
        hear=hear,
        save=save,
        save_every_s=_CHECKPOINT_S,
    )
    with torch.no_grad():
        last = float(forward(judges))
        if last >= first:
            for name, p in named.items():
                p.copy_(before[name])
    store.put("heal/whole/judged", [first, last])
    child.requires_grad_(False)
    listen.end()


def distillation_loss(child: Any, parent: Any) -> torch.Tensor:
    """From two transformers outputs with hidden states: summed cosine distances plus KL per token, in nats."""
    loss = child.logits.new_zeros((), dtype=torch.float32)
    for c, p in zip(child.hidden_states[1:], parent.hidden_states[1:], strict=True):
        loss = loss + (1 - nn.functional.cosine_similarity(c.float(), p.float(), dim=-1)).mean()
    log_p, log_q = (out.logits.float().log_softmax(dim=-1) for out in (parent, child))
    return loss + nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1).mean()
