"""Show a long job on a terminal: one bar per stage with time left; one line per stage where there is no terminal."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from pennyweight.units import show_seconds

_LINE_EVERY_S = 20.0


class Terminal:
    """A Listener that draws on stderr. As a context manager it leaves no half-drawn bar behind a stopped job."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._lines = not self._console.is_terminal
        self._stage, self._unit, self._total, self._first, self._began, self._last = "", "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None:
        self._stage, self._unit, self._total, self._first = stage, unit, total, done
        self._began = self._last = time.monotonic()
        self._stop()
        if self._lines:
            return
        self._progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn(unit),
            _Time(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(stage, total=total, completed=done, figures="", ended="")
        self._progress.start()

    def advance(self, done: int, **figures: float) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=done, figures=shown)
        elif time.monotonic() - self._last > _LINE_EVERY_S:
            self._last = time.monotonic()
            rate = (done - self._first) / (self._last - self._began)
            left = _left((self._total - done) / rate if rate > 0 else None, done >= self._total)
            counted = f"{done}/{self._total} {self._unit}".rstrip()
            print(f"{self._stage}: {counted}, {left} {shown}".rstrip(), file=sys.stderr, flush=True)

    def end(self, note: str = "") -> None:
        ended = self._ended(note)
        if self._progress is not None:
            self._progress.update(self._task, ended=ended)
            self._stop()
        else:
            print(f"{self._stage}: {ended}", file=sys.stderr, flush=True)

    def _ended(self, note: str) -> str:
        """What took how long, and what an earlier call had done already."""
        if self._first >= self._total:
            return "nothing left to do"
        said = f"done in {show_seconds(time.monotonic() - self._began)}"
        if self._first:
            said += f", {self._first} before"
        return f"{said}, {note}" if note else said

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Time(ProgressColumn):
    """Time so far and time left; once a stage has ended, what it took."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        if task.fields["ended"]:
            return Text(task.fields["ended"])
        left = _left(task.time_remaining, task.finished)
        return Text(f"{timedelta(seconds=int(task.elapsed or 0))} {left}")


def _left(seconds: float | None, counted: bool) -> str:
    """In words; `counted`: all that is counted is done, and what follows it is not."""
    if counted:
        return "finishing"
    if seconds is None:
        return "eta ?"
    return f"eta {show_seconds(seconds)}" if seconds >= 1 else "eta under 1 s"
