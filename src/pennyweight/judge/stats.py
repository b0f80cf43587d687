"""The single calibration pass: what every axis needs to know about a model's activations.

For each slot, over all calibration tokens t (x what enters the block, y what leaves it, z its inner activation: what
o_proj or down_proj multiplies):

    input_moment    (hidden, hidden)      mean x x^T        fitted linear blocks; GPTQ of matrices that read x
    cross_moment    (hidden, hidden)      mean y x^T        fitted linear blocks
    inner_moment    (channels, channels)  mean z z^T        KV head ranking; GPTQ of matrices that read z
    activation_mean_abs  (channels,)      mean |z|          FFN width ranking
    share                (1,)                  mean |a|^2 / |h|^2, a what the block adds to the residual stream (after
                                               a norm behind it), h the stream that leaves the layer
    magnitudes           histograms of |x| and |z|, plain and weighted: *_counts of live/magnitudes.py

Layers are visited one at a time, all rows through one before the next, so that memory and disk hold the sums of one
layer. Rows are cut into chunks, which may be tasks of their own; their sums are merged in a fixed order, so the result
does not depend on where the tasks ran.

A moment takes channels x channels numbers: those of an FFN's inner activation are most of what a model's statistics
take on disk. Where only quantisers read it, and they have found their codes (codes.py), its diagonal is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.disk.opened import open_checkpoint
from pennyweight.disk.tensors import read_entry, read_header
from pennyweight.live import magnitudes
from pennyweight.live.parts import Parts
from pennyweight.live.walk import Walk, autocast
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs import executor, scratch
from pennyweight.runs.scratch import Remembered

NAMES = ("input_moment", "cross_moment", "inner_moment", "activation_mean_abs", "share", "magnitudes")

Wanted = Mapping[Slot, tuple[str, ...]]
"""Names of what is to be gathered, by slot."""


class SlotStats(dict[str, Any]):
    """Statistics of one slot; remembers what a quantiser prepared from a moment, which several specs share, and where
    codes are kept that were found already. `owner` names the slot, for codes that depend on its statistics; `library`:
    the folder of variants that were trained (heal/library.py), None if none are."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        codes: Remembered | None = None,
        owner: str = "",
        library: Path | None = None,
    ) -> None:
        super().__init__(tensors)
        self.codes, self.owner, self._library = codes, owner, library
        self._prepared: dict[tuple[str, str], Any] = {}
        self._order = ""

    def having_inner(self, channels: torch.Tensor) -> SlotStats:
        """The same of a slot whose inner activation has had `channels` of this one's, in this order; of a channel of
        -1 nothing is known: its moments are zero."""
        found = SlotStats(self, codes=self.codes, owner=self.owner, library=self._library)
        found._prepared = {key: prepared for key, prepared in self._prepared.items() if key[0] != "inner_moment"}
        found._order = hashlib.sha256(f"{self._order} {channels.tolist()}".encode()).hexdigest()[:16]
        unknown = channels < 0
        for name in {"inner_moment", "activation_mean_abs"} & {*self}:
            tensor = self[name][channels]
            tensor[unknown] = 0
            if tensor.ndim == 2:
                tensor = tensor[:, channels]
                tensor[:, unknown] = 0
            found[name] = tensor
        return found

    def named(self, moment: str) -> str:
        """Whose moment it is, in words that no other one has."""
        return f"{self.owner}.{moment}{f' {self._order}' if self._order and moment == 'inner_moment' else ''}"

    def prepared(self, moment: str, quantizer: Any) -> Any:
        key = (moment, quantizer.__name__)
        if key not in self._prepared:
            self._prepared[key] = quantizer.prepare(self.get(moment))
        return self._prepared[key]

    def trained(self, choice: Choice) -> Mapping[str, torch.Tensor] | None:
        """The weights that a variant was trained to, by name on disk; None where none are trained. Raises RuntimeError
        if they should be there and are not."""
        return None if self._library is None else scratch.needed(variant_path(self._library, self.owner, choice))


def variant_path(library: Path, slot: Slot | str, choice: Choice) -> Path:
    """The file of a variant's weights in the folder of those that were trained."""
    return library / f"{slot}-{hashlib.sha256(choice.key().encode()).hexdigest()[:16]}.safetensors"


