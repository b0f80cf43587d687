"""A model opened for use: engine, tokenizer, and the tokens that begin a text and end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pennyweight.disk import tokenizer as tokenizers
from pennyweight.disk.templates import Templates
from pennyweight.disk.tokenizer import GenerationConfig
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.generate import TooLong
from pennyweight.runtime.sources.open import open_source

_CHARACTERS = 8  # of a text for every token that fits, to begin with
_SPARE = 64


@dataclass(frozen=True)
class Model:
    """`begin`: the tokens plain text starts with, if any. `defaults`: how the model's makers want it sampled. `notes`:
    what users should know about how it was read."""

    name: str
    engine: Engine
    tokenizer: Any
    begin: tuple[int, ...]
    stop: frozenset[int]
    defaults: GenerationConfig = field(default_factory=GenerationConfig)
    notes: tuple[str, ...] = ()
    templates: Templates = field(default_factory=Templates, repr=False)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Plain text after what the tokenizer itself puts before it. Raises ValueError for what is no text, TooLong if
        it has more than `most` tokens; text that is far too long is not read to its end."""
        ids = self._tokens(text, most)
        return ids if tuple(ids[: len(self.begin)]) == self.begin else [*self.begin, *ids]

    @property
    def converses(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any] | None = None, most: int | None = None
    ) -> list[int]:
        """A conversation up to the point where the model answers; `arguments` are further variables of the template.
        Raises ValueError without a chat template or in its words, TooLong as `encode` does."""
        if not self.converses:
            raise ValueError(f"{self.name} has no chat template: it continues text, it does not converse")
        return self._tokens(tokenizers.converse(self.tokenizer, self.templates, messages, arguments or {}), most)

    @cached_property
    def special(self) -> dict[int, str]:
        """The tokens that are not text, by id."""
        return tokenizers.special_tokens(self.tokenizer)

    def _tokens(self, text: str, most: int | None) -> list[int]:
        """A text that is far too long is found out by its first part: more text never makes fewer tokens, but for the
        few where it was cut."""
        size = _CHARACTERS * (most or len(text))
        while most is not None and size < len(text):
            if len(tokenizers.encode(self.tokenizer, text[:size])) > most + _SPARE:
                raise TooLong(f"the prompt has far more than {most} tokens; {most} fit with one to answer")
            size *= 4
        return tokenizers.encode(self.tokenizer, text)


def open_model(path: Path, *, mapped: bool = False, **settings: Any) -> Model:
    """A Hugging Face folder or a GGUF file; `mapped` and `settings` are Engine's. Raises ValueError or
    FileNotFoundError for what cannot be run."""
    source = open_source(path, mapped=mapped)
    vocabulary, engine = source.vocabulary(), Engine(source, **settings)
    return Model(
        source.name,
        engine,
        vocabulary.tokenizer,
        vocabulary.begin,
        vocabulary.stop,
        vocabulary.defaults,
        engine.notes,
    )
