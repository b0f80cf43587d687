"""Zero-shot tasks by log-likelihood: local files without a network, lm_eval's task list as an extra.

A local file is JSON lines (.jsonl, .jsonl.gz) in the layout of llm-foundry; each line one of
    {"query", "choices", "gold"}                    multiple choice: which continuation is likeliest per token
    {"context_options", "continuation", "gold"}     which context makes the continuation likeliest
    {"context", "continuation"}                     is the continuation what greedy decoding gives
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

from pennyweight.disk.reading import checked, size_of, yaml_file
from pennyweight.evals.loss import nats_per_target
from pennyweight.runs.events import Listener, Silent
from pennyweight.texts import added, separator_id


@dataclass(frozen=True)
class Accuracy:
    """Share right of `items`, with its standard error; `chance` is what guessing gives on average."""

    accuracy: float
    standard_error: float
    chance: float
    items: int


def local(model: Any, tokenizer: Any, path: Path, *, items: int, listen: Listener | None = None) -> Accuracy:
    """The first `items` items of a task file. Raises FileNotFoundError, or ValueError for a line of no known layout."""
    listen, found = listen or Silent(), list(_items(path, items))
    if not found:
        raise ValueError(f"{path} holds no items")
    listen.begin(path.name, total=len(found), unit="items")
    right, chances = [], []
    for number, item in enumerate(found, 1):
        if isinstance(item, _Completion):
            right.append(_score(model, tokenizer, item.context, item.continuation)[1])
            chances.append(0.0)
        else:
            scores = [_score(model, tokenizer, context, continuation)[0] for context, continuation in item.pairs()]
            right.append(scores.index(max(scores)) == item.gold)
            chances.append(1 / len(scores))
        listen.advance(number)
    listen.end()
    accuracy = sum(right) / len(right)
    error = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    return Accuracy(accuracy, error, sum(chances) / len(chances), len(right))


class _Choices(BaseModel):
    query: str
    choices: list[str] = Field(min_length=1)
    gold: int = Field(ge=0)

    def pairs(self) -> list[tuple[str, str]]:
        return [(self.query.rstrip(), " " + choice.strip()) for choice in self.choices]


class _Contexts(BaseModel):
    context_options: list[str] = Field(min_length=1)
    continuation: str
    gold: int = Field(ge=0)

    def pairs(self) -> list[tuple[str, str]]:
        return [(context.rstrip(), " " + self.continuation.strip()) for context in self.context_options]


class _Completion(BaseModel):
    context: str
    continuation: str


def _items(path: Path, most: int) -> Iterator[_Choices | _Contexts | _Completion]:
    size_of(path)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(itertools.islice(file, most), 1):
                yield _item(Path(f"{path}, line {number}"), line)
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as err:
            raise ValueError(f"{path} cannot be read: {err}") from err


def _item(place: Path, line: str) -> _Choices | _Contexts | _Completion:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{place} is not JSON: {err}") from err
    item = checked(place, raw, dict[str, Any])
    layouts = (_Choices, _Contexts, _Completion)
    layout = next((each for each in layouts if each.model_fields.keys() <= item.keys()), None)
    if layout is None:
        raise ValueError(f"{place}: keys {sorted(item)[:9]} are no known task layout; docs/formats.md lists them")
    found = checked(place, item, layout)
    if not isinstance(found, _Completion) and found.gold >= len(found.pairs()):
        raise ValueError(f"{place}: gold is {found.gold}, there are {len(found.pairs())} to choose from")
    return found


@torch.no_grad()
def _score(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Mean log-likelihood per token of the continuation, and whether greedy decoding would give it."""
    before = added(tokenizer)[0] + tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    limit = model.config.max_position_embeddings
    ids = torch.tensor([[*(before or [separator_id(tokenizer)]), *after][-limit:]])
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
    named = [yaml_file(Path(task), dict[str, Any]) if Path(task).exists() else task for task in tasks]
    found = simple_evaluate(model=wrapped, tasks=named, limit=items)
    return {} if found is None else found["results"]
