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
from typing import TYPE_CHECKING, Any

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
_MAX_HEADER = 100 * 2**20


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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder (or the file itself). Raises FileNotFoundError or ValueError."""
    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a model: expected a folder with config.json and *.safetensors "
            "(download it first: penny never reaches for a network)"
        )
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file; penny run, bench and serve take those, everything else takes a folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is not JSON: {err}") from err
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} has no model_type; it is not a transformers config")
    return config


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, checked against its size. Raises ValueError with the offset where it breaks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path}: header says {length} bytes but the file has {size}; truncated or not safetensors"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path}: header at byte 8 is not JSON ({err}); the file is damaged") from err
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header at byte 8 is no JSON object; the file is damaged")
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            (start, end), shape, _ = item["data_offsets"], tuple(item["shape"]), item["dtype"]
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path}: the header's entry for {name} lacks shape, dtype or offsets; damaged") from err
        if item["dtype"] not in _ITEM_BYTES:
            raise ValueError(f"{path}: {name} has dtype {item['dtype']}; supported are {', '.join(_ITEM_BYTES)}")
        if end - start != math.prod(shape) * _ITEM_BYTES[item["dtype"]] or not 0 <= start <= end:
            raise ValueError(f"{path}: {name} says shape {shape} {item['dtype']} but bytes {start} to {end}; damaged")
        if 8 + length + end > size:
            raise ValueError(f"{path}: {name} ends at byte {8 + length + end}, the file at {size}; it is truncated")
        entries[name] = Entry(path, item["dtype"], shape, 8 + length + start, 8 + length + end)
    return entries


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
    """A model folder, opened but not loaded: config and the place of every tensor."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError or ValueError if the folder is not a complete, undamaged model."""
        self.folder = folder
        self.config = read_config(folder)
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                named = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError) as err:
                raise ValueError(f"{index} is not a safetensors index: {err!r}") from err
            missing = sorted({file for file in named.values() if not (folder / file).is_file()})
            if missing:
                raise FileNotFoundError(
                    f"{folder}: the index names {missing[0]}, which is not there ({len(missing)} missing)"
                )
            files = [folder / file for file in sorted(set(named.values()))]
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no *.safetensors; convert other weights with save_pretrained first"
            )
        self.files = files
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries |= read_header(file)
        self._checksums = _read_checksums(folder / CHECKSUMS)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored. Raises ValueError if the model has no such tensor, its file ends too early, or its
        bytes are not those that were written."""
        tensor = read_entry(name, self._entry(name))
        self._hold_against_checksum(name, tensor)
        return tensor

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
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
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


def _read_checksums(path: Path) -> dict[str, str]:
    """Empty for folders of other makers. Raises ValueError if the file is there and damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no JSON: {err}; it is damaged") from err
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{path} is no list of checksums by tensor; it is damaged")
    return found


def safetensors_bytes(folder: Path) -> int:
    """Bytes of all weight files of a model folder, headers included: what a budget on file size is held against."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def header_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """An upper bound on the safetensors header entries of these (name, shape) pairs, offsets of up to 13 digits."""
    entry = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * 13
    return sum(entry + len(name) + len(",".join(map(str, shape))) for name, shape in tensors)