class Collector:
    """Sums statistics of one layer while it runs. Used as a context around forward passes."""

    def __init__(self, layer: Mapping[Slot, Parts], wanted: Wanted) -> None:
        """`layer`: the parts of its slots."""
        self.sums: dict[str, torch.Tensor] = {}
        self._layer, self._wanted = layer, wanted
        self._handles: list[Any] = []
        self._inputs: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Collector:
        for slot, parts in self._layer.items():
            wanted = self._wanted.get(slot, ())
            if {"input_moment", "cross_moment"} & {*wanted}:
                self._before(parts.block, self._on_input(slot.kind, wanted))
            if "cross_moment" in wanted:
                self._handles.append(parts.block.register_forward_hook(self._on_output(slot.kind)))
            if {"inner_moment", "activation_mean_abs"} & {*wanted} and parts.shape.readers("inner"):
                self._before(parts.reading("inner")[0], self._on_inner(slot.kind, wanted))
            if "share" in wanted:
                self._on_share(slot.kind, parts)
            for activation in ("input", "inner") if "magnitudes" in wanted else ():
                module, readers = parts.reading(activation)
                weights = magnitudes.importance([linear.weight for linear in readers])
                self._before(module, self._on_magnitudes(f"{slot.kind}.{activation}", weights))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: Any, hear: Any) -> None:
        """Have `hear` told what enters a module, (tokens, channels) float32."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hear(magnitudes.entering(args, kwargs).detach().flatten(0, -2).float())

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _add_product(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        with torch.autocast("cpu", enabled=False):  # moments in bfloat16 would not even be positive definite
            if name in self.sums:
                self.sums[name].addmm_(left.T, right)
            else:
                self.sums[name] = left.T @ right

    def _on_input(self, kind: str, wanted: tuple[str, ...]) -> Any:
        def hear(x: torch.Tensor) -> None:
            if "input_moment" in wanted:
                self._add_product(f"{kind}.input_moment", x, x)
            if "cross_moment" in wanted:
                self._inputs[kind] = x

        return hear

    def _on_output(self, kind: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            y = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2).float()
            self._add_product(f"{kind}.cross_moment", y, self._inputs.pop(kind))

        return hook

    def _on_inner(self, kind: str, wanted: tuple[str, ...]) -> Any:
        def hear(z: torch.Tensor) -> None:
            if "inner_moment" in wanted:
                self._add_product(f"{kind}.inner_moment", z, z)
            if "activation_mean_abs" in wanted:
                name = f"{kind}.activation_mean_abs"
                self.sums[name] = self.sums.get(name, 0.0) + z.abs().sum(dim=0)

        return hear

    def _on_share(self, kind: str, parts: Parts) -> None:
        """Token by token: a few with huge states would speak for all."""
        added: list[torch.Tensor] = []

        def left(output: Any) -> torch.Tensor:
            return (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2).float()

        def block(module: Any, args: Any, output: Any) -> None:
            added.append(left(output).mul(parts.place.residual).square().sum(dim=-1))

        def layer(module: Any, args: Any, output: Any) -> None:
            stream = left(output).square().sum(dim=-1).clamp_min(1e-30)
            self.sums[f"{kind}.share"] = self.sums.get(f"{kind}.share", 0.0) + (added.pop() / stream).sum().view(1)

        self._handles.append((parts.norm("post_norm") or parts.block).register_forward_hook(block))
        self._handles.append(parts.root.register_forward_hook(layer))

    def _on_magnitudes(self, which: str, importance: torch.Tensor) -> Any:
        def hear(x: torch.Tensor) -> None:
            size = x.abs()
            for name, values in (("counts", size), ("weighted_counts", size * importance)):
                key = f"{which}_{name}"
                self.sums[key] = self.sums.get(key, 0.0) + magnitudes.counts(values)

        return hear


def hidden_path(folder: Path, chunk: int, layer: int) -> Path:
    """Calibration rows as they enter a layer."""
    return folder / f"calibration-{chunk}-{layer}.safetensors"


def sums_path(folder: Path, chunk: int, layer: int) -> Path:
    return folder / f"sums-{chunk}-{layer}.safetensors"


@torch.no_grad()
def embed(model: Path, ids: Mapping[int, np.ndarray], folder: Path, dtype: torch.dtype) -> None:
    """Task: chunks of rows (rows, tokens), by number, as they enter the first layer, into `folder`."""
    walk = Walk(open_checkpoint(model), dtype=dtype)
    for chunk, rows in ids.items():
        path = hidden_path(folder, chunk, 0)
        if scratch.kept(path) is None:
            with autocast(dtype):
                scratch.keep(path, {"hidden": walk.embed(torch.from_numpy(rows))})


@torch.no_grad()
def calibrate(model: Path, layer: int, chunks: Sequence[int], wanted: Wanted, folder: Path, dtype: torch.dtype) -> None:
    """Task: run chunks, by number, through a layer; their sums of what is wanted and what leaves the layer go into
    `folder`. What is there already is not made again. Raises ValueError for hidden states that are not finite."""
    here = None
    for chunk in chunks:
        sums, leaving = sums_path(folder, chunk, layer), hidden_path(folder, chunk, layer + 1)
        if (wanted and scratch.kept(sums) is None) or scratch.kept(leaving) is None:
            here = here or Walk(open_checkpoint(model), dtype=dtype).layer(layer)
            entering = scratch.needed(hidden_path(folder, chunk, layer))["hidden"]
            with Collector(here.parts, wanted) as collector, autocast(dtype):
                hidden = here.run(entering, together=8)
            if not torch.isfinite(hidden).all():
                raise ValueError(
                    f"what leaves layer {layer} is not finite on the calibration text; the model's weights are damaged"
                )
            if wanted:
                scratch.keep(sums, collector.sums)
            scratch.keep(leaving, {"hidden": hidden})
        executor.tick()


def merge(folder: Path, chunks: int, layer: int, tokens: int) -> dict[str, torch.Tensor]:
    """Means over all chunks of one layer, `<kind>.<name>` -> tensor; sums are added in chunk order."""
    total: dict[str, torch.Tensor] = {}
    for chunk in range(chunks):
        for name, part in scratch.needed(sums_path(folder, chunk, layer)).items():
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.div_(tokens) for name, tensor in total.items()}


def read(path: Path) -> dict[str, torch.Tensor]:
    """A file of statistics of one layer."""
    return {name: read_entry(name, entry) for name, entry in read_header(path).items()}


def of_slot(
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    *,
    codes: Remembered | None = None,
    owner: Slot | None = None,
    library: Path | None = None,
) -> SlotStats:
    """One slot's statistics from its layer's; `codes` of its matrices, and its variants in the `library`, are kept by
    the name of their `owner`."""
    prefix = f"{kind}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return SlotStats(own, codes=codes, owner=str(owner), library=library)
