"""Where a slot is found: its module in a live model, its tensors on disk. Families say it; everybody else asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pennyweight.model.shapes import Shape, Weight
from pennyweight.model.slots import Slot


@dataclass(frozen=True)
class Block:
    """A slot of a model as its family describes it.

    prefix: of all its names in a checkpoint, that of its layer where it is in one. path: its module below that ("" is
    the module of the prefix itself). names: below the prefix, the tensor of every weight that may come to stand here.
    A norm's module, or a matrix's, is named as its tensor is, without the last part. norm_offset: what the weights of
    norms lack on disk. residual: what the block computes is multiplied by it before it joins the residual stream.
    joins: modules below the prefix that hold several matrices, one's rows under another's, on disk and in stock
    transformers. Such a matrix is named as a part of that module, `qkv_proj.q_proj`, everywhere else.
    """

    slot: Slot
    shape: Shape
    prefix: str
    path: str
    names: Mapping[str, str]
    norm_offset: float = 0.0
    residual: float = 1.0
    joins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def having(self, shape: Shape) -> Block:
        """The same place with another shape."""
        return replace(self, shape=shape)

    def tensor(self, weight: str) -> str:
        """The name on disk of the weight q_proj, norm, linear ..."""
        return self.prefix + self.names[weight]

    def tensors(self) -> dict[str, Weight]:
        """The weights that stand here by name on disk."""
        return {self.tensor(weight.name): weight for weight in self.shape.weights()}

    def module(self, weight: str) -> str:
        """Below the prefix, the module that holds a weight."""
        return self.names[weight].rpartition(".")[0]


Blocks = Mapping[Slot, Block]
"""Every slot of a model, in order."""
