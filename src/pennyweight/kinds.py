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


@functools.cache
def load(room: str, name: str) -> ModuleType:
    """The module of one thing. Raises ValueError, naming what there is, if the room has no such file."""
    if name not in names(room):
        raise ValueError(f"there is no {room} called {name!r}; there are: {', '.join(names(room))}")
    return importlib.import_module(f"pennyweight.{room}.{name}")
