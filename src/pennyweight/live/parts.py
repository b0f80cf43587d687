"""The live modules of one slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pennyweight.model.blocks import Block, Blocks
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot


@dataclass(frozen=True)
class Parts:
    """What stands in a slot of a live model, by the words of its shape.

    root: the module that the block's names are below: a decoder layer; of the embedding, the last norm and the head
    the module itself. Whoever edits modules returns Parts with the new shape, and with `inner` if its inner activation
    has other channels than before, or in another order: which of those before each of them is, -1 for none of them.
    """

    root: Any
    place: Block
    inner: torch.Tensor | None = None

    @property
    def slot(self) -> Slot:
        return self.place.slot

    @property
    def shape(self) -> Shape:
        return self.place.shape

    def having(self, shape: Shape, *, inner: torch.Tensor | None = None) -> Parts:
        """The same modules under their new shape."""
        return replace(self, place=self.place.having(shape), inner=inner)

    @property
    def block(self) -> Any:
        """The module that computes: attention or MLP."""
        return self.root.get_submodule(self.place.path)

    def replace_block(self, module: nn.Module) -> None:
        self.root.set_submodule(self.place.path, module)

    def norm(self, name: str) -> Any:
        """The module of `norm` or `post_norm`; None if the block has none there."""
        if not any(weight.name == name for weight in self.shape.weights()):
            return None
        return self.root.get_submodule(self.place.module(name))

    def drop_norms(self) -> None:
        """Let the residual stream pass where norms were."""
        for name in ("norm", "post_norm"):
            if name in self.place.names:
                self.root.set_submodule(self.place.module(name), nn.Identity())

    def modules(self) -> dict[str, Any]:
        """What the slot owns, by path below the root: its block and its norms."""
        norms = (name for name in ("norm", "post_norm") if self.norm(name) is not None)
        paths = [self.place.path, *(self.place.module(name) for name in norms)]
        return {path: self.root.get_submodule(path) for path in paths}

    def matrix(self, name: str) -> Any:
        """The nn.Linear (or nn.Embedding) of the matrix q_proj, linear, embedding ..."""
        return self.root.get_submodule(self.place.module(name))

    def matrices(self) -> dict[str, Any]:
        """All of them, by name."""
        return {weight.name: self.matrix(weight.name) for weight in self.shape.weights() if weight.is_matrix}

    def reading(self, activation: str) -> tuple[Any, list[Any]]:
        """The module that is given `input` or `inner` whole, and the matrices that multiply it."""
        return self.reader(activation), [self.matrix(name) for name in self.shape.readers(activation)]

    def reader(self, activation: str) -> Any:
        """The module that is given `input` or `inner` whole."""
        return self.block if activation == "input" else self.matrix(self.shape.readers(activation)[0])

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name on disk, parameter) of every weight of the shape."""
        for weight in self.shape.weights():
            yield self.place.tensor(weight.name), self.parameter(weight.name)

    def fill(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put weights, by name on disk, into the modules."""
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(weights[name])

    def parameter(self, weight: str) -> torch.nn.Parameter:
        return self.root.get_parameter(self.place.names[weight])


def parts_of(model: Any, blocks: Blocks) -> dict[Slot, Parts]:
    """The parts of every slot of a whole transformers model."""
    return {slot: Parts(model.get_submodule(block.prefix.removesuffix(".")), block) for slot, block in blocks.items()}


def set_linear(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Give an nn.Linear (or nn.Embedding) other weights, keeping dtype and whether it trains."""
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous(), requires_grad=trains)
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = weight.shape
    if getattr(linear, "bias", None) is not None:
        assert bias is not None
        linear.bias = nn.Parameter(bias.to(linear.bias.dtype).contiguous(), requires_grad=trains)
