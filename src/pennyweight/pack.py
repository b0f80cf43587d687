"""Turn a child's 16-bit folder into the folder that is shipped: quantise what the layout stores in fewer bits.

Goes layer by layer, each quantised for the inputs it will really get: those that come out of the layers before it,
already quantised. Finished layers are kept in the run folder, so a stopped run goes on at the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight import kinds
from pennyweight.checkpoint import Writer
from pennyweight.events import Listener
from pennyweight.families._decoder import Parts, tensor_names, with_shapes
from pennyweight.formats import _matrix, packed_int
from pennyweight.heterogeneous import OWN_FORMAT
from pennyweight.slots import BFLOAT16, PARENT, STORING, Choice, Layout, Shapes, Slot, Stored, reshape_all
from pennyweight.stats import Collector, SlotStats, autocast, of_slot
from pennyweight.store import Store
from pennyweight.variants import sparsity
from pennyweight.variants._common import set_linear
from pennyweight.walk import Walk, run_layer


@torch.no_grad()
def pack(
    child: Walk,
    layout: Layout,
    calibration: torch.Tensor,
    out: Path,
    *,
    files: Mapping[str, Any],
    store: Store,
    listen: Listener,
) -> Path:
    """Write the model folder `out`. `calibration` (rows, tokens) int64 is what GPTQ fits; `files` are JSON files to
    add. Matrices whose slot has no bits stay bfloat16."""
    listen.begin("pack", total=child.layers, unit="layers")
    positions = child.positions(calibration.shape[1])
    if store.get("pack/embed") is None:
        slot = Slot("embed")
        parts = Parts(child.embedding(), "embed", child.shapes[slot])
        store.put_tensors("pack/embed", _packed(slot, parts, layout.get(slot, PARENT), SlotStats({}), leave=False))
        del parts  # the largest matrix of all; layers need room
    hidden = None
    for index in range(child.layers):
        key = f"pack/{index}"
        if store.get(key) is None:
            if hidden is None:
                hidden = _entering(index, store, calibration)
            layer = child.layer(index)
            tensors = _pack_layer(child, layer, index, layout, hidden, positions)
            with autocast(child.dtype):
                hidden = torch.cat([run_layer(layer, rows, positions) for rows in hidden.split(8)])
            store.put_tensors(f"pack/hidden-{index + 1}", {"hidden": hidden})
            store.put_tensors(key, tensors)
            store.drop(f"pack/hidden-{index}")
        listen.advance(index + 1)
    if store.get("pack/head") is None:
        tensors = {"model.norm.weight": child.norm().get_parameter("weight").detach().bfloat16()}
        if not child.tied:
            slot = Slot("head")
            parts = Parts(child.head(), "head", child.shapes[slot])
            tensors |= _packed(slot, parts, layout.get(slot, PARENT), SlotStats({}), leave=False)
        store.put_tensors("pack/head", tensors)
    listen.end()
    writer = Writer(out)
    for key in ("pack/embed", *(f"pack/{index}" for index in range(child.layers)), "pack/head"):
        for name, tensor in store.tensors(key).items():
            writer.add(name, tensor)
    return writer.finish(_config(child, layout), like=child.checkpoint.folder, files=files)


def _entering(index: int, store: Store, calibration: torch.Tensor) -> torch.Tensor:
    """What enters a layer (rows, tokens, hidden_size): what the layer before left, or the packed embedding's rows."""
    if index:
        return store.tensors(f"pack/hidden-{index}")["hidden"]
    return in_memory(store.tensors("pack/embed"), "model.embed_tokens.weight")[calibration].float()


