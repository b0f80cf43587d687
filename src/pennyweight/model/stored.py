"""How the numbers of a matrix are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stored:
    """How a matrix is kept: 16 bits as bfloat16, or `bits`-bit codes with one bfloat16 scale per `group` columns, or,
    if `down`, 4-bit codes with one scale per `group` rows of a column, of one of three kinds, the columns `ordered` by
    how often they are needed or as they are (formats/zigzag.py)."""

    bits: int = 16
    group: int = 0
    down: bool = False
    scales: Literal["symmetric", "affine", "super"] = "symmetric"
    ordered: bool = False

    def over(self, columns: int) -> Stored:
        """As a matrix of so many columns is kept: one scale per row where the group does not divide them."""
        whole = self.bits == 16 or self.down or columns % self.group == 0
        return self if whole else Stored(self.bits, columns)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes on disk. Codes of a row are packed into whole int32 words; packed matrices also keep their shape."""
        if self.bits == 16:
            return 2 * rows * columns
        if self.down:  # a column's scales and nibbles, in whole units of rows and whole cache lines; a scale per row
            whole = 256 if self.scales == "super" else 128
            padded = math.ceil(rows / whole) * whole
            order = 4 * columns if self.ordered else 0
            halves = (2 if self.scales == "affine" else 1) * padded // self.group
            return columns * math.ceil((2 * halves + padded // 2) / 64) * 64 + 4 * rows + 16 + 24 + order
        return 4 * rows * math.ceil(columns * self.bits / 32) + 2 * rows * (columns // self.over(columns).group) + 16


BFLOAT16 = Stored()
