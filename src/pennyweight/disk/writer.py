"""Model folders out, shard by shard: a folder that exists is a whole one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.disk.checkpoint import CHECKSUMS, checksum

if TYPE_CHECKING:
    import torch

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


class Writer:
    """Writes a model folder shard by shard; `finish` makes it appear. Tensors are kept until a shard is full."""

    def __init__(self, folder: Path, *, shard_bytes: int = 2**28) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.checksums: dict[str, str] = {}
        self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        if (
            self.pending
            and sum(t.numel() * t.element_size() for t in self.pending.values()) + nbytes > self.shard_bytes
        ):
            self._flush()
        self.pending[name] = tensor.detach().contiguous()
        self.checksums[name] = checksum(self.pending[name])
        self.total += nbytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.pending, self.partial / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def finish(
        self, config: Mapping[str, Any], *, like: Path | None = None, files: Mapping[str, Any] | None = None
    ) -> Path:
        """Write config.json, the index, JSON `files`, and tokenizer files copied from folder `like`; then rename."""
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
        for pattern in _COPIED if like else ():
            for source in like.glob(pattern):  # type: ignore[union-attr]
                if source.is_file():
                    shutil.copyfile(source, self.partial / source.name)
        for name, content in (files or {}).items():
            _write_json(self.partial / name, content)
        _write_json(self.partial / CHECKSUMS, self.checksums)
        _write_json(self.partial / "config.json", config)
        for path in self.partial.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            _sync(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.replace(self.folder)
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
