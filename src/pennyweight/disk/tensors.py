"""safetensors files: where each tensor lies, its bytes, its checksum.

Reading uses plain file reads, not memory maps: a map's pages count as resident memory, and a 2.5 GB model must be
worked on in less than that.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field, ValidationError

from pennyweight.disk import reading
from pennyweight.disk.reading import Said

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


class _Tensor(Said):
    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(max_length=8)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Header(Said):
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

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, _TORCH[self.dtype])


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

    out = torch.empty(entry.shape, dtype=entry.torch_dtype)
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


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes. Several gigabytes a second, and any flipped bit changes it."""
    import torch

    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(memoryview(raw)):08x}"  # pyright: ignore[reportArgumentType]


def header_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """An upper bound on the safetensors header entries of these (name, shape) pairs, offsets of up to 13 digits."""
    entry = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * 13
    return sum(entry + len(name) + len(",".join(map(str, shape))) for name, shape in tensors)
