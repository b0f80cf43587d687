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
from pennyweight.disk.writer import Writer
from pennyweight.families._decoder import tensor_names, with_shapes
from pennyweight.formats import _matrix, packed_int
from pennyweight.job.packed import in_memory, parameter
from pennyweight.judge.stats import Collector, SlotStats, of_slot
from pennyweight.live import magnitudes
from pennyweight.live.parts import Parts
from pennyweight.live.patch import OWN_FORMAT
from pennyweight.live.walk import Walk, autocast, run_layer
from pennyweight.model.choices import PARENT, Choice, Layout
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16, Stored
from pennyweight.runs.events import Listener
from pennyweight.runs.store import Store
from pennyweight.variants import STORING, reshape_all, sparsity
from pennyweight.variants._common import set_linear


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
    known = sum(store.get(f"pack/{index}") is not None for index in range(child.layers))
    listen.begin("pack", total=child.layers, done=known, unit="layers")
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
    writer = Writer(out)
    for key in ("pack/embed", *(f"pack/{index}" for index in range(child.layers)), "pack/head"):
        for name, tensor in store.tensors(key).items():
            writer.add(name, tensor)
    made = writer.finish(_config(child, layout), like=child.checkpoint.folder, files=files)
    listen.end()
    return made


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
        handle = module.register_forward_pre_hook(magnitudes.counting(counted), with_kwargs=True, prepend=True)
        with autocast(child.dtype):
            for rows in hidden.split(8):
                run_layer(layer, rows, positions)
        handle.remove()
        magnitudes.fill(module, torch.stack(counted).sum(dim=0))
        module.left_out = share
    return {
        name: parameter(layer, name).detach().bfloat16()
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
            tensors[name] = parameter(parts.layer, name).detach().bfloat16()
    return tensors


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
