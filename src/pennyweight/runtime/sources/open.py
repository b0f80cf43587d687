"""Whatever a path names, as a source."""

from __future__ import annotations

from pathlib import Path

from pennyweight.disk.gguf.file import gguf_of
from pennyweight.runtime.sources.folder import Folder
from pennyweight.runtime.sources.gguf import GgufSource
from pennyweight.runtime.sources.source import Source


def open_source(path: Path, *, mapped: bool = False) -> Source:
    """A Hugging Face folder, a GGUF file, or a folder that holds one such file and no config.json. `mapped`: matrices
    that lie on disk as the engine reads them stay there. Raises FileNotFoundError or ValueError for what is neither, or
    damaged."""
    file = gguf_of(path)
    return Folder(path, mapped=mapped) if file is None else GgufSource(file, mapped=mapped)
