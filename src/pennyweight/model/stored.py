"""How the numbers of a matrix are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

_ITEM_BYTES = {"U8": 1, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}


@dataclass(frozen=True)
class Stored:
    """A way to keep a matrix: this one in 16 bits, as bfloat16. Each file of formats/ has another, its `Spec`.

    `bits` per code; `group` weights share a scale, along rows or, where `down`, down columns; `scales` symmetric: w =
    scale * code, codes around zero; else w = scale * code + minimum, codes from zero. `coded`: each code by itself
    ("rounded"), or all of a column together ("trellis"). `coding_flops`: what making a weight of its code takes, in
    operations of a product, once for all tokens of a step. `short`: bfloat16 holds its values well enough to judge it.
    """

    bits: ClassVar[int] = 16
    group: ClassVar[int] = 0
    down: ClassVar[bool] = False
    scales: ClassVar[str] = "symmetric"
    coded: ClassVar[str] = "rounded"
    coding_flops: ClassVar[float] = 0.0
    short: ClassVar[bool] = True

    @property
    def format(self) -> str:
        """The name of its file in formats/."""
        return "plain"

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        if self.scales != "symmetric":
            return 0, (1 << self.bits) - 1
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def over(self, columns: int) -> Stored:
        """As a matrix of so many columns is kept."""
        return self

    def general(self, rows: int) -> Stored:
        """As it is said of matrices of any height, where a matrix of so many rows is kept so."""
        return self

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(safetensors dtype, shape) of every tensor that a matrix is on disk, by suffix."""
        return {"weight": ("BF16", (rows, columns))}

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of them."""
        return sum(_ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in self.tensors(rows, columns).values())

    def resident_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix in memory while a model runs."""
        return self.nbytes(rows, columns)


def fitting(group: int, columns: int) -> int:
    """Columns that share a scale in rows of so many: `group`, or its half, or that's half, down to 32, whichever
    divides them first; a whole row where none does."""
    while columns % group and not group % 64:
        group //= 2
    return columns if columns % group else group


BFLOAT16 = Stored()
