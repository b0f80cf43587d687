"""What `pack` has kept in the run folder, as a child again: what the written files are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pennyweight import formats
from pennyweight.live.parts import Parts, parts_of, set_linear
from pennyweight.live.walk import Layer, Walk
from pennyweight.model.choices import PARENT, Layout
from pennyweight.model.slots import Slot
from pennyweight.runs.store import Store
from pennyweight.variants import sparsity, storing


class Packed(Walk):
    """A walk over the child in 16 bits whose matrices are those that `pack` made of them."""

    def __init__(self, child: Walk, store: Store, layout: Layout) -> None:
        super().__init__(child.checkpoint, dtype=child.dtype)
        self._store, self._layout = store, layout

    def matrix(self, slot: Slot) -> torch.Tensor:
        (name,) = self.blocks[slot].tensors()
        return _in_memory(self._store.tensors("pack/embed" if slot.kind == "embed" else "pack/head"), name)

    def layer(self, index: int) -> Layer:
        layer = super().layer(index)
        tensors = self._store.tensors(f"pack/{index}")
        for parts in layer.parts.values():
            put_back(parts, tensors, self._layout)
        return layer


def put_back(parts: Parts, tensors: Mapping[str, torch.Tensor], layout: Layout) -> None:
    """Make the matrices of a slot the packed ones among `tensors`, and let it leave out what the layout says."""
    for weight in parts.shape.weights():
        if weight.is_matrix:
            module, matrix = parts.matrix(weight.name), _in_memory(tensors, parts.place.tensor(weight.name))
            set_linear(module, matrix, getattr(module, "bias", None))
    own = storing(layout.get(parts.slot, PARENT))
    if own is not None and getattr(own[1], "sparsity", None) is not None:
        sparsity.attach(parts, own[1].sparsity)
        before = {weight.name for weight in parts.shape.weights()}
        parts = parts.having(sparsity.reshape(parts.shape, own[1]))
        for weight in parts.shape.weights():
            if weight.name not in before:
                parts.parameter(weight.name).data.copy_(tensors[parts.place.tensor(weight.name)])


def whole(model: Any, child: Walk, store: Store, layout: Layout) -> Any:
    """A transformers model of the 16-bit child with the same put back everywhere, straight from the run folder rather
    than from the written files."""
    for slot, parts in parts_of(model, child.blocks).items():
        key = f"pack/{slot.layer}" if slot.layer is not None else "pack/embed" if slot.kind == "embed" else "pack/head"
        put_back(parts, store.tensors(key), layout)
    model.tie_weights()
    return model


def _in_memory(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The matrix `name` among packed tensors, in 16 bits."""
    return formats.unpack(formats.read(name, tensors, tensors.__getitem__))
