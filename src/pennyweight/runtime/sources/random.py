"""A source whose weights are random: to time what has not been built yet, which takes shapes and no training.

Which channels sparse matrices leave out is random as well, and the same for every token: exactly the share that their
shape says, whatever the activations are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pennyweight import families, formats
from pennyweight.disk.tokenizer import Vocabulary
from pennyweight.model.shapes import Shape, Shapes, Weight
from pennyweight.model.stored import Stored

_DISTINCT = 2**20
"""Random values; larger matrices repeat them. No time depends on it, and making them is not what is to be timed."""


Matrix = tuple[int, int, Stored]
"""Rows, columns and how it is kept."""
Make = Callable[[tuple[Matrix, ...]], Mapping[str, torch.Tensor] | None]


class RandomWeights:
    """`shapes` of a model of `config`. Weights have standard deviation 0.02, norms are 1, biases 0."""

    name = "random weights"
    rotary_divisors = None
    notes: Sequence[str] = ()

    def __init__(self, config: Mapping[str, Any], shapes: Shapes, make: Make | None = None) -> None:
        """`make`: `tensors`, or a cache around it that several sources share."""
        shared = {key: config[key] for key in config if key not in families.BY_LAYER}
        self.config = families.resolved(shared)
        # Compared by importance, a channel is left out whatever its activation.
        places = families.blocks(self.config)
        self.blocks = {slot: places[slot].having(_weighted(shape)) for slot, shape in shapes.items()}
        self._make = make or lru_cache(maxsize=8)(tensors)
        self._weights: dict[str, Weight] = {}
        self._kept: dict[str, float] = {}
        for block in self.blocks.values():
            self._weights |= block.tensors()
            if (sparsity := block.shape.sparsity) is not None:
                self._kept[block.tensor("importance")] = 1 - sparsity.entering
                self._kept[block.tensor("inner_importance")] = 1 - sparsity.inner

    def vector(self, name: str) -> np.ndarray:
        (size,) = self._weights[name].shape
        if name in self._kept:  # 1 for channels that are read; thresholds are 0
            chosen = np.random.default_rng(zlib.crc32(name.encode())).permutation(size)
            return (chosen < max(1, round(self._kept[name] * size))).astype(np.float32)
        return np.full(size, float(name.endswith("norm.weight")), np.float32)

    def matrix(self, name: str) -> Any:
        return self.matrices([name])[0]

    def matrices(self, names: Sequence[str]) -> list[Any]:
        found = self._make(tuple(_matrix_of(self._weights[name]) for name in names))
        if found is not None:
            return [formats.native(", ".join(names), found)]
        return [self.matrix(name) for name in names]

    def vocabulary(self) -> Vocabulary:
        raise ValueError("random weights have no tokenizer")


def _weighted(shape: Shape) -> Shape:
    if shape.sparsity is None:
        return shape
    return replace(shape, sparsity=replace(shape.sparsity, weighted=True))  # type: ignore[type-var]


def _matrix_of(weight: Weight) -> Matrix:
    rows, columns = weight.shape
    return rows, columns, weight.stored


def tensors(matrices: tuple[Matrix, ...]) -> dict[str, torch.Tensor] | None:
    """The tensors of a matrix as they would be on disk, by suffix; of several what they become stacked, or None."""
    generator = torch.Generator().manual_seed(0)
    made = [formats.of(kept).random(rows, columns, kept, generator, _DISTINCT) for rows, columns, kept in matrices]
    return made[0] if len(made) == 1 else formats.stacked(made)
