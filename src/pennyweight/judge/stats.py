"""The single calibration pass: what every axis needs to know about a model's activations.

For each slot, over all calibration tokens t (x the slot's normed input, y what the slot adds to the residual stream):

    input_moment    (hidden, hidden)      mean x x^T        fitted linear blocks; GPTQ of q, k, v, gate, up
    cross_moment    (hidden, hidden)      mean y x^T        fitted linear blocks
    output_moment   (q_width, q_width)    mean a a^T, a the input of o_proj          KV head ranking; GPTQ of o
    down_moment     (channels, channels)  mean z z^T, z the gated activation          GPTQ of down
    activation_mean_abs  (channels,)      mean |z|                                     FFN width ranking
    magnitudes           histograms of |x| and of |a| or |z|, plain and weighted: *_counts of live/magnitudes.py

Layers are visited one at a time, so memory is bounded by the largest layer plus one chunk of hidden states. The work
is cut into chunks of rows; each chunk is a task of its own and partial means are merged in a fixed order, so the
result does not depend on where the tasks ran.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pennyweight.disk.checkpoint import Checkpoint, read_entry, read_header
from pennyweight.families._decoder import BLOCK, INNER, NORM
from pennyweight.live import magnitudes
from pennyweight.live.walk import Walk, autocast, run_layer
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.model.slots import Slot
from pennyweight.runs import executor

NAMES = ("input_moment", "cross_moment", "output_moment", "down_moment", "activation_mean_abs", "magnitudes")


class SlotStats(dict[str, Any]):
    """Statistics of one slot; remembers what a quantiser prepared from a moment, which several specs share."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self._prepared: dict[tuple[str, str], Any] = {}

    def prepared(self, moment: str, quantizer: Any) -> Any:
        key = (moment, quantizer.__name__)
        if key not in self._prepared:
            self._prepared[key] = quantizer.prepare(self.get(moment))
        return self._prepared[key]


class Collector:
    """Sums statistics of one layer while it runs. Used as a context around forward passes."""

    def __init__(self, layer: Any, shapes: Mapping[str, Any], wanted: Collection[str]) -> None:
        """shapes: the layer's {"mixer": shape, "ffn": shape}; wanted: names to gather."""
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self._layer, self._shapes, self._wanted = layer, shapes, wanted
        self._handles: list[Any] = []
        self._inputs: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Collector:
        for kind, shape in self._shapes.items():
            norm, block = getattr(self._layer, NORM[kind]), getattr(self._layer, BLOCK[kind])
            self._handles.append(norm.register_forward_hook(self._on_input(kind)))
            if "cross_moment" in self._wanted:
                self._handles.append(block.register_forward_hook(self._on_output(kind)))
            if isinstance(shape, Attention) and "output_moment" in self._wanted:
                self._handles.append(block.o_proj.register_forward_pre_hook(self._on_inner(kind, "output_moment")))
            if isinstance(shape, GatedMLP):
                self._handles.append(block.down_proj.register_forward_pre_hook(self._on_inner(kind, "down_moment")))
            if "magnitudes" in self._wanted and isinstance(shape, Attention | GatedMLP):
                inner = getattr(block, INNER[kind])
                first = magnitudes.importance([linear.weight for linear in magnitudes.readers(block, kind)])
                self._handles.append(norm.register_forward_hook(self._on_magnitudes(kind, "input", first)))
                second = magnitudes.importance([inner.weight])
                self._handles.append(inner.register_forward_pre_hook(self._on_magnitudes(kind, "inner", second)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _add_product(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        with torch.autocast("cpu", enabled=False):  # moments in bfloat16 would not even be positive definite
            if name in self.sums:
                self.sums[name].addmm_(left.T, right)
            else:
                self.sums[name] = left.T @ right

    def _on_input(self, kind: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            x = output.detach().flatten(0, -2).float()
            if kind == "mixer":
                self.tokens += len(x)
            if "input_moment" in self._wanted:
                self._add_product(f"{kind}.input_moment", x, x)
            if "cross_moment" in self._wanted:
                self._inputs[kind] = x

        return hook

    def _on_output(self, kind: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            y = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2).float()
            self._add_product(f"{kind}.cross_moment", y, self._inputs.pop(kind))

        return hook

    def _on_magnitudes(self, kind: str, which: str, importance: torch.Tensor) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor | None = None) -> None:
            size = (args[0] if output is None else output).detach().flatten(0, -2).abs().float()
            for name, values in (("counts", size), ("weighted_counts", size * importance)):
                key = f"{kind}.{which}_{name}"
                self.sums[key] = self.sums.get(key, 0.0) + magnitudes.counts(values)

        return hook

    def _on_inner(self, kind: str, moment: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            z = args[0].detach().flatten(0, -2).float()
            if moment in self._wanted:
                self._add_product(f"{kind}.{moment}", z, z)
            if moment == "down_moment" and "activation_mean_abs" in self._wanted:
                name = f"{kind}.activation_mean_abs"
                self.sums[name] = self.sums.get(name, 0.0) + z.abs().sum(dim=0)

        return hook


def partial_path(folder: Path, chunk: int, layer: int) -> Path:
    return folder / f"stats-{chunk}-{layer}.safetensors"


@torch.no_grad()
def calibrate_chunk(
    model: Path, ids: np.ndarray, wanted: tuple[str, ...], folder: Path, chunk: int, dtype: torch.dtype
) -> int:
    """Task: walk the rows `ids` (rows, tokens) through the model, write one file of sums per layer into `folder`.

    Returns the number of tokens. Layers whose file exists are not gathered again.
    """
    walk = Walk(Checkpoint(model), dtype=dtype)
    positions = walk.positions(ids.shape[1])
    with autocast(dtype):
        hidden = walk.embedding()(torch.from_numpy(ids)).float()
        for index in range(walk.layers):
            layer = walk.layer(index)
            shapes = {kind: walk.shapes[Slot(kind, index)] for kind in ("mixer", "ffn")}
            path = partial_path(folder, chunk, index)
            collector = Collector(layer, shapes, () if path.exists() else wanted)
            with collector:
                hidden = torch.cat([run_layer(layer, rows, positions) for rows in hidden.split(8)])
            if not path.exists():
                partial = path.with_suffix(".partial")
                save_file(collector.sums, partial)
                partial.replace(path)
            executor.tick(index + 1)
    if not torch.isfinite(hidden).all():
        raise ValueError("the model's hidden states are not finite on the calibration text; its weights are damaged")
    return ids.size


def merge(folder: Path, chunks: int, layer: int, tokens: int) -> dict[str, torch.Tensor]:
    """Means over all chunks of one layer, `<kind>.<name>` -> tensor; partial sums are added in chunk order."""
    total: dict[str, torch.Tensor] = {}
    for chunk in range(chunks):
        for name, entry in read_header(partial_path(folder, chunk, layer)).items():
            part = read_entry(name, entry)
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.div_(tokens) for name, tensor in total.items()}


def of_slot(tensors: Mapping[str, torch.Tensor], kind: str) -> SlotStats:
    """One slot's statistics from its layer's."""
    prefix = f"{kind}."
    return SlotStats({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
