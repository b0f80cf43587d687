"""Hugging Face folders in and out, one tensor and one shard at a time.

Reading uses plain file reads, not memory maps: a map's pages count as resident memory, and a 2.5 GB model must be
worked on in less than that. Writing goes to `<folder>.partial` and is renamed when complete, so a folder that exists
is a whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pennyweight import families, formats
from pennyweight.disk import reading

if TYPE_CHECKING:
    import torch

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER = 32 * 2**20
_SMALL = 64  # bytes
_MAX_CONFIG = 4 * 2**20
_MAX_INDEX = 32 * 2**20

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_OrNone = Annotated[int, Field(ge=0, lt=2**31)]  # 0: a block that is gone
_Layers = Annotated[int, Field(ge=1, le=2**10)]
_Heads = Annotated[int, Field(ge=1, le=2**10)]
_Positive = Annotated[float, Field(gt=1e-30, lt=1e30)]
_Word = Annotated[str, Field(max_length=60)]
_Part = Annotated[float, Field(gt=0, le=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class _Said(BaseModel):
    """Of a JSON file what we read of it: types as they stand there, numbers that are numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Rotary(_Said):
    rope_type: _Word | None = None
    type: _Word | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: _Part | None = None
    truncate: bool | None = None
    short_factor: list[_Positive] | None = None
    long_factor: list[_Positive] | None = None


class _Rotaries(_Rotary):
    """Of a model, or of each kind of its layers."""

    full_attention: _Rotary | None = None
    sliding_attention: _Rotary | None = None


class _Sparsity(_Said):
    model_config = ConfigDict(extra="forbid")

    entering: _Share = 0.0
    inner: _Share = 0.0
    weighted: bool = False


class _Layer(_Said):
    """What may differ by layer: all that we build."""

    model_config = ConfigDict(extra="forbid")

    num_key_value_heads: Annotated[int, Field(ge=0, le=2**10)] | None = None
    intermediate_size: _OrNone | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    skip: list[str] = []
    replace_with_linear: list[str] = []
    sparsity: dict[Literal["attention", "mlp"], _Sparsity] = {}


class _Weights(_Said):
    num_bits: int
    type: str
    symmetric: Literal[True]


class _Group(_Said):
    targets: list[str]
    weights: _Weights


class _Quantization(_Said):
    quant_method: Literal["compressed-tensors"]
    format: str
    config_groups: dict[str, _Group]


class _Config(_Said):
    """config.json, as far as any family reads it. null is for transformers to make something of."""

    model_type: _Word
    vocab_size: _Size | None = None
    hidden_size: _Size | None = None
    intermediate_size: _OrNone | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | None = None
    num_key_value_heads: Annotated[int, Field(ge=0, le=2**10)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    hidden_act: _Word | None = None
    hidden_activation: _Word | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=families.MOST_POSITIONS)] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    max_window_layers: int | None = None
    sliding_window_pattern: _Layers | None = None
    layer_types: Annotated[list[str], Field(max_length=2**10)] | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    rope_theta: _Positive | None = None
    rope_local_base_freq: _Positive | None = None
    rope_parameters: _Rotaries | None = None
    rope_scaling: _Rotary | None = None
    partial_rotary_factor: _Part | None = None
    no_rope_layers: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=2**10)] | None = None
    no_rope_layer_interval: _Layers | None = None
    embedding_multiplier: _Positive | None = None
    attention_multiplier: _Positive | None = None
    residual_multiplier: _Positive | None = None
    logits_scaling: _Positive | None = None
    query_pre_attn_scalar: _Positive | None = None
    attn_logit_softcapping: _Positive | None = None
    final_logit_softcapping: _Positive | None = None
    use_bidirectional_attention: bool | None = None
    original_max_position_embeddings: _Size | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    per_layer_config: dict[Annotated[str, Field(pattern="^[0-9]{1,4}$")], _Layer] | None = None
    quantization_config: _Quantization | None = None
    # What transformers would act on and we do not, or only by layer.
    is_causal: Literal[True] | None = None
    skip: Annotated[list[str], Field(max_length=0)] | None = None
    replace_with_linear: Annotated[list[str], Field(max_length=0)] | None = None
    sparsity: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    configuration_files: None = None
    transformers_weights: None = None


_Checksums = dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]]


class _Index(_Said):
    weight_map: dict[str, str]


