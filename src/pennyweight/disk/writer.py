"""Model folders out, shard by shard: a folder that exists is a whole one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight import formats
from pennyweight.disk.checkpoint import CHECKSUMS
from pennyweight.disk.opened import copy_words
from pennyweight.disk.tensors import checksum

if TYPE_CHECKING:
    import torch


class Writer:
    """Writes a model folder shard by shard; `finish` makes it appear. Tensors are kept until a shard is full.

    `joins`: modules that hold several matrices on disk, and these (families.joined), whose parts may be put one's rows
    under another's. Checksums are of the parts."""

    def __init__(
        self, folder: Path, *, joins: Mapping[str, Sequence[str]] | None = None, shard_bytes: int = 2**28
    ) -> None:
        self.folder = folder
        self._joins = {part: (whole, tuple(parts)) for whole, parts in (joins or {}).items() for part in parts}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self.partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.checksums: dict[str, str] = {}
        self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.checksums[name] = checksum(tensor.detach().contiguous())
        module, _, suffix = name.rpartition(".")
        if module not in self._joins:
            self._add(name, tensor)
            return
        whole, parts = self._joins[module]
        waiting = self._waiting.setdefault(f"{whole}.{suffix}", {})
        waiting[module] = tensor.detach()
        if len(waiting) == len(parts):
            del self._waiting[f"{whole}.{suffix}"]
            self._add(f"{whole}.{suffix}", formats.joined_tensor(suffix, [waiting[part] for part in parts]))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        if (
            self.pending
            and sum(t.numel() * t.element_size() for t in self.pending.values()) + nbytes > self.shard_bytes
        ):
            self._flush()
        self.pending[name] = tensor.detach().contiguous()
        self.total += nbytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.pending, self.partial / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def finish(
        self, config: Mapping[str, Any], *, like: Path | None = None, files: Mapping[str, Any] | None = None
    ) -> Path:
        """Write config.json, the index, JSON `files`, and the tokenizer, templates and licences of the model `like`;
        then rename."""
        assert not self._waiting, f"parts of {sorted(self._waiting)} were not written"
        if self.pending:
            self._flush()
        count = len(self.shards)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            weight_map = {tensor: names[i] for i, shard in enumerate(self.shards) for tensor in shard}
            _write_json(
                self.partial / "model.safetensors.index.json",
                {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))},
            )
        for i, name in enumerate(names):
            (self.partial / f"shard-{i}").replace(self.partial / name)
        words = {} if like is None else copy_words(like, self.partial)
        for name, content in {**words, **(files or {})}.items():
            _write_json(self.partial / name, content)
        _write_json(self.partial / CHECKSUMS, self.checksums)
        _write_json(self.partial / "config.json", config)
        for path in self.partial.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that only their owner can read
                _sync(path)
        old = self.folder.with_name(self.folder.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)  # two renames: a kill between them leaves both, never neither
        self.partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return self.folder


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Write so that `path` holds either its old content or the whole new one, also across kill -9 and whoever else
    writes it at the same time."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would be in its own way
        raise
