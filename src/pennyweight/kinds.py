"""The folder is the registry: `pennyweight/search/mip.py` is the search named "mip", and nothing else registers it."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parent


@functools.cache
def names(room: str) -> tuple[str, ...]:
    """Names of the things in a room, sorted; files that start with an underscore are the room's own helpers."""
    return tuple(sorted(path.stem for path in (_ROOT / room).glob("[!_]*.py")))


def load(room: str, name: str) -> ModuleType:
    """The module of one thing. Raises ValueError, naming what there is, if the room has no such file."""
    if name not in names(room):
        raise ValueError(f"there is no {room} called {name!r}; there are: {', '.join(names(room))}")
    return importlib.import_module(f"pennyweight.{room}.{name}")


def family_of(model_type: str) -> ModuleType:
    """The family whose MODEL_TYPES holds `model_type` (the key of config.json). Raises ValueError if none does."""
    known = {kind: name for name in names("families") for kind in load("families", name).MODEL_TYPES}
    if model_type not in known:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are: {', '.join(sorted(known))}. "
            "docs/adding.md shows how to add a family in one file"
        )
    return load("families", known[model_type])
