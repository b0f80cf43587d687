"""Work files: tensors that a stopped job need not compute again, and could. Each carries a checksum, so that a damaged
one counts as one that is not there."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from pennyweight.disk.tensors import checksum, read_entry, read_header

_SUM = "checksum"
Tensors = dict[str, torch.Tensor]

_HASHED_AT_ONCE = 2**22


def keep(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a work file; it appears whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file({**plain, _SUM: torch.tensor(_sum(plain))}, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk it would be in its own way
        raise


def kept(path: Path) -> Tensors | None:
    """What a work file holds; None if it is not there, or not as it was written."""
    try:
        tensors = {name: read_entry(name, entry) for name, entry in read_header(path).items()}
    except (FileNotFoundError, ValueError):
        return None
    written = tensors.pop(_SUM, None)
    return tensors if written is not None and written.tolist() == _sum(tensors) else None


def needed(path: Path) -> Tensors:
    """The same of a file that must be there. Raises RuntimeError if it is not."""
    tensors = kept(path)
    if tensors is None:
        raise RuntimeError(f"{path} is gone or damaged; the same command makes it again")
    return tensors


class Remembered:
    """A folder of tensors that took long to compute, each file named by what it was computed from. `used`: names of the
    files that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[str] = []

    def of(
        self, source: torch.Tensor, how: str, make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What `make` would make of the floats `source`, in whatever type they are; `how` says all that it goes by
        beside them."""
        digest = hashlib.sha256(f"{how} {tuple(source.shape)} ".encode())
        for part in source.reshape(-1).split(_HASHED_AT_ONCE):
            digest.update(memoryview(part.float().numpy()))  # pyright: ignore[reportArgumentType]
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        self.used.append(path.name)
        found = kept(path)
        if found is None:
            found = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            keep(path, found)
        return found


def _sum(tensors: Mapping[str, torch.Tensor]) -> int:
    told = (f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} {checksum(tensors[name])}" for name in tensors)
    return zlib.crc32("\n".join(sorted(told)).encode())
