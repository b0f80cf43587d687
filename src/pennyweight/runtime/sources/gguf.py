"""A GGUF file as a source: codes and scales of its tensors as the engine multiplies by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.disk.gguf import ggml
from pennyweight.disk.gguf.checkpoint import GgufCheckpoint
from pennyweight.disk.gguf.file import Tensor
from pennyweight.disk.gguf.vocabulary import vocabulary
from pennyweight.disk.tokenizer import Vocabulary
from pennyweight.runtime.sources.source import rearranged


class GgufSource:
    """Raises on opening what GgufCheckpoint raises."""

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._checkpoint, self._mapped, self._rearranged = GgufCheckpoint(path), mapped, 0
        self.name = path.stem
        self.config, self.blocks = self._checkpoint.config, self._checkpoint.blocks
        self.rotary_divisors = self._checkpoint.rotary_divisors
        self._converted: Counter[ggml.Kind] = Counter()
        self._said = list(self._checkpoint.notes)

    @property
    def notes(self) -> list[str]:
        converted = [
            f"{count} {kind.name} {'matrix' if count == 1 else 'matrices'}: {kind.loss}"
            for kind, count in self._converted.items()
            if kind.loss
        ]
        return [*self._said, *converted, *(rearranged(self._rearranged) if self._mapped else ())]

    def vector(self, name: str) -> np.ndarray:
        return self._checkpoint.vector(name)

    def matrices(self, names: Sequence[str]) -> list[Any]:
        return [self.matrix(name) for name in names]

    def matrix(self, name: str) -> Any:
        from pennyweight import _native

        checkpoint = self._checkpoint
        tensor, order = checkpoint.tensors[name], checkpoint.order(name)
        kind, (count, columns) = tensor.kind, tensor.shape
        in_place = self._mapped and kind.split is None and order is None
        self._rearranged += not in_place
        if kind.split is None:
            raw = checkpoint.file.map(tensor) if in_place else np.empty((count, tensor.row_bytes), np.uint8)
            for first, part in checkpoint.chunks(tensor):
                checkpoint.floats(tensor, first, part)
                if not in_place:
                    raw[first : first + len(part)] = part
            stored = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[kind.name]
            return _native.Matrix.wide(raw if order is None else raw[order], _native.Float[stored], in_place)
        self._converted[kind] += 1
        rows = self._quantised(tensor)
        arrays = [
            part if part is None or order is None else part[order] for part in (rows.codes, rows.scales, rows.minima)
        ]
        return _native.Matrix.rows(*arrays, columns, kind.bits, ggml.Rows.GROUP, False)

    def vocabulary(self) -> Vocabulary:
        found, notes = vocabulary(self._checkpoint.file, self.config["vocab_size"])
        self._said += notes
        return found

    def _quantised(self, tensor: Tensor) -> ggml.Rows:
        parts: list[ggml.Rows] = []
        for first, raw in self._checkpoint.chunks(tensor):
            try:
                parts.append(ggml.rows(tensor.kind, raw))
            except ValueError as err:
                raise self._checkpoint.damage(tensor, first, str(err)) from err
        minima = [part.minima for part in parts if part.minima is not None]
        return ggml.Rows(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(minima) if minima else None,
        )
