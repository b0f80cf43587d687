"""The live modules of one slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pennyweight.families._decoder import BLOCK, NORM
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Kind


@dataclass(frozen=True)
class Parts:
    """Typed view of the live modules of one slot.

    layer: the transformers decoder layer; for `embed` the nn.Embedding, for `head` the nn.Linear itself. shape: what
    stands in the slot now; whoever edits the modules returns Parts with the new shape.
    """

    layer: Any
    kind: Kind
    shape: Shape

    @property
    def block(self) -> Any:
        """self_attn or mlp."""
        return getattr(self.layer, BLOCK[self.kind])

    def replace_block(self, module: Any) -> None:
        setattr(self.layer, BLOCK[self.kind], module)

    def drop_norm(self) -> None:
        import torch

        setattr(self.layer, NORM[self.kind], torch.nn.Identity())

    def linears(self) -> dict[str, Any]:
        """The slot's matrices as modules, by weight name (q_proj, gate_proj, linear, embedding ...)."""
        import torch

        if self.kind in ("embed", "head"):
            return {"embedding" if self.kind == "embed" else "head": self.layer}
        found = {name: m for name, m in self.block.named_children() if isinstance(m, torch.nn.Linear)}
        return {("linear" if name.startswith("linear_") else name): module for name, module in found.items()}
