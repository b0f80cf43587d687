"""Where a model comes from: what `lower` asks of a folder and of a GGUF file alike.

Tensors go by the names transformers gives them; a source that keeps them under other names, in another order of rows or
in other bytes sees to that itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pennyweight.checkpoint import Checkpoint
from pennyweight.formats import _matrix, packed_int, zigzag
from pennyweight.gguf.file import is_gguf
from pennyweight.slots import Shape, Slot
from pennyweight.walk import Walk


@dataclass(frozen=True)
class Vocabulary:
    """A transformers tokenizer, the token that plain text begins with (None: no such), and those that end an answer."""

    tokenizer: Any
    begin: int | None
    stop: frozenset[int]


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What transformers would find in config.json."""
        ...

    @property
    def shapes(self) -> Mapping[Slot, Shape]:
        """Every slot; the tensors of each are there, in these shapes."""
        ...

    @property
    def rotary_divisors(self) -> np.ndarray | None:
        """(head_dim / 2,) float32 that divide the rotary frequencies the config gives, or None."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What users should know about how the tensors and tokens asked for so far came to be."""
        ...

    def matrix(self, name: str) -> Any:
        """A native matrix. Raises ValueError if the weights are damaged or of a type the engine does not read."""
        ...

    def matrices(self, names: Sequence[str]) -> list[Any]:
        """Matrices on one input, in order, stacked where their formats allow that."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm, bias or table in float32. Raises ValueError if it is damaged."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError if the source has no tokenizer that can be used."""
        ...


def open_source(path: Path, *, mapped: bool = False) -> Source:
    """A Hugging Face folder or a GGUF file. `mapped`: matrices that lie on disk as the engine reads them stay there.
    Raises FileNotFoundError or ValueError for what is neither, or damaged."""
    if is_gguf(path):
        from pennyweight.gguf.source import GgufSource

        return GgufSource(path, mapped=mapped)
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"{path} does not exist")
    return Folder(path, mapped=mapped)


class Folder:
    """A Hugging Face folder. Nothing is rounded: 16-bit and float32 weights stay as they are, packed integers and
    zigzag keep codes and scales. `mapped`: 16-bit, float32 and zigzag matrices are used where they lie in the file."""

    rotary_divisors = None

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._checkpoint = Checkpoint(path)
        self.name = path.resolve().name
        self.config = self._checkpoint.config
        self.shapes = Walk(self._checkpoint).shapes
        self._mapped, self._rearranged = mapped, 0

    @property
    def notes(self) -> Sequence[str]:
        return rearranged(self._rearranged) if self._mapped else ()

    def vector(self, name: str) -> np.ndarray:
        tensor = self._checkpoint.read(name).float()
        _refuse_damage(name, tensor)
        return tensor.numpy()

    def matrix(self, name: str) -> Any:
        if name in self._checkpoint.entries:
            read = self._checkpoint.map if self._mapped else self._checkpoint.read
            return native(name, {"weight": read(name)}, in_place=self._mapped)
        parts = self._parts(name)
        if "weight_zigzag" not in parts:
            self._rearranged += 1
        return native(name, parts, in_place=self._mapped)

    def matrices(self, names: Sequence[str]) -> list[Any]:
        stacked = not self._mapped and len(names) > 1  # what lies in a file lies one after the other
        if stacked and all(f"{name}_zigzag" in self._checkpoint.entries for name in names):
            parts = [self._parts(name) for name in names]
            if zigzag.can_stack(parts):
                return [native(", ".join(names), zigzag.stack(parts))]
        return [self.matrix(name) for name in names]

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        def read(part: str) -> torch.Tensor:
            in_place = self._mapped and part.endswith("_zigzag")
            return self._checkpoint.map(part) if in_place else self._checkpoint.read(part)

        return _matrix.parts(name, self._checkpoint.entries, read)

    def vocabulary(self) -> Vocabulary:
        from pennyweight.job import load_tokenizer

        tokenizer = load_tokenizer(self._checkpoint.folder)
        stop = {tokenizer.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            path = self._checkpoint.folder / name
            ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            stop |= set(ids) if isinstance(ids, list) else {ids}
        return Vocabulary(tokenizer, tokenizer.bos_token_id, frozenset(stop - {None}))


def rearranged(count: int) -> tuple[str, ...]:
    """What users should know of matrices that could not stay in their file."""
    said = f"{count} matrices were rearranged for the kernels in memory; only others stay in their file"
    return (said,) if count else ()


def native(name: str, parts: Mapping[str, torch.Tensor], *, in_place: bool = False) -> Any:
    """A native matrix of its tensors by suffix, as they are on disk: `weight` alone, or the parts of our formats.
    `in_place`: weights that need no rearranging stay in the tensor's memory. Raises ValueError for values that are not
    finite, and for a type the engine does not read."""
    from pennyweight import _native

    if "weight" in parts:
        tensor = parts["weight"]
        _refuse_damage(name, tensor)
        stored = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}.get(tensor.dtype)
        if stored is None:
            raise ValueError(f"{name} is stored as {tensor.dtype}; the engine reads float16, bfloat16 and float32")
        return _native.Matrix.wide(tensor.view(torch.uint8).numpy(), _native.Float[stored], in_place)
    rows, columns = _matrix.shape_of(parts)
    if "weight_zigzag" not in parts:
        spec = packed_int.spec_of(parts)
        _refuse_damage(f"{name}_scale", parts["weight_scale"])
        codes = parts["weight_packed"].numpy().view(np.uint8)
        brain = parts["weight_scale"].dtype == torch.bfloat16
        scales = parts["weight_scale"].contiguous().view(torch.int16).numpy().view(np.uint16)
        return _native.Matrix.rows(codes, scales, None, columns, spec.bits, spec.group, brain)
    spec = zigzag.spec_of(parts)
    grid = zigzag.grid_of(parts)
    for half in (grid.scale, grid.minimum):
        if half is not None:
            _refuse_damage(name, half)
    row_scale = parts.get("weight_row_scale")
    if row_scale is not None:
        _refuse_damage(f"{name}_row_scale", row_scale)
    return _native.Matrix.zigzag(
        parts["weight_zigzag"].numpy(),
        rows,
        columns,
        spec.tile_rows,
        spec.group,
        _native.Scales[spec.scales],
        None if row_scale is None else row_scale.numpy(),
        parts["weight_order"].numpy() if "weight_order" in parts else None,
        in_place,
    )


def _refuse_damage(name: str, tensor: torch.Tensor) -> None:
    extremes = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN is carried through
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch it again")
