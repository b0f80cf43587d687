"""What a long job tells while it runs. The library reports; only the command line draws or prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Listener(Protocol):
    """Told about one stage at a time. `done` and `total` count `unit`s, those done by an earlier call included; figures
    are named numbers worth showing, `note` a word on how the stage ended."""

    def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None: ...

    def advance(self, done: int, **figures: float) -> None: ...

    def end(self, note: str = "") -> None: ...


class Silent:
    """Listens and says nothing: the default of the Python interface."""

    def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None:
        pass

    def advance(self, done: int, **figures: float) -> None:
        pass

    def end(self, note: str = "") -> None:
        pass


@contextlib.contextmanager
def waiting(listen: Listener, stage: str) -> Iterator[None]:
    """A stage that cannot tell how far it is: named while it lasts."""
    listen.begin(stage, total=1)
    yield
    listen.advance(1)
    listen.end()
