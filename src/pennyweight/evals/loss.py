"""Language-modelling quality on given text: nats per token, bits per byte, perplexity.

Bits per byte compares models whatever their tokenizer: total nats / ln 2 / UTF-8 bytes of the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import Rows


@dataclass(frozen=True)
class Loss:
    """nats: summed negative log likelihood; tokens and nbytes: what it was summed over."""

    nats: float
    tokens: int
    nbytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.nbytes

    @property
    def perplexity(self) -> float:
        """Per token; comparable only between models that share a tokenizer."""
        return math.exp(self.nats / self.tokens)


def nats_per_target(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log q(target) in float32; logits (..., vocab), targets (...) int64. Returns (...)."""
    flat = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


@torch.no_grad()
def loss(model: Any, rows: Rows, *, batch_size: int = 8, listen: Listener | None = None, stage: str = "loss") -> Loss:
    """Run a transformers causal LM over rows. Separators are read but not counted. `stage`: what it is called to who
    listens.

    Rows are independent: no state goes from one to the next, so early tokens of a row see little context.
    """
    listen = listen or Silent()
    listen.begin(stage, total=len(rows.ids), unit="rows")
    nats, tokens, nbytes = 0.0, 0, 0
    for start in range(0, len(rows.ids), batch_size):
        ids = torch.from_numpy(rows.ids[start : start + batch_size])
        scored = torch.from_numpy(rows.scored[start : start + batch_size])
        per_target = nats_per_target(model(ids[:, :-1], use_cache=False).logits, ids[:, 1:])
        nats += float(per_target[scored].double().sum())
        tokens += int(scored.sum())
        nbytes += int(rows.nbytes[start : start + batch_size].sum())
        listen.advance(start + len(ids))
    listen.end()
    return Loss(nats, tokens, nbytes)
