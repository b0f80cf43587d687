"""Whatever a path names, as a source."""

from __future__ import annotations

from pathlib import Path

from pennyweight.sources.folder import Folder
from pennyweight.sources.gguf.file import is_gguf
from pennyweight.sources.gguf.source import GgufSource
from pennyweight.sources.source import Source


def open_source(path: Path, *, mapped: bool = False) -> Source:
    """A Hugging Face folder or a GGUF file. `mapped`: matrices that lie on disk as the engine reads them stay there.
    Raises FileNotFoundError or ValueError for what is neither, or damaged."""
    if is_gguf(path):
        return GgufSource(path, mapped=mapped)
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"{path} does not exist")
    return Folder(path, mapped=mapped)
