"""Whatever a path names, opened: a Hugging Face folder, a GGUF file, or a folder that holds one.

Everything but the engine asks here, so that commands need not know which of them they were given. The engine's way in
is runtime/sources/, which keeps codes and scales; here a quantised tensor of a GGUF file is the floats that it stands
for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pennyweight import families
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.gguf.file import gguf_of
from pennyweight.disk.model_config import read_config
from pennyweight.disk.reading import json_file
from pennyweight.disk.tensors import Entry
from pennyweight.disk.tokenizer import (
    GENERATION,
    Ends,
    Vocabulary,
    accompanying,
    added,
    load_tokenizer,
    read_generation_config,
)

if TYPE_CHECKING:
    import torch


class Readable(Protocol):
    """What Checkpoint and GgufCheckpoint have in common: config, and the place of every tensor."""

    path: Path
    config: families.Resolved
    entries: dict[str, Entry]
    notes: tuple[str, ...]

    @property
    def files(self) -> Sequence[Path]:
        """Those that hold the weights."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Of all tensors as they are stored, without headers."""
        ...

    def read(self, name: str) -> torch.Tensor: ...

    def outline(self, name: str) -> torch.Tensor:
        """The same of small tensors; of others only type and shape, without bytes."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of every byte of it that says what the model computes."""
        ...


def open_checkpoint(path: Path) -> Readable:
    """Raises FileNotFoundError or ValueError for what is not a complete, undamaged model."""
    if (file := gguf_of(path)) is None:
        return Checkpoint(path)
    from pennyweight.disk.gguf.checkpoint import GgufCheckpoint

    found = GgufCheckpoint(file)
    if found.rotary_divisors is not None:
        raise ValueError(
            f"{file}: its rotary frequencies are divided by a tensor, which a config.json has no word for; penny run, "
            "bench and serve take it, everything else takes the folder that it was made from"
        )
    return found


def open_config(path: Path) -> families.Resolved:
    """config.json, or the metadata that stand for it; no weights are read. Raises FileNotFoundError or ValueError."""
    if (file := gguf_of(path)) is None:
        return read_config(path)
    from pennyweight.disk.gguf.config import config_of
    from pennyweight.disk.gguf.file import read

    return families.resolved(config_of(read(file)), str(file))


def open_vocabulary(path: Path) -> Vocabulary:
    """Raises ValueError for a tokenizer that cannot be loaded without running code that lies beside it."""
    if (file := gguf_of(path)) is None:
        tokenizer, defaults = load_tokenizer(path), read_generation_config(path)
        stop = {tokenizer.eos_token_id, *defaults.ends, *json_file(path / "config.json", Ends).ends}
        return Vocabulary(tokenizer, tuple(added(tokenizer)[0]), frozenset(stop - {None}), defaults)
    from pennyweight.disk.gguf.file import read
    from pennyweight.disk.gguf.vocabulary import vocabulary

    return vocabulary(read(file), open_config(file)["vocab_size"])[0]


def generation_config(path: Path) -> Mapping[str, Any] | None:
    """generation_config.json, or what a folder made of a GGUF file would say there; None where a folder has none."""
    if gguf_of(path) is not None:
        return {"eos_token_id": sorted(open_vocabulary(path).stop)}
    return json_file(path / GENERATION, dict[str, Any]) if (path / GENERATION).exists() else None


def copy_words(path: Path, into: Path) -> dict[str, Mapping[str, Any]]:
    """Put into a folder what belongs to a model beside its config and weights: tokenizer, templates, licences. Returns
    the JSON files, by name, that are to be written beside them."""
    if gguf_of(path) is not None:
        open_vocabulary(path).tokenizer.save_pretrained(into)
        found = generation_config(path)
        return {} if found is None else {GENERATION: found}
    for name in accompanying(path):
        copy = into / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path / name, copy)
    return {}


def name_of(path: Path) -> str:
    """What a model is called: a GGUF file without its ending; a folder by its own name or that of the link to it, or as
    `owner/model` if a hub's cache keeps it under a hash (models--owner--model/snapshots/<hash>)."""
    if (file := gguf_of(path)) is not None:
        return file.stem
    *_, repository, snapshots, _ = ("", "", *path.resolve().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return Path(os.path.abspath(path)).name  # noqa: PTH100  resolve() would follow the link
