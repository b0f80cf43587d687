"""Global distillation: the whole child learns to think like the parent.

Loss = sum over layers of (1 - cos(child hidden, parent hidden)) + KL(parent || child), without the language-modelling
loss, which Puzzle found to hurt (arXiv:2411.19146, section on global distillation).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from pennyweight.heal import schedule as _schedule
from pennyweight.live.walk import autocast
from pennyweight.runs.events import Listener, waiting
from pennyweight.runs.store import Store

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
    `lr`, which None leaves to `_schedule.whole_lr`.
    """
    steps = max(1, tokens // (batch_rows * ids.shape[1]))
    named = dict(child.named_parameters())
    child.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in named.items()}
    kept = _schedule.judges(len(ids))
    seen, judges = max(1, len(ids) - kept), ids[-kept:]

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with autocast(dtype):
            with torch.no_grad():
                taught = parent(batch, use_cache=False, output_hidden_states=True)
            return distillation_loss(child(batch, use_cache=False, output_hidden_states=True), taught)

    with waiting(listen, "loss unhealed"), torch.no_grad():
        first = float(forward(judges))
    if lr is None:
        lr = _schedule.whole_lr(child.config.hidden_size, first / (child.config.num_hidden_layers + 1))
    optimizer = torch.optim.AdamW(named.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    step = _resume(store, named, optimizer)
    losses = store.get("heal/whole/losses") or []
    losses = losses[:step]
    saved_at = time.monotonic()
    listen.begin("heal model", total=steps, done=step, unit="steps")
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule.cosine(step, steps)
        batch = ids[torch.arange(step * batch_rows, (step + 1) * batch_rows) % seen]
        loss = forward(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        listen.advance(step, loss=losses[-1])
        if step == steps or time.monotonic() - saved_at > _CHECKPOINT_S:
            _save(store, named, optimizer, step, losses)
            saved_at = time.monotonic()
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


def _save(
    store: Store, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, losses: list[float]
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["step"] = torch.tensor(step)
    before = store.path("heal/whole/checkpoint")
    store.put("heal/whole/losses", losses)
    store.put_tensors("heal/whole/checkpoint", tensors)
    if before is not None and before != store.path("heal/whole/checkpoint"):
        before.unlink(missing_ok=True)


def _resume(store: Store, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    if store.get("heal/whole/checkpoint") is None:
        return 0
    tensors = store.tensors("heal/whole/checkpoint")
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            named[rest].data.copy_(tensor)
        elif kind == "adam":
            index, name = rest.split(".")
            states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])
