"""Continue several texts at once.

Every step runs one batch: a stretch of each prompt that is still being read, the next token of each text that is being
written, and guesses for it if there is a guesser. A text that ends makes room for the next one at once. Texts that
begin alike share what was computed for the beginning. Prompts are read with all columns, whatever thresholds a model
has: the first tokens carry most of the attention, and reading many tokens at once is not bound by memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from pennyweight.runtime.engine import Engine, Row
from pennyweight.runtime.sample import GREEDY, Sampling, pick
from pennyweight.runtime.speculate import Guesser, common_prefix


class TooLong(ValueError):
    """A prompt has more tokens than fit."""


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and when to stop: after `max_tokens`, or at a token of `stop`, none of which is
    picked before there are `min_tokens`."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass
class Text:
    """A request on its way. `tokens` is prompt and answer; `finish` is None until the end, then "stop", "length",
    "cancelled", or "failed", of which `error` says why."""

    request: Request
    tokens: list[int]
    sequence: int = -1
    read: int = 0  # tokens whose keys and values are in the cache
    shared: int = 0  # of them, those that were there before
    finish: str | None = None
    error: Exception | None = None
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


@dataclass
class _Place:
    """A sequence of the engine and what its cache holds. `dense`: tokens of it that were read with all columns, which
    alone may begin another text: its answers must not depend on what happened to be in the cache."""

    sequence: int
    held: list[int] = field(default_factory=list)
    dense: int = 0
    text: Text | None = None


def _writes(text: Text) -> bool:
    """Whether all of a text but its last token has been read."""
    return text.read >= len(text.tokens) - 1


class Batch:
    """Texts that are written together, `places` at a time; more wait in line."""

    def __init__(
        self,
        engine: Engine,
        *,
        places: int = 8,
        capacity: int | None = None,
        guesser: Callable[[], Guesser] | None = None,
        guesses: int = 6,
        chunk: int = 256,
    ) -> None:
        """`capacity`: tokens a text may have, prompt included. `guesser` makes one guesser per text. `chunk`: prompt
        tokens read in one step while other texts are being written, so that they need not wait for long."""
        self.engine, self.capacity = engine, min(capacity or engine.context, engine.context)
        self.guesser, self.guesses, self.chunk = guesser, guesses, chunk
        self.waiting: list[Text] = []
        self._places = [_Place(engine.open(self.capacity)) for _ in range(places)]
        self._guessers: dict[int, Guesser] = {}

    @property
    def places(self) -> int:
        """Texts that are written at once."""
        return len(self._places)

    def check(self, request: Request) -> None:
        """Raises ValueError if the request cannot be answered, TooLong if that is because of its length."""
        if not request.prompt:
            raise ValueError("the prompt has no tokens")
        if len(request.prompt) + 1 > self.capacity:
            raise TooLong(f"the prompt has {len(request.prompt)} tokens; {self.capacity - 1} fit with one to answer")
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < self.engine.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self.engine.vocab_size}")

    def submit(self, request: Request) -> Text:
        """Put a request in line. Raises ValueError if it cannot be answered."""
        self.check(request)
        text = Text(request, list(request.prompt), rng=np.random.default_rng(request.sampling.seed))
        self.waiting.append(text)
        return text

    def cancel(self, text: Text) -> None:
        """Stop writing a text."""
        text.finish = text.finish or "cancelled"
        self.waiting = [other for other in self.waiting if other is not text]
        self._clear()

    @property
    def running(self) -> list[Text]:
        return [place.text for place in self._places if place.text is not None]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[tuple[Text, list[int]]]:
        """Run one batch; the new tokens of each text that got some."""
        self._seat()
        rows: list[Row] = []
        plans: list[tuple[_Place, Text, list[int]]] = []  # what each text has in this step, and its guesses
        room = self.engine.max_rows
        writing = any(_writes(text) for text in self.running)
        # Texts that are being written come first: a token of each always has room.
        for place in sorted(self._places, key=lambda place: place.text is None or not _writes(place.text)):
            text = place.text
            if text is None or room == 0:
                continue
            new = text.tokens[text.read :]
            guesses: list[int] = []
            if not _writes(text):
                new = new[: min(room, self.chunk if writing else room)]
            elif self.guesser is not None:
                others = sum(_writes(other) for other in self.running) - len(plans) - 1  # who still need a row each
                most = min(self.guesses, room - 1 - others, self.capacity - len(text.tokens) - 1)
                guesses = self._guesser(text).guess(text.tokens, most) if most > 0 else []
            done = text.read + len(new) == len(text.tokens)
            prompt = len(text.request.prompt)
            for i, token in enumerate(new + guesses):
                position = text.read + i
                wanted = done and i >= len(new) - 1
                rows.append(Row(place.sequence, position, token, wanted, position >= prompt))
            text.read += len(new)
            room -= len(new) + len(guesses)
            place.held = text.tokens[: text.read]
            place.dense = min(text.read, prompt) if self.engine.is_sparse else self.capacity
            if done:
                plans.append((place, text, guesses))
        if not rows:
            return []
        try:
            logits = self.engine.step(rows)
        except BaseException:
            for place in self._places:  # what the caches hold now is not known
                place.held = []
            raise
        at, out = 0, []
        for place, text, guesses in plans:
            mine = logits[at : at + 1 + len(guesses)]
            at += 1 + len(guesses)
            out.append((text, self._take(text, mine, guesses)))
            place.held = text.tokens[: text.read] if text.error is None else []  # broken numbers may be in the cache
        self._clear()
        return out

    def _take(self, text: Text, logits: np.ndarray, guesses: list[int]) -> list[int]:
        """Pick tokens as long as the guesses were right; each right guess has been read already."""
        new: list[int] = []
        for i, row in enumerate(logits):
            request, written = text.request, len(text.tokens) - len(text.request.prompt)
            seen: Collection[int] = text.tokens if request.sampling.repetition_penalty != 1.0 else ()
            never = request.stop if written < request.min_tokens else ()
            try:
                token = pick(row, request.sampling, seen, text.rng, never)
            except FloatingPointError as err:  # of this text alone
                trouble = self.engine.trouble(text.sequence)
                text.finish, text.error = "failed", FloatingPointError(trouble) if trouble else err
                break
            if token in request.stop:
                text.finish = "stop"
                break
            text.tokens.append(token)
            new.append(token)
            if written + 1 >= request.max_tokens or len(text.tokens) >= self.capacity:
                text.finish = "length"
                break
            if i >= len(guesses) or guesses[i] != token:
                break
            text.read += 1
        return new

    def _guesser(self, text: Text) -> Guesser:
        assert self.guesser is not None
        if id(text) not in self._guessers:
            self._guessers[id(text)] = self.guesser()
        return self._guessers[id(text)]

    def _seat(self) -> None:
        """Give waiting texts free places, each the one that holds most of its beginning."""
        while self.waiting and any(place.text is None for place in self._places):
            text = self.waiting.pop(0)
            best, shared, source = None, -1, None
            for place in self._places:
                if place.text is None:
                    kept = self._common(place, text)
                    if kept > shared:
                        best, shared, source = place, kept, None
            assert best is not None
            for place in self._places:
                kept = self._common(place, text)
                if place is not best and kept > shared:
                    shared, source = kept, place
            if source is not None:
                self.engine.copy(source.sequence, best.sequence, shared)
            text.sequence, text.read, text.shared, best.text = best.sequence, shared, shared, text
            best.held = text.tokens[:shared]

    def _common(self, place: _Place, text: Text) -> int:
        """Tokens of a text's beginning that a place holds as the text would compute them."""
        limit = min(len(text.tokens) - 1, place.dense)  # the last token is run: its logits are wanted
        kept = min(limit, common_prefix(place.held, text.tokens))
        return kept if self.engine.can_go_back(place.sequence, kept) else 0

    def _clear(self) -> None:
        for place in self._places:
            if place.text is not None and place.text.finish is not None:
                closing = self._guessers.pop(id(place.text), None)
                if hasattr(closing, "close"):
                    closing.close()  # type: ignore[union-attr]
                place.text = None
