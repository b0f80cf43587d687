"""A model opened for use: engine, tokenizer, and the tokens that begin a text and end an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.runtime.engine import Engine
from pennyweight.sources.open import open_source


@dataclass(frozen=True)
class Model:
    """`begin`: the token plain text starts with, if any. `notes`: what users should know about how it was read."""

    name: str
    engine: Engine
    tokenizer: Any
    begin: int | None
    stop: frozenset[int]
    notes: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Plain text as the model saw it in training: after its BOS token, if it has one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids if self.begin is None or ids[:1] == [self.begin] else [self.begin, *ids]

    @property
    def converses(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation up to the point where the model answers. Raises ValueError without a chat template."""
        if not self.converses:
            raise ValueError(f"{self.name} has no chat template: it continues text, it does not converse")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def open_model(path: Path, *, mapped: bool = False, **settings: Any) -> Model:
    """A Hugging Face folder or a GGUF file; `mapped` and `settings` are Engine's. Raises ValueError or
    FileNotFoundError for what cannot be run."""
    source = open_source(path, mapped=mapped)
    vocabulary, engine = source.vocabulary(), Engine(source, **settings)
    return Model(source.name, engine, vocabulary.tokenizer, vocabulary.begin, vocabulary.stop, notes=engine.notes)
