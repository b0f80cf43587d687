"""Show a long job on a terminal: one bar per stage with time left; one line per stage where there is no terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pennyweight.units import show_seconds

_LINE_EVERY_S = 20.0


class Terminal:
    """A Listener that draws on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._lines = not self._console.is_terminal
        self._stage, self._total, self._first, self._began, self._last = "", 0, 0, 0.0, 0.0

    def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None:
        self._stage, self._total, self._first = stage, total, done
        self._began = self._last = time.monotonic()
        if self._lines:
            return
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(stage, total=total, completed=done, figures="")
        self._progress.start()

    def advance(self, done: int, **figures: float) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=done, figures=shown)
        elif time.monotonic() - self._last > _LINE_EVERY_S:
            self._last = time.monotonic()
            rate = (done - self._first) / (self._last - self._began)
            left = show_seconds((self._total - done) / rate) if rate > 0 else "?"
            print(f"{self._stage}: {done}/{self._total}, eta {left} {shown}".rstrip(), file=sys.stderr, flush=True)

    def end(self, note: str = "") -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        else:
            took = show_seconds(time.monotonic() - self._began)
            print(f"{self._stage}: done in {took} {note}".rstrip(), file=sys.stderr, flush=True)
