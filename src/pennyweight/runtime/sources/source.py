"""Where a model comes from: what `lower` asks of a folder and of a GGUF file alike.

Tensors go by the names that the family's blocks give them; a source that keeps them under other names, in another
order of rows or in other bytes sees to that itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pennyweight.disk.tokenizer import Vocabulary
from pennyweight.model.blocks import Blocks


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What transformers would find in config.json."""
        ...

    @property
    def blocks(self) -> Blocks:
        """Every slot; the tensors of each are there, under their names and in these shapes."""
        ...

    @property
    def rotary_divisors(self) -> np.ndarray | None:
        """(head_dim / 2,) float32 that divide the rotary frequencies the config gives, or None."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What users should know about how the tensors and tokens asked for so far came to be."""
        ...

    def matrix(self, name: str) -> Any:
        """A native matrix. Raises ValueError if the weights are damaged or of a type the engine does not read."""
        ...

    def matrices(self, names: Sequence[str]) -> list[Any]:
        """Matrices on one input, in order, stacked where their formats allow that."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm, bias or table in float32. Raises ValueError if it is damaged."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError if the source has no tokenizer that can be used."""
        ...


def rearranged(count: int) -> tuple[str, ...]:
    """What users should know of matrices that could not stay in their file."""
    said = f"{count} matrices were rearranged for the kernels in memory; only others stay in their file"
    return (said,) if count else ()
