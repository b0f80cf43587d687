"""Language-modelling quality on given text: nats per token, bits per byte, perplexity.

Bits per byte compares models whatever their tokenizer: total nats / ln 2 / UTF-8 bytes of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def by_row(model: Any, rows: Rows) -> Iterator[torch.Tensor]:
    """Float32 logits (scored, vocab) of the scored tokens of each row, one row at a time: those of a batch would be the
    largest thing in memory, and on a slow machine nobody would hear for minutes how far it is.

    `model`: a transformers causal LM, or one that is read layer by layer and reads all rows at once before the first
    (`Streamed.by_row`).
    """
    ids, scored = torch.from_numpy(rows.ids[:, :-1]), torch.from_numpy(rows.scored)
    if hasattr(model, "by_row"):
        logits = model.by_row(ids)
    else:
        logits = (model(row[None], use_cache=False).logits[0] for row in ids)
    return (each[wanted].float() for each, wanted in zip(logits, scored, strict=True))


@torch.no_grad()
def loss(model: Any, rows: Rows, *, listen: Listener | None = None, stage: str = "loss") -> Loss:
    """Run a causal LM over rows. Separators are read but not counted. `stage`: what it is called to who listens.

    Rows are independent: no state goes from one to the next, so early tokens of a row see little context.
    """
    listen = listen or Silent()
    found = by_row(model, rows)
    listen.begin(stage, total=len(rows.ids), unit="rows")
    nats = 0.0
    for row, logits in enumerate(found):
        targets = torch.from_numpy(rows.ids[row, 1:][rows.scored[row]])
        nats += float(nats_per_target(logits, targets).double().sum())
        listen.advance(row + 1)
    listen.end()
    return Loss(nats, int(rows.scored.sum()), int(rows.nbytes.sum()))
