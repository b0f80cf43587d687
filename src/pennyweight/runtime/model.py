"""A folder opened for use: engine, tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.runtime.engine import Engine


@dataclass(frozen=True)
class Model:
    name: str
    engine: Engine
    tokenizer: Any
    stop: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Plain text as the model saw it in training: after its BOS token, if it has one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        start = self.tokenizer.bos_token_id
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    @property
    def converses(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer.chat_template)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation up to the point where the model answers. Raises ValueError without a chat template."""
        if not self.converses:
            raise ValueError(f"{self.name} has no chat template: it continues text, it does not converse")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def open_model(folder: Path, **settings: Any) -> Model:
    """`settings` are Engine's. Raises ValueError or FileNotFoundError for a folder that cannot be run."""
    from pennyweight.job import load_tokenizer

    tokenizer, engine = load_tokenizer(folder), Engine(folder, **settings)
    stop = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        stop |= set(ids) if isinstance(ids, list) else {ids}
    return Model(folder.resolve().name, engine, tokenizer, frozenset(stop - {None}))
