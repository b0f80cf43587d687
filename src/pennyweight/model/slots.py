"""Places in a model, and what stands for a whole layer's worth of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["embed", "mixer", "ffn", "norm", "head"]


@dataclass(frozen=True)
class Slot:
    """A place in the model: `embed`, `7.mixer`, `7.ffn`, `norm`, `head`."""

    kind: Kind
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.layer}.{self.kind}"

    @staticmethod
    def parse(text: str) -> Slot:
        layer, dot, kind = text.rpartition(".")
        in_layer = kind in ("mixer", "ffn")
        if kind not in ("embed", "mixer", "ffn", "norm", "head") or not bool(dot) == layer.isdecimal() == in_layer:
            raise ValueError(f"{text!r} is not a slot; slots are written embed, 7.mixer, 7.ffn, norm, head")
        return Slot(kind, int(layer) if layer else None)