def _pack_layer(
    child: Walk, layer: Any, index: int, layout: Layout, hidden: torch.Tensor, positions: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Tensors of one layer by full name; leaves the dequantised values in `layer`."""
    slots = [Slot("mixer", index), Slot("ffn", index)]
    chosen = {slot: [spec for axis, spec in layout.get(slot, PARENT).specs if axis in STORING] for slot in slots}
    fitted = [slot for slot, specs in chosen.items() if any(spec.method == "gptq" for spec in specs)]
    means: dict[str, torch.Tensor] = {}
    if fitted:
        collector = Collector(
            layer, {slot.kind: child.shapes[slot] for slot in fitted}, ("input_moment", "output_moment", "down_moment")
        )
        with collector, autocast(child.dtype):
            for rows in hidden.split(8):
                run_layer(layer, rows, positions)
        tokens = hidden.shape[0] * hidden.shape[1]
        means = {name: tensor.div_(tokens) for name, tensor in collector.sums.items()}
    tensors: dict[str, torch.Tensor] = {}
    for slot in slots:
        tensors |= _packed(slot, child.parts(layer, slot), layout.get(slot, PARENT), of_slot(means, slot.kind))
    for slot in slots:
        if "sparsity" in layout.get(slot, PARENT):
            tensors |= _thinned(child, layer, slot, layout[slot]["sparsity"], hidden, positions)
    return tensors


def _thinned(
    child: Walk, layer: Any, slot: Slot, spec: Any, hidden: torch.Tensor, positions: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tables of a slot that leaves channels out, by full name, also put into `layer`. Counted one after the other
    with all earlier ones at work: what a block computes from fewer channels is smaller."""
    parts = child.parts(layer, slot)
    shape = sparsity.reshape(parts.shape, spec)
    names = tensor_names(slot, shape)
    for module, _ in sparsity.attach(parts, spec.sparsity):
        share, module.left_out = module.left_out, 0.0
        counted: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(sparsity.counting(counted), with_kwargs=True, prepend=True)
        with autocast(child.dtype):
            for rows in hidden.split(8):
                run_layer(layer, rows, positions)
        handle.remove()
        sparsity.fill(module, torch.stack(counted).sum(dim=0))
        module.left_out = share
    return {
        name: _other(layer, name).detach().bfloat16()
        for key, name in names.items()
        if key.endswith(("magnitudes", "importance"))
    }


def _packed(
    slot: Slot, parts: Parts, choice: Choice, stats: SlotStats, *, leave: bool = True
) -> dict[str, torch.Tensor]:
    """One slot's tensors as stored, by full name; matrices in `parts` are left dequantised, if anybody will look."""
    names = tensor_names(slot, parts.shape)
    tensors: dict[str, torch.Tensor] = {}
    modules = parts.linears()
    axis = next((axis for axis in STORING if axis in choice), None)
    for weight in parts.shape.weights():
        name = names[weight.name]
        if weight.name in modules and axis is not None:
            packed = kinds.load("variants", axis).pack(weight.name, modules[weight.name].weight, stats, choice[axis])
            if leave:
                set_linear(modules[weight.name], _matrix.unpack(packed), getattr(modules[weight.name], "bias", None))
            tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in packed.items()}
        elif weight.name in modules:
            tensors[name] = modules[weight.name].weight.detach().bfloat16()
        else:
            tensors[name] = _other(parts.layer, name).detach().bfloat16()
    return tensors


def _other(layer: Any, name: str) -> torch.nn.Parameter:
    """A norm, bias or table of a decoder layer, by its full tensor name."""
    path = name.split(".")[3:]  # after model.layers.<i>
    return layer.get_parameter(".".join(path))


def _config(child: Walk, layout: Layout) -> dict[str, Any]:
    """The child's config with one compressed-tensors group per way of storing."""
    storing = {
        slot: Choice(tuple(item for item in choice.specs if item[0] in STORING)) for slot, choice in layout.items()
    }
    shapes = reshape_all(child.shapes, storing)
    config = with_shapes(child.checkpoint.config, shapes)
    groups: dict[Stored, list[str]] = {}
    for slot, shape in shapes.items():
        names = tensor_names(slot, shape)
        for weight in (weight for weight in shape.weights() if len(weight.shape) > 1 and weight.stored != BFLOAT16):
            groups.setdefault(weight.stored, []).append(names[weight.name].removesuffix(".weight"))
    if groups:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            # transformers knows no zigzag. A method it does not know it would skip, and fill the missing weights with
            # noise; at a format it does not know it stops.
            "format": OWN_FORMAT if any(stored.down for stored in groups) else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": packed_int.config_group(stored, groups[stored])
                | ({"format": OWN_FORMAT} if stored.down else {})
                for i, stored in enumerate(sorted(groups, key=lambda s: (s.down, s.bits, s.group)))
            },
            "ignore": [],
        }
    return config


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
                _other(layer, name).data.copy_(tensors[name])


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
