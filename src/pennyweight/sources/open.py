"""Whatever a path names, as a source."""

from __future__ import annotations

from pathlib import Path

from pennyweight.sources.folder import Folder
from pennyweight.sources.gguf.file import is_gguf
from pennyweight.sources.gguf.source import GgufSource
from pennyweight.sources.source import Source


def open_source(path: Path, *, mapped: bool = False) -> Source:
    """A Hugging Face folder, a GGUF file, or a folder that holds one and no config.json. `mapped`: matrices that lie on
    disk as the engine reads them stay there. Raises FileNotFoundError or ValueError for what is none, or damaged."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} GGUF files; name the one that is meant, such as {found[0]}")
        path = found[0] if found else path
    if is_gguf(path):
        return GgufSource(path, mapped=mapped)
    if path.suffix == ".gguf":
        raise FileNotFoundError(f"{path} does not exist")
    return Folder(path, mapped=mapped)
