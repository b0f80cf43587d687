"""How closely a child follows its parent on given text: KL per token and top-1 agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import Rows


@dataclass(frozen=True)
class Agreement:
    """kl: nats per token of KL(parent || child). top1: share of tokens where both rank the same token first."""

    kl: float
    top1: float
    tokens: int


@torch.no_grad()
def agree(parent: Any, child: Any, rows: Rows, *, batch_size: int = 8, listen: Listener | None = None) -> Agreement:
    """Run two causal LMs over the same rows, logits in float32. Raises ValueError if their vocabularies differ."""
    listen = listen or Silent()
    listen.begin("agreement", total=len(rows.ids), unit="rows")
    kl, same, tokens = 0.0, 0, 0
    for start in range(0, len(rows.ids), batch_size):
        ids = torch.from_numpy(rows.ids[start : start + batch_size, :-1])
        scored = torch.from_numpy(rows.scored[start : start + batch_size])
        p, q = (model(ids, use_cache=False).logits[scored].float() for model in (parent, child))
        if p.shape != q.shape:
            raise ValueError(
                f"parent has {p.shape[-1]} tokens in its vocabulary, child {q.shape[-1]}; they cannot be compared"
            )
        log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
        kl += float(
            torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1).double().sum()
        )
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        tokens += len(p)
        listen.advance(start + len(ids))
    listen.end()
    return Agreement(kl / tokens, same / tokens, tokens)
