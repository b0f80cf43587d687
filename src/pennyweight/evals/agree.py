"""How closely a child follows its parent on given text: KL per token and top-1 agreement.

Beside them stands what the best guess without context would reach on the same text: of all distributions that are the
same for every token, the parent's mean has the least KL. A model that is further away follows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.evals.loss import by_row
from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import Rows

_LOGITS_AT_ONCE = 2**21
"""What is computed of them is ten times as large as they are."""


@dataclass(frozen=True)
class Agreement:
    """kl: nats per token of KL(parent || child). blind_kl: of KL(parent || its own mean). top1: share of tokens where
    parent and child rank the same token first."""

    kl: float
    blind_kl: float
    top1: float
    tokens: int


@torch.no_grad()
def agree(parent: Any, child: Any, rows: Rows, *, listen: Listener | None = None) -> Agreement:
    """Run two causal LMs over the same rows, logits in float32. Raises ValueError if their vocabularies differ."""
    listen = listen or Silent()
    pairs = zip(by_row(parent, rows), by_row(child, rows), strict=True)
    listen.begin("agreement", total=len(rows.ids), unit="rows")
    kl, entropy, same, tokens = 0.0, 0.0, 0, 0
    mean = torch.zeros((), dtype=torch.float64)
    for number, (p, q) in enumerate(pairs, 1):
        if p.shape != q.shape:
            raise ValueError(
                f"parent has {p.shape[-1]} tokens in its vocabulary, child {q.shape[-1]}; they cannot be compared"
            )
        some = max(1, _LOGITS_AT_ONCE // p.shape[-1])
        for own, others in zip(p.split(some), q.split(some), strict=True):
            same += int((own.argmax(dim=-1) == others.argmax(dim=-1)).sum())
            log_p, log_q = own.log_softmax(dim=-1), others.log_softmax(dim=-1)
            each = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
            kl += float(each.double().sum())
            probability = log_p.exp_()
            entropy += float(torch.special.entr(probability).sum(dim=-1).double().sum())
            mean = mean + probability.sum(dim=0, dtype=torch.float64)
        tokens += len(p)
        listen.advance(number)
    listen.end()
    blind_kl = float(torch.special.entr(mean / tokens).sum()) - entropy / tokens
    return Agreement(kl / tokens, blind_kl, same / tokens, tokens)
