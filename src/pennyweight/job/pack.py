"""Turn a child's 16-bit folder into the folder that is shipped: quantise what the layout stores in fewer bits.

Goes layer by layer, each quantised for the inputs it will really get: those that come out of the layers before it,
already quantised. Finished layers are kept in the run folder, so a stopped run goes on at the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight import families, formats, quantize, variants
from pennyweight.disk.writer import Writer
from pennyweight.job.packed import Packed
from pennyweight.judge.stats import Collector, SlotStats, of_slot
from pennyweight.live import magnitudes
from pennyweight.live.parts import Parts, set_linear
from pennyweight.live.walk import Layer, Walk, autocast
from pennyweight.model.blocks import Block
from pennyweight.model.choices import PARENT, Layout
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16, Stored
from pennyweight.runs.events import Listener
from pennyweight.runs.scratch import Remembered
from pennyweight.runs.store import Store
from pennyweight.variants import sparsity

_TOGETHER = 8  # rows


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
    codes: Remembered | None = None,
) -> Path:
    """Write the model folder `out`. `calibration` (rows, tokens) int64 is what GPTQ fits; `files` are JSON files to
    add; `codes`: those that were found before, of matrices that are still the same and fitted to nothing. Matrices
    whose slot has no bits stay bfloat16."""
    known = sum(store.get(f"pack/{index}") is not None for index in range(child.layers))
    listen.begin("pack", total=child.layers, done=known, unit="layers")
    if store.get("pack/embed") is None:
        store.put_tensors("pack/embed", _packed(child.embedding(), layout, SlotStats({}, codes=codes), leave=False))
    hidden = None
    for index in range(child.layers):
        key = f"pack/{index}"
        if store.get(key) is None:
            if hidden is None:
                hidden = _entering(child, index, store, calibration)
            layer = child.layer(index)
            tensors = _pack_layer(layer, layout, hidden, child.dtype)
            with autocast(child.dtype):
                hidden = layer.run(hidden, together=_TOGETHER)
            store.put_tensors(f"pack/hidden-{index + 1}", {"hidden": hidden})
            store.put_tensors(key, tensors)
            store.drop(f"pack/hidden-{index}")
            listen.advance(index + 1)
    if store.get("pack/head") is None:
        (name,) = child.blocks[Slot("norm")].tensors()
        tensors = {name: child.matrix(Slot("norm")).bfloat16()}
        if child.logits_slot == Slot("head"):
            tensors |= _packed(child.head(), layout, SlotStats({}, codes=codes), leave=False)
        store.put_tensors("pack/head", tensors)
    writer = Writer(out, joins=_joined(_blocks(child, layout)))
    for key in ("pack/embed", *(f"pack/{index}" for index in range(child.layers)), "pack/head"):
        for name, tensor in store.tensors(key).items():
            writer.add(name, tensor)
    made = writer.finish(_config(child, layout), like=child.checkpoint.path, files=files)
    listen.end()
    return made


def _entering(child: Walk, index: int, store: Store, calibration: torch.Tensor) -> torch.Tensor:
    """What enters a layer (rows, tokens, hidden_size): what the layer before left, or the packed embedding's rows."""
    if index:
        return store.tensors(f"pack/hidden-{index}")["hidden"]
    return Packed(child, store, layout={}).embed(calibration)


