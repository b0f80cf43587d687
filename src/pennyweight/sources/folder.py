"""A Hugging Face folder as a source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.tokenizer import load_tokenizer
from pennyweight.formats import _matrix, zigzag
from pennyweight.live.walk import Walk
from pennyweight.sources.native import native, refuse_damage
from pennyweight.sources.source import Vocabulary, rearranged


class Folder:
    """A Hugging Face folder. Nothing is rounded: 16-bit and float32 weights stay as they are, packed integers and
    zigzag keep codes and scales. `mapped`: 16-bit, float32 and zigzag matrices are used where they lie in the file."""

    rotary_divisors = None

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._checkpoint = Checkpoint(path)
        self.name = path.resolve().name
        self.config = self._checkpoint.config
        self.blocks = Walk(self._checkpoint).blocks
        self._mapped, self._rearranged = mapped, 0

    @property
    def notes(self) -> Sequence[str]:
        return rearranged(self._rearranged) if self._mapped else ()

    def vector(self, name: str) -> np.ndarray:
        tensor = self._checkpoint.read(name).float()
        refuse_damage(name, tensor)
        return tensor.numpy()

    def matrix(self, name: str) -> Any:
        if name in self._checkpoint.entries:
            read = self._checkpoint.map if self._mapped else self._checkpoint.read
            return native(name, {"weight": read(name)}, in_place=self._mapped)
        parts = self._parts(name)
        if "weight_zigzag" not in parts:
            self._rearranged += 1
        return native(name, parts, in_place=self._mapped)

    def matrices(self, names: Sequence[str]) -> list[Any]:
        stacked = not self._mapped and len(names) > 1  # what lies in a file lies one after the other
        if stacked and all(f"{name}_zigzag" in self._checkpoint.entries for name in names):
            parts = [self._parts(name) for name in names]
            if zigzag.can_stack(parts):
                return [native(", ".join(names), zigzag.stack(parts))]
        return [self.matrix(name) for name in names]

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        def read(part: str) -> torch.Tensor:
            in_place = self._mapped and part.endswith("_zigzag")
            return self._checkpoint.map(part) if in_place else self._checkpoint.read(part)

        return _matrix.parts(name, self._checkpoint.entries, read)

    def vocabulary(self) -> Vocabulary:
        tokenizer = load_tokenizer(self._checkpoint.folder)
        stop = {tokenizer.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            path = self._checkpoint.folder / name
            ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            stop |= set(ids) if isinstance(ids, list) else {ids}
        return Vocabulary(tokenizer, tokenizer.bos_token_id, frozenset(stop - {None}))
