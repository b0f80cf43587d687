"""Whatever a path names, as a source."""

from __future__ import annotations

from pathlib import Path

from pennyweight.disk.model_config import CONFIG
from pennyweight.sources.folder import Folder
from pennyweight.sources.gguf.file import is_gguf
from pennyweight.sources.gguf.source import GgufSource
from pennyweight.sources.source import Source


def open_source(path: Path, *, mapped: bool = False) -> Source:
    """A Hugging Face folder, a GGUF file, or a folder that holds one such file and no config.json. `mapped`: matrices
    that lie on disk as the engine reads them stay there. Raises FileNotFoundError or ValueError for what is neither, or
    damaged."""
    if path.is_dir() and not (path / CONFIG).exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
        path = files[0] if files else path
    if is_gguf(path):
        return GgufSource(path, mapped=mapped)
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"{path} does not exist")
    return Folder(path, mapped=mapped)
