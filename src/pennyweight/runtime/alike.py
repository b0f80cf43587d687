"""Two models in the engine beside each other: whether one is the other, kept in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pennyweight.runtime.engine import Engine, Row


@dataclass(frozen=True)
class Alike:
    """error: of the other's logits behind the prompt's tokens, relative to the first's (2-norm; 0 if no bit differs).
    same: greedy tokens until the other first picks another one, of so many `tokens`."""

    error: float
    same: int
    tokens: int


def compare(one: Path, other: Path, prompt: Sequence[int], tokens: int) -> Alike:
    """Read a prompt (ids) in both models and let each write so many greedy tokens. Keys and values are float32.

    Raises NativeMissing or NotRun where the engine cannot run them, ValueError for what is no model."""
    found = [_run(path, prompt, tokens) for path in (one, other)]
    (expected, told), (logits, said) = found
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    same = next((at for at in range(tokens) if told[at] != said[at]), tokens)
    return Alike(error, same, tokens)


def _run(path: Path, prompt: Sequence[int], tokens: int) -> tuple[np.ndarray, list[int]]:
    engine = Engine(path, context=len(prompt) + tokens, cache="float32")
    sequence = engine.open(len(prompt) + tokens)
    logits = np.concatenate([engine.step([Row(sequence, at, token)]) for at, token in enumerate(prompt)])
    written = [int(logits[-1].argmax())]
    while len(written) < tokens:
        row = Row(sequence, len(prompt) + len(written) - 1, written[-1])
        written.append(int(engine.step([row])[0].argmax()))
    engine.close(sequence)
    return logits, written
