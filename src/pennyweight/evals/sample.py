"""Text sampled from a model itself: calibration data in its own words when no other text is at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import Rows, separator_id


@torch.inference_mode()
def rows(
    model: Any,
    tokenizer: Any,
    count: int,
    context: int,
    *,
    seed: int,
    temperature: float = 1.0,
    batch: int = 64,
    listen: Listener | None = None,
) -> Rows:
    """`count` rows of `context` + 1 tokens drawn from the model's own distribution, each after a separator.

    Equal seeds give equal rows on one machine. nbytes is what the tokens decode to. Progress is told in tokens of all
    rows.
    """
    listen = listen or Silent()
    listen.begin("sample", total=count * context, unit="tokens")
    generator = torch.Generator().manual_seed(seed)
    separator = separator_id(tokenizer)
    parts = []
    for start in range(0, count, batch):
        ids = torch.full((min(batch, count - start), 1), separator)
        step, cache = ids, None
        for done in range(1, context + 1):
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            p = torch.softmax(out.logits[:, -1].float() / temperature, dim=-1)
            step = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
            listen.advance(start * context + done * len(ids))
        parts.append(ids.numpy())
    listen.end()
    ids = np.concatenate(parts)
    nbytes = np.array([len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in ids], np.int64)
    return Rows(ids, ids[:, 1:] != separator, nbytes)
