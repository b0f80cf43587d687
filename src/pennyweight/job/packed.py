"""What `pack` has kept in the run folder, put back into live modules: what the written files are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pennyweight.families._decoder import tensor_names
from pennyweight.formats import _matrix
from pennyweight.live.parts import Parts
from pennyweight.model.choices import PARENT, Layout
from pennyweight.model.shapes import Shapes
from pennyweight.model.slots import Slot
from pennyweight.runs.store import Store
from pennyweight.variants import sparsity
from pennyweight.variants._common import set_linear


def in_memory(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The matrix `name` among packed tensors, in 16 bits."""
    return tensors[name] if name in tensors else _matrix.unpack(_matrix.parts(name, tensors, tensors.__getitem__))


def put_in(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Replace matrices inside `module` by the packed ones among `tensors`, whose names start with `prefix`."""
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, part = name.removeprefix(prefix).rpartition(".")
        if name.startswith(prefix) and part in _matrix.SUFFIXES:
            packed.setdefault(path, {})[part] = tensor
    for path, parts in packed.items():
        inner = module.get_submodule(path)
        set_linear(inner, _matrix.unpack(parts), getattr(inner, "bias", None))


def thin_layer(layer: Any, index: int, layout: Layout, shapes: Shapes, tensors: Mapping[str, torch.Tensor]) -> None:
    """Leave out of a layer's inputs what the layout says, by the tables that `pack` made."""
    for slot in (Slot("mixer", index), Slot("ffn", index)):
        choice = layout.get(slot, PARENT)
        if "sparsity" in choice:
            sparsity.attach(Parts(layer, slot.kind, shapes[slot]), choice["sparsity"].sparsity)
            names = tensor_names(slot, sparsity.reshape(shapes[slot], choice["sparsity"]))
            for name in (name for key, name in names.items() if key.endswith(("magnitudes", "importance"))):
                parameter(layer, name).data.copy_(tensors[name])


def dequantised(model: Any, store: Store, layout: Layout, shapes: Shapes) -> Any:
    """The child in memory: a transformers model of the 16-bit child (whose `shapes` are given), its chosen matrices
    replaced by what `pack` made of them, straight from the run folder rather than from the written files."""
    for index, layer in enumerate(model.model.layers):
        tensors = store.tensors(f"pack/{index}")
        put_in(model, tensors, "")
        thin_layer(layer, index, layout, shapes, tensors)
    put_in(model, store.tensors("pack/embed"), "")
    put_in(model, store.tensors("pack/head"), "")
    model.tie_weights()
    return model


def parameter(layer: Any, name: str) -> torch.nn.Parameter:
    """A norm, bias or table of a decoder layer, by its full tensor name."""
    path = name.split(".")[3:]  # after model.layers.<i>
    return layer.get_parameter(".".join(path))
