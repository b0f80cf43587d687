"""A Hugging Face folder as a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight import formats
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.opened import name_of, open_vocabulary
from pennyweight.disk.tokenizer import Vocabulary
from pennyweight.live.walk import Walk
from pennyweight.runtime.sources.source import rearranged


class Folder:
    """A Hugging Face folder. Nothing is rounded: 16-bit and float32 weights stay as they are, packed integers and
    zigzag keep codes and scales. `mapped`: 16-bit, float32 and zigzag matrices are used where they lie in the file."""

    rotary_divisors = None

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._checkpoint = Checkpoint(path)
        self.name = name_of(path)
        self.config = self._checkpoint.config
        walk = Walk(self._checkpoint)
        self.blocks = walk.blocks
        self._said = self._checkpoint.notes + walk.notes
        self._mapped, self._rearranged = mapped, 0

    @property
    def notes(self) -> Sequence[str]:
        return self._said + (rearranged(self._rearranged) if self._mapped else ())

    def vector(self, name: str) -> np.ndarray:
        tensor = self._checkpoint.read(name).float()
        formats.refuse_damage(name, tensor)
        return tensor.numpy()

    def matrix(self, name: str) -> Any:
        parts = self._parts(name)
        self._rearranged += not formats.of_parts(parts).IN_PLACE
        return formats.native(name, parts, in_place=self._mapped)

    def matrices(self, names: Sequence[str]) -> list[Any]:
        if len(names) > 1 and not self._mapped:  # what lies in a file lies one after the other
            together = formats.stacked([self._parts(name) for name in names])
            if together is not None:
                return [formats.native(", ".join(names), together)]
        return [self.matrix(name) for name in names]

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        checkpoint = self._checkpoint
        mapping = checkpoint.map if self._mapped else None
        return formats.read(name, checkpoint.entries, checkpoint.read, map_tensor=mapping)

    def vocabulary(self) -> Vocabulary:
        return open_vocabulary(self._checkpoint.path)