def _pack_layer(layer: Layer, layout: Layout, hidden: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one layer by full name; leaves the dequantised values in `layer`."""
    chosen = {slot: variants.storing(layout.get(slot, PARENT)) for slot in layer.parts}
    fitted = {slot: ("input_moment", "inner_moment") for slot, own in chosen.items() if own and own[1].method == "gptq"}
    means: dict[str, torch.Tensor] = {}
    if fitted:
        with Collector(layer.parts, fitted) as collector, autocast(dtype):
            layer.run(hidden, together=_TOGETHER)
        tokens = hidden.shape[0] * hidden.shape[1]
        means = {name: tensor.div_(tokens) for name, tensor in collector.sums.items()}
    tensors: dict[str, torch.Tensor] = {}
    for slot, parts in layer.parts.items():
        tensors |= _packed(parts, layout, of_slot(means, slot.kind))
    for slot, own in chosen.items():
        if own and getattr(own[1], "sparsity", None) is not None:
            tensors |= _thinned(layer, slot, own[1], hidden, dtype)
    return tensors


def _thinned(layer: Layer, slot: Slot, spec: Any, hidden: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tables of a slot that leaves channels out, by full name, also put into `layer`. Counted one after the other
    with all earlier ones at work: what a block computes from fewer channels is smaller."""
    parts = layer.parts[slot]
    before = {weight.name for weight in parts.shape.weights()}
    for module in sparsity.attach(parts, spec.sparsity).values():
        share, module.left_out = module.left_out, 0.0
        counted: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(magnitudes.counting(counted), with_kwargs=True, prepend=True)
        with autocast(dtype):
            layer.run(hidden, together=_TOGETHER)
        handle.remove()
        magnitudes.fill(module, torch.stack(counted).sum(dim=0))
        module.left_out = share
    parts = parts.having(sparsity.reshape(parts.shape, spec))
    tables = [weight.name for weight in parts.shape.weights() if weight.name not in before]
    return {parts.place.tensor(name): parts.parameter(name).detach().bfloat16() for name in tables}


def _packed(parts: Parts, layout: Layout, stats: SlotStats, *, leave: bool = True) -> dict[str, torch.Tensor]:
    """One slot's tensors as stored, by full name; matrices in `parts` are left dequantised, if anybody will look."""
    tensors: dict[str, torch.Tensor] = {}
    storing = variants.storing(layout.get(parts.slot, PARENT))
    stored = variants.reshape(parts.shape, variants.unstructural(layout.get(parts.slot, PARENT)))
    kept = {weight.name: weight.stored for weight in stored.weights()}
    for weight in parts.shape.weights():
        name = parts.place.tensor(weight.name)
        if storing is None or kept[weight.name] == BFLOAT16:
            tensors[name] = parts.parameter(weight.name).detach().bfloat16()
            continue
        module, reads = parts.matrix(weight.name), parts.shape.reads.get(weight.name)
        packed = quantize.pack(module.weight, reads, stats, kept[weight.name], storing[1].method)
        if leave:
            set_linear(module, formats.unpack(packed), getattr(module, "bias", None))
        tensors |= {formats.on_disk(name, suffix): part for suffix, part in packed.items()}
    return tensors


def _blocks(child: Walk, layout: Layout) -> list[Block]:
    """The slots as they are stored."""
    return [
        block.having(variants.reshape(block.shape, variants.unstructural(layout.get(slot, PARENT))))
        for slot, block in child.blocks.items()
    ]


def _joined(blocks: Iterable[Block]) -> dict[str, tuple[str, ...]]:
    return {whole: parts for block in blocks for whole, parts in formats.joined_in(block).items()}


def _config(child: Walk, layout: Layout) -> dict[str, Any]:
    """The child's config with one compressed-tensors group per way of storing."""
    blocks = _blocks(child, layout)
    config = families.config_of(child.checkpoint.config, {block.slot: block.shape for block in blocks})
    config.pop("torch_dtype", None)  # the key's older name
    config["dtype"] = "bfloat16"  # as `_packed` writes it, whatever the parent's type was
    groups: dict[Stored, list[str]] = {}
    wholes = {part: whole for whole, parts in _joined(blocks).items() for part in parts}
    for block in blocks:
        for name, weight in block.tensors().items():
            if weight.is_matrix and weight.stored != BFLOAT16:
                module = name.removesuffix(".weight")
                targets = groups.setdefault(weight.stored, [])
                if (target := wholes.get(module, module)) not in targets:
                    targets.append(target)
    if groups:
        others = sorted({formats.of(stored).CONFIG_FORMAT for stored in groups} - {formats.STOCK})
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            # transformers skips a method it does not know and fills the missing weights with noise; at a format it does
            # not know it stops.
            "format": others[0] if others else formats.STOCK,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": formats.of(stored).config_group(stored, groups[stored])
                for i, stored in enumerate(sorted(groups, key=lambda s: (s.down, s.bits, s.group, str(s))))
            },
            "ignore": [],
        }
    return config
