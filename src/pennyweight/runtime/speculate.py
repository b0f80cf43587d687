"""Guess the next tokens cheaply, to have the model check several at once.

Checking n guesses costs little more than one token, since the weights are read once. A guess is taken only where the
model itself picks the same token, so what comes out is exactly what it would have said alone, drawn or greedy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pennyweight.runtime.engine import Engine, Row


class Guesser(Protocol):
    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow."""
        ...


class PromptLookup:
    """What followed the last time these words were said: no model at all. For summaries, edits, code.

    The longest tail of the text, `longest` down to `shortest` tokens, that occurred before; what stood behind its
    latest occurrence is the guess.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest

    def guess(self, tokens: list[int], most: int) -> list[int]:
        text = np.asarray(tokens)
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            found = np.flatnonzero((windows == text[-size:]).all(axis=1))
            if len(found):
                start = int(found[-1]) + size
                return tokens[start : start + most]
        return []


class DraftModel:
    """A smaller model of the same vocabulary says what it would say."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.engine = engine
        self._sequence = engine.open(capacity)
        self._held: list[int] = []

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Greedy tokens of the draft model; it keeps what it has read and reads only what is new."""
        known = common_prefix(self._held, tokens)
        known = min(known, len(tokens) - 1)  # the last token is read again: its logits are wanted
        known = known if self.engine.can_go_back(self._sequence, known) else 0
        guessed: list[int] = []
        new = tokens[known:]
        while len(guessed) < most and known + len(new) < self.engine.context:
            guessed.append(int(self._read(new, known).argmax()))
            known += len(new)
            new = guessed[-1:]
        self._held = tokens + guessed[:-1] if guessed else self._held[:known]
        return guessed

    def _read(self, tokens: list[int], position: int) -> np.ndarray:
        """Run tokens from this position on; the logits after the last (vocab_size)."""
        size = self.engine.max_rows
        for start in range(0, len(tokens) - 1, size):
            chunk = tokens[start : min(start + size, len(tokens) - 1)]
            self.engine.step([Row(self._sequence, position + start + i, token, False) for i, token in enumerate(chunk)])
        return self.engine.step([Row(self._sequence, position + len(tokens) - 1, tokens[-1])])[0]

    def close(self) -> None:
        self.engine.close(self._sequence)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(a), len(b))
    same = np.asarray(a[:shorter]) == np.asarray(b[:shorter])
    return shorter if bool(same.all()) else int(same.argmin())
