"""A Hugging Face folder, opened: config.json, the place of every tensor, one tensor read at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pennyweight import families, formats
from pennyweight.disk import reading
from pennyweight.disk.model_config import read_config
from pennyweight.disk.reading import Said
from pennyweight.disk.tensors import Entry, checksum, read_entry, read_header

if TYPE_CHECKING:
    import torch

_SMALL = 64  # bytes
_MAX_INDEX = 32 * 2**20

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"

_Checksums = dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]]


class _Index(Said):
    weight_map: dict[str, str]


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
    names, tensors = shards(folder)
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{folder}: the index names {missing[0]}, which is not there ({len(missing)} missing)")
    for file in files:
        reading.size_of(file)
    return files, tensors


def shards(folder: Path) -> tuple[list[str], list[str]]:
    """The files that a folder's index names, whether they are there or not, and the tensors it promises. Raises
    ValueError for names of files elsewhere."""
    index = folder / INDEX
    named = reading.json_file(index, _Index, most_bytes=_MAX_INDEX).weight_map
    names = sorted(set(named.values()))
    for name in names:
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
            raise ValueError(f"{index} names {name[:60]!r}; shards lie in the folder itself")
    if not names:
        raise ValueError(f"{index} names no file")
    return names, list(named)


CHECKSUMS = "checksums.json"
"""Of folders that pennyweight wrote: the CRC-32 of every tensor's bytes, as eight hexadecimal digits by name."""


class Checkpoint:
    """A model folder, opened but not loaded: config and the place of every tensor. `notes`: what users should know of
    the files that it was not made of."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError or ValueError if the folder is not a complete, undamaged model."""
        self.path = folder
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
                f"{self.path}: {name} has shape {tuple(shape or entry.shape)}; config.json promises shape {promised}"
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
        others = [path.name for path in sorted(self.path.glob("*.safetensors")) if path.name not in read]
        if read == {WEIGHTS} and (self.path / INDEX).exists():
            others.append(INDEX)
        if others:
            yield f"{self.path}: not read, as in transformers: {', '.join(others[:3])}{' ...' if others[3:] else ''}"

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
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    def map(self, name: str) -> torch.Tensor:
        """The same from a private map of the file: bytes stay on disk until they are looked at, and processes that map
        one file share its memory. Writing to the tensor does not change the file."""
        import numpy as np
        import torch

        entry = self._entry(name)
        raw = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.nbytes,))
        tensor = torch.from_numpy(raw).view(entry.torch_dtype).view(entry.shape)
        self._hold_against_checksum(name, tensor)
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.path} has no tensor {name}; its config.json promises one")
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


def safetensors_bytes(folder: Path) -> int:
    """Bytes of all weight files of a model folder, headers included: what a budget on file size is held against."""
    return sum(path.stat().st_size for path in weight_files(folder)[0])
