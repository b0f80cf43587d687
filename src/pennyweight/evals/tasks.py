"""Zero-shot tasks by log-likelihood: local files without a network, lm_eval's task list as an extra.

A local file is JSON lines (.jsonl, .jsonl.gz) in the layout of llm-foundry; each line one of
    {"query", "choices", "gold"}                    multiple choice: which continuation is likeliest per token
    {"context_options", "continuation", "gold"}     which context makes the continuation likeliest
    {"context", "continuation"}                     is the continuation what greedy decoding gives
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pennyweight.disk.tokenizer import added_before, encode
from pennyweight.evals.loss import nats_per_target
from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import separator_id


@dataclass(frozen=True)
class Accuracy:
    """Share right of `items`, with its standard error; `chance` is what guessing gives on average."""

    accuracy: float
    standard_error: float
    chance: float
    items: int


def local(model: Any, tokenizer: Any, path: Path, *, items: int, listen: Listener | None = None) -> Accuracy:
    """The first `items` items of a task file. Raises FileNotFoundError, or ValueError for a line of no known layout."""
    listen, found = listen or Silent(), list(_lines(path, items))
    if not found:
        raise ValueError(f"{path} holds no items")
    listen.begin(path.name, total=len(found), unit="items")
    right, chances = [], []
    for number, item in enumerate(found, 1):
        if {"query", "choices", "gold"} <= item.keys():
            scores = [_score(model, tokenizer, item["query"].rstrip(), " " + c.strip())[0] for c in item["choices"]]
            right.append(scores.index(max(scores)) == item["gold"])
            chances.append(1 / len(scores))
        elif {"context_options", "continuation", "gold"} <= item.keys():
            continuation = " " + item["continuation"].strip()
            scores = [
                _score(model, tokenizer, context.rstrip(), continuation)[0] for context in item["context_options"]
            ]
            right.append(scores.index(max(scores)) == item["gold"])
            chances.append(1 / len(scores))
        elif {"context", "continuation"} <= item.keys():
            right.append(_score(model, tokenizer, item["context"], item["continuation"])[1])
            chances.append(0.0)
        else:
            raise ValueError(
                f"{path}, line {number}: keys {sorted(item)} are no known task layout; docs/formats.md lists them"
            )
        listen.advance(number)
    listen.end()
    accuracy = sum(right) / len(right)
    error = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    return Accuracy(accuracy, error, sum(chances) / len(chances), len(right))


def _lines(path: Path, items: int) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= items:
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as err:
                raise ValueError(f"{path}, line {number + 1} is not JSON: {err}") from err


@torch.no_grad()
def _score(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Mean log-likelihood per token of the continuation, and whether greedy decoding would give it."""
    before = [*added_before(tokenizer), *encode(tokenizer, context)] or [separator_id(tokenizer)]
    after = encode(tokenizer, continuation)
    limit = model.config.max_position_embeddings
    ids = torch.tensor([[*before, *after][-limit:]])
    count = min(len(after), ids.shape[1] - 1)
    logits = model(ids[:, :-1], use_cache=False).logits[:, -count:]
    targets = ids[:, -count:]
    nats = nats_per_target(logits, targets)
    return -float(nats.mean()), bool((logits.argmax(dim=-1) == targets).all())


def harness(model: Any, tokenizer: Any, tasks: list[str], *, items: int) -> dict[str, Any]:
    """lm_eval's own results by task. A task is one of its names, or a YAML file in its format (local data, no network).

    Raises RuntimeError if the extra is not installed.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as err:
        raise RuntimeError("--tasks needs the extra: pip install 'pennyweight[eval]'") from err
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    named = [yaml.safe_load(Path(task).read_text()) if Path(task).is_file() else task for task in tasks]
    found = simple_evaluate(model=wrapped, tasks=named, limit=items)
    return {} if found is None else found["results"]
