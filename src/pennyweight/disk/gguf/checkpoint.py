"""A GGUF file, opened: its metadata as transformers' config, its tensors under transformers' names, read one at a time.

Three things in such files are not as transformers has them. Files of some architectures hold the rows of q_proj and
k_proj in an order in which rotary pairs are neighbours; they are put back in halves here, which changes no number,
since scales run along columns. Norms that lack 1 in transformers are whole. And Llama 3's rotary scaling is a tensor of
divisors instead of a config entry.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH, TensorNameMap, dequantize, get_tensor_name_map

from pennyweight import families
from pennyweight.disk.gguf.architectures import ARCHITECTURES, Architecture
from pennyweight.disk.gguf.config import config_of, warnings
from pennyweight.disk.gguf.file import Tensor, read
from pennyweight.disk.tensors import Entry

if TYPE_CHECKING:
    import torch

DIVISORS = "rope_freqs.weight"
_CHUNK_WEIGHTS = 2**22  # converted at once, to bound what is held in between


class GgufCheckpoint:
    """Answers what disk/checkpoint.py's Checkpoint does: quantised tensors are float32 when they are read, exactly what
    their codes and scales say, others as they are stored. `tensors`: where each lies, by transformers' name."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a damaged file, an architecture or a setting that is not run, and tensors that are
        missing, of another shape, or that the model has no place for."""
        self.path, self.files, self.file = path, [path], read(path)
        self.config = families.resolved(config_of(self.file), str(path))
        self.notes = tuple(warnings(self.file, self.config))
        self.blocks = families.blocks(self.config)
        arch = self.file.get("general.architecture", str)
        self._architecture = ARCHITECTURES[arch]
        self.tensors: dict[str, Tensor] = {}
        self._lacking: dict[str, float] = {}
        names = get_tensor_name_map(MODEL_ARCH[arch.upper()], n_blocks=1)
        left = dict(self.file.tensors)
        parts = self._take_apart(left, names)
        divisors = left.pop(DIVISORS, None)
        for block in self.blocks.values():
            for name, weight in block.tensors().items():
                if name.endswith("norm.weight"):
                    self._lacking[name] = block.norm_offset
                stored = parts.get(name) or stored_name(names, name)
                tensor = left.pop(stored, None)
                if tensor is None or tensor.shape != weight.shape:
                    came = "is missing" if tensor is None else f"has shape {tensor.shape}"
                    raise ValueError(f"{path}: {stored} {came}; the metadata promise shape {weight.shape}")
                self.tensors[name] = tensor
        if left:
            raise ValueError(
                f"{path}: {len(left)} tensors have no place in a {self.config['model_type']} model as we know it: "
                f"{', '.join(sorted(left)[:3])} ...; without them it would compute something else"
            )
        self.entries = {name: _entry(path, tensor) for name, tensor in self.tensors.items()}
        self.rotary_divisors: np.ndarray | None = None
        if divisors is not None:
            half, found = self.config["head_dim"] // 2, self.floats(divisors, 0, self.file.read(divisors))[0]
            if divisors.shape != (half,) or not (found > 0).all():
                raise ValueError(f"{path}: {DIVISORS} of shape {divisors.shape}; expected {half} positive numbers")
            self.rotary_divisors = found

    def read(self, name: str) -> torch.Tensor:
        """One tensor; no more than it and a few megabytes are held. Raises ValueError if it is not finite, or the file
        has become shorter than its header said."""
        import torch

        tensor, order = self.tensors[name], self.order(name)
        if len(tensor.shape) == 1:
            return torch.from_numpy(self.vector(name))
        out = torch.empty(tensor.shape, dtype=self.entries[name].torch_dtype)
        for first, raw in self.chunks(tensor):
            out[first : first + len(raw)] = torch.from_numpy(self.floats(tensor, first, raw))
        return out if order is None else out[torch.from_numpy(order)]

    def vector(self, name: str) -> np.ndarray:
        """A norm or bias in float32."""
        tensor, order = self.tensors[name], self.order(name)
        values = self.floats(tensor, 0, self.file.read(tensor))[0] - np.float32(self._lacking.get(name, 0))
        return values if order is None else values[order]

    def outline(self, name: str) -> torch.Tensor:
        """Type and shape alone."""
        import torch

        return torch.empty(self.entries[name].shape, dtype=self.entries[name].torch_dtype, device="meta")

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def chunks(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, some rows as stored), the whole tensor in all."""
        count, columns = tensor.shape
        step = max(1, _CHUNK_WEIGHTS // columns)
        for first in range(0, count, step):
            yield first, self.file.read(tensor, first, min(step, count - first))

    def floats(self, tensor: Tensor, first: int, raw: np.ndarray) -> np.ndarray:
        """Rows of a tensor, from row `first` on, in float32. Raises ValueError for values that are not finite."""
        values = dequantize(raw, tensor.kind.type)
        if not np.isfinite(values).all():
            raise self.damage(tensor, first, "NaN or infinite values")
        return values

    def damage(self, tensor: Tensor, first: int, what: str) -> ValueError:
        """The error for rows of a tensor, from row `first` on, that cannot be what was written."""
        start = tensor.start + first * tensor.row_bytes
        return ValueError(f"{self.path}: {tensor.name} from byte {start} on: {what}; the file is damaged")

    def order(self, name: str) -> np.ndarray | None:
        """Which stored row belongs in each place, or None if they lie in their places."""
        return order_of(self._architecture, self.config, name, self.tensors[name].shape[0])

    def _take_apart(self, left: dict[str, Tensor], names: TensorNameMap) -> dict[str, str]:
        """Put in the place of every tensor that holds several matrices, one's rows under another's, what each is.
        Returns what they are called by the names of the matrices."""
        called: dict[str, str] = {}
        weights = {name: weight for block in self.blocks.values() for name, weight in block.tensors().items()}
        for whole, parts in families.joined(self.config).items():
            stored, first = stored_name(names, f"{whole}.weight"), 0
            tensor = left.get(stored)
            rows = {f"{part}.weight": weights[f"{part}.weight"].shape[0] for part in parts}
            if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != sum(rows.values()):
                called |= dict.fromkeys(rows, stored)  # which is told as one that is missing, or does not fit
                continue
            del left[stored]
            for name, count in rows.items():
                called[name] = f"{stored} from row {first} on"
                start = tensor.start + first * tensor.row_bytes
                left[called[name]] = replace(tensor, shape=(count, tensor.shape[1]), start=start)
                first += count
        return called


def _entry(path: Path, tensor: Tensor) -> Entry:
    """What reading a tensor gives, and where it lies."""
    vector = len(tensor.shape) == 1
    dtype = "F32" if vector or tensor.kind.split is not None else tensor.kind.name
    return Entry(path, dtype, tensor.shape, tensor.start, tensor.start + tensor.nbytes)


def order_of(architecture: Architecture, config: Mapping[str, Any], name: str, rows: int) -> np.ndarray | None:
    """Which stored row belongs in each place of the tensor `name`, or None if they lie in their places."""
    if not architecture.interleaved or ".self_attn." not in name:
        return None
    part = name.split(".")[-2]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(part)
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def stored_name(names: TensorNameMap, name: str) -> str:
    """model.layers.3.self_attn.q_proj.bias -> blk.3.attn_q.bias, from a map of one layer: a map of all has 270 entries
    for each, and how many there are is the file's word."""
    layer = "".join(re.findall(r"^model\.layers\.(\d+)\.", name))
    stored = names.get_name(name.replace(f"layers.{layer}.", "layers.0.", 1), try_suffixes=(".weight", ".bias"))
    assert stored is not None, f"{name} has no name in such files"
    return stored.replace("blk.0.", f"blk.{layer}.", 1)