class _Tensor(_Said):
    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=8)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Header(_Said):
    """Of a safetensors file: entries by tensor, and one that is none."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Tensor]  # pyright: ignore[reportIncompatibleVariableOverride]

    about: dict[str, str] = Field({}, alias="__metadata__")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, end) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_config(folder: Path) -> families.Resolved:
    """config.json of a model folder (or the file itself), with what transformers makes of the keys it leaves open.
    Raises FileNotFoundError or ValueError."""
    path = folder / CONFIG if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a model: expected a folder with config.json and *.safetensors "
            "(download it first: penny never reaches for a network)"
        )
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file; penny run, bench and serve take those, everything else takes a folder"
        )
    said = reading.json_file(path, dict[str, Any], most_bytes=_MAX_CONFIG)
    if "model_type" not in said:
        raise ValueError(f"{path} has no model_type; it is not a transformers config")
    reading.checked(path, said, _Config)
    return families.resolved(said, str(path))


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files of a folder as transformers picks them, model.safetensors or else the shards that the index
    names, and every tensor that the index promises.

    Raises FileNotFoundError or ValueError if a file is missing, is no ordinary one, or lies elsewhere.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.exists() or whole.is_symlink():
        reading.size_of(whole)
        return [whole], []
    if not index.exists():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}"
            + (f", only {others}, which transformers would not read" if others else "")
            + "; convert other weights with save_pretrained first"
        )
    named = reading.json_file(index, _Index, most_bytes=_MAX_INDEX).weight_map
    for name in sorted(set(named.values())):
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
            raise ValueError(f"{index} names {name[:60]!r}; shards lie in the folder itself")
    files = [folder / name for name in sorted(set(named.values()))]
    if not files:
        raise ValueError(f"{index} names no file")
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{folder}: the index names {missing[0]}, which is not there ({len(missing)} missing)")
    for file in files:
        reading.size_of(file)
    return files, list(named)


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, checked against its size as the safetensors library does: tensors lie one after
    the other, none overlaps, nothing is left. Raises ValueError with the offset where it breaks."""
    size = reading.size_of(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path}: header says {length} bytes but the file has {size}; truncated or not safetensors"
            )
        raw = file.read(length)
    try:
        found = _Header.model_validate_json(raw).__pydantic_extra__
    except ValidationError as err:
        raise ValueError(f"{path}: the header at byte 8 is damaged: {reading.first_error(err)}") from err
    entries, expected = {}, 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].data_offsets):
        (start, end), shape = tensor.data_offsets, tuple(tensor.shape)
        if tensor.dtype not in _ITEM_BYTES:
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype[:40]}; supported are {', '.join(_ITEM_BYTES)}")
        if end - start != math.prod(shape) * _ITEM_BYTES[tensor.dtype]:
            raise ValueError(f"{path}: {name} says shape {shape} {tensor.dtype} but bytes {start} to {end}; damaged")
        if 8 + length + end > size:
            raise ValueError(f"{path}: {name} ends at byte {8 + length + end}, the file at {size}; it is truncated")
        if start != expected:
            raise ValueError(f"{path}: {name} begins at byte {start} of the data, {expected} was expected; damaged")
        entries[name], expected = Entry(path, tensor.dtype, shape, 8 + length + start, 8 + length + end), end
    if 8 + length + expected != size:
        raise ValueError(f"{path}: {size - 8 - length - expected} bytes after the last tensor; damaged")
    return {name: entries[name] for name in found}


def read_entry(name: str, entry: Entry) -> torch.Tensor:
    """One tensor, copied from its file. Raises ValueError if the file ends inside it."""
    import torch

    out = torch.empty(entry.shape, dtype=getattr(torch, _TORCH[entry.dtype]))
    if not entry.nbytes:
        return out
    view = memoryview(out.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        got = 0
        while got < entry.nbytes:
            count = file.readinto(view[got:])
            if not count:
                raise ValueError(f"{entry.file}: ended inside {name}, {entry.nbytes - got} bytes short")
            got += count
    return out


CHECKSUMS = "checksums.json"
"""Of folders that pennyweight wrote: the CRC-32 of every tensor's bytes, as eight hexadecimal digits by name."""


class Checkpoint:
    """A model folder, opened but not loaded: config and the place of every tensor. `notes`: what users should know of
    the files that it was not made of."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError or ValueError if the folder is not a complete, undamaged model."""
        self.folder = folder
        self.config = read_config(folder)
        if (folder / _ADAPTER).exists():
            raise ValueError(f"{folder} holds an adapter beside its weights ({_ADAPTER}); merge it into them first")
        self.files, promised = weight_files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            entries = read_header(file)
            if twice := self.entries.keys() & entries.keys():
                raise ValueError(f"{file}: {min(twice)} is in {self.entries[min(twice)].file.name}, too")
            self.entries |= entries
        if missing := sorted(set(promised) - self.entries.keys()):
            raise ValueError(f"{folder / INDEX} names {missing[0]}, which no file has ({len(missing)} missing)")
        self._made: dict[str, torch.Tensor] = {}
        self._take_apart()
        checksums = folder / CHECKSUMS
        self._checksums = reading.json_file(checksums, _Checksums, most_bytes=_MAX_INDEX) if checksums.exists() else {}
        self.notes = tuple(self._notes())
        if self.config["tie_word_embeddings"] and self._has_a_head_of_its_own():
            untied = {**self.config.said, "tie_word_embeddings": False}
            self.config = families.resolved(untied, self.config.where)
            self.notes += (
                f"{folder}: config.json ties the head to the embedding; the files hold another, which is used",
            )

    def _take_apart(self) -> None:
        """Make of every tensor that holds several matrices, one's rows under another's, the tensors of these: rows
        follow each other in the file. Raises ValueError where there are not as many rows as config.json says."""
        if not (joined := families.joined(self.config)):
            return
        rows = {
            name.removesuffix(".weight"): weight.shape[0]
            for block in families.blocks(self.config).values()
            for name, weight in block.tensors().items()
        }
        for whole, parts in joined.items():
            if any(part not in rows for part in parts):  # a block that is gone
                continue
            for name in formats.tensors_of(f"{whole}.weight") & self.entries.keys():
                entry = self.entries.pop(name)
                self._take_one_apart(name, entry, {part + name.removeprefix(whole): rows[part] for part in parts})

    def _take_one_apart(self, name: str, entry: Entry, parts: dict[str, int]) -> None:
        import torch

        count = sum(parts.values())
        shape = read_entry(name, entry).tolist() if name.endswith(".weight_shape") and entry.nbytes <= _SMALL else None
        if (shape or entry.shape or (0,))[0] != count:
            promised = (count, *(shape or entry.shape)[1:])
            raise ValueError(
                f"{self.folder}: {name} has shape {tuple(shape or entry.shape)}; config.json promises shape {promised}"
            )
        first = 0
        for part, rows in parts.items():
            self.entries[part] = entry
            if shape is not None:
                self._made[part] = torch.tensor([rows, *shape[1:]], dtype=torch.int64)
            else:
                each = entry.nbytes // count
                start = entry.start + first * each
                self.entries[part] = Entry(
                    entry.file, entry.dtype, (rows, *entry.shape[1:]), start, start + rows * each
                )
            first += rows

    def _notes(self) -> Iterable[str]:
        read = {file.name for file in self.files}
        others = [path.name for path in sorted(self.folder.glob("*.safetensors")) if path.name not in read]
        if read == {WEIGHTS} and (self.folder / INDEX).exists():
            others.append(INDEX)
        if others:
            yield f"{self.folder}: not read, as in transformers: {', '.join(others[:3])}{' ...' if others[3:] else ''}"

    def _has_a_head_of_its_own(self) -> bool:
        """Whether the files hold a head that is not the embedding, though it is tied; transformers uses that."""
        names = families.tied(self.config)
        if any(formats.found(name, self.entries) is None for name in names):
            return False
        import torch

        head, embedding = (formats.unpack(formats.read(name, self.entries, self.read)) for name in names)
        return head.shape != embedding.shape or not all(
            torch.equal(one.float(), other.float())
            for one, other in zip(head.split(2**14), embedding.split(2**14), strict=True)
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored. Raises ValueError if the model has no such tensor, its file ends too early, or its
        bytes are not those that were written."""
        tensor = self._made[name] if name in self._made else read_entry(name, self._entry(name))
        self._hold_against_checksum(name, tensor)
        return tensor

    def outline(self, name: str) -> torch.Tensor:
        """The same of small tensors; of others only type and shape, without bytes."""
        import torch

        entry = self._entry(name)
        if entry.nbytes <= _SMALL:
            return self.read(name)
        return torch.empty(entry.shape, dtype=getattr(torch, _TORCH[entry.dtype]), device="meta")

    def map(self, name: str) -> torch.Tensor:
        """The same from a private map of the file: bytes stay on disk until they are looked at, and processes that map
        one file share its memory. Writing to the tensor does not change the file."""
        import numpy as np
        import torch

        entry = self._entry(name)
        raw = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
        tensor = torch.from_numpy(raw).view(getattr(torch, _TORCH[entry.dtype])).view(entry.shape)
        self._hold_against_checksum(name, tensor)
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.folder} has no tensor {name}; its config.json promises one")
        return self.entries[name]

    def _hold_against_checksum(self, name: str, tensor: torch.Tensor) -> None:
        expected, entry = self._checksums.get(name), self.entries[name]
        if expected is not None and checksum(tensor) != expected:
            raise ValueError(
                f"{entry.file}: {name}, bytes {entry.start} to {entry.end}, is not what was written: its checksum is "
                f"{checksum(tensor)}, {CHECKSUMS} says {expected}. The file is damaged; if you changed it on purpose, "
                f"remove {CHECKSUMS}"
            )

    def fingerprint(self) -> str:
        """SHA-256 over config.json and every byte of every weight file, file by file."""
        digest = hashlib.sha256(json.dumps(self.config.said, sort_keys=True).encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(entry.nbytes for entry in self.entries.values())


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes. Several gigabytes a second, and any flipped bit changes it."""
    import torch

    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(memoryview(raw)):08x}"  # pyright: ignore[reportArgumentType]


def safetensors_bytes(folder: Path) -> int:
    """Bytes of all weight files of a model folder, headers included: what a budget on file size is held against."""
    return sum(path.stat().st_size for path in weight_files(folder)[0])


def header_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """An upper bound on the safetensors header entries of these (name, shape) pairs, offsets of up to 13 digits."""
    entry = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * 13
    return sum(entry + len(name) + len(",".join(map(str, shape))) for name, shape in tensors)
