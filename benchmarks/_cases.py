"""How a case of a fault runs: in a process of its own, with limits of time and memory, so that a hang or a crash is a
result like any other.

The processes are forked from one that has imported everything, so `penny` starts in milliseconds instead of seconds.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}
_MOST = 2**30
"""Bytes that a command may take beyond what its process was forked with."""


def case(row: str) -> Callable[[Case], Case]:
    """Register a case under what the fault was."""

    def keep(function: Case) -> Case:
        CASES[row] = function
        return function

    return keep


@dataclass(frozen=True)
class Said:
    """How a command ended: exit code (negative: the signal), what it wrote, seconds, peak bytes beyond its start's."""

    code: int
    out: str
    err: str
    seconds: float
    grown: int

    @property
    def said(self) -> str:
        told = (self.err or self.out)[-300:]
        return f"exit {self.code} after {self.seconds:.1f} s, {self.grown >> 20} MiB more; {told!r}"


def prepare() -> None:
    """Import what commands need. Nothing here may start threads, nor say how many torch has: forked children would miss
    them."""
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    # A run folder remembers it, and commands that are started, not forked, have to agree.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    import pennyweight.cli
    import pennyweight.job.run
    import pennyweight.runtime.engine
    import pennyweight.runtime.model  # noqa: F401


def penny(*arguments: Any, stdin: str | bytes = "", seconds: float = 60, most: int = _MOST, **environment: str) -> Said:
    """One command. Killed at `seconds`; more memory than `most` fails the case."""
    from pennyweight import cli

    def run() -> None:
        os.environ.update(environment)
        sys.argv = ["penny", *map(str, arguments)]
        cli.main()

    raw = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin
    found = forked(run, stdin=raw, seconds=seconds)
    assert found.grown <= most, f"penny {arguments[0]} took too much memory: {found.said}"
    return found


def forked(run: Callable[[], None], *, stdin: bytes = b"", seconds: float = 60) -> Said:
    """A function as a process of its own: its exit code, output, time and memory."""
    with tempfile.TemporaryFile() as into, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        into.write(stdin)
        into.seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        started, base = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for number, file in enumerate((into, out, err)):
                    os.dup2(file.fileno(), number)
                # Not to be closed when the next process of this one puts its own there.
                sys.stdin = os.fdopen(0, "r", errors="surrogateescape", closefd=False)
                sys.stdout = os.fdopen(1, "w", errors="replace", closefd=False)
                sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                resource.setrlimit(
                    resource.RLIMIT_DATA, (base + 12 * 2**30, base + 12 * 2**30)
                )  # this machine goes on whatever comes
                run()
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        timer = _killer(child, seconds)
        _, status, used = os.wait4(child, 0)
        timer()
        out.seek(0)
        err.seek(0)
        said, told = (file.read().decode(errors="replace") for file in (out, err))
        spent = time.monotonic() - started
        return Said(os.waitstatus_to_exitcode(status), said, told, spent, used.ru_maxrss * 1024 - base)


def _killer(pid: int, seconds: float) -> Callable[[], None]:
    import threading

    timer = threading.Timer(seconds, lambda: os.kill(pid, signal.SIGKILL))
    timer.start()
    return timer.cancel


def refused(found: Said, *words: str, code: int = 2) -> None:
    """The command ended with one line that holds these words, and no traceback."""
    lines = [line for line in found.err.splitlines() if line.strip()]
    assert "Traceback" not in found.err + found.out, f"a traceback: {found.said}"
    assert found.code == code, f"expected exit {code}: {found.said}"
    told = [line for line in lines if line.startswith("penny:")]
    assert told, f"nothing was said: {found.said}"
    assert len(told[-1]) < 1500, f"{len(told[-1])} characters: {told[-1][:200]}"
    for word in words:
        assert word.lower() in told[-1].lower(), f"{word!r} is not in {told[-1]!r}"


def fine(found: Said) -> Said:
    assert found.code == 0 and "Traceback" not in found.err, f"expected success: {found.said}"
    return found


def inside(compute: Callable[[], Any], *, seconds: float = 60) -> Any:
    """What a function returns, computed in a process of its own. Raises AssertionError if it ends otherwise."""
    with tempfile.NamedTemporaryFile() as kept:

        def run() -> None:
            Path(kept.name).write_bytes(pickle.dumps(compute()))

        fine(forked(run, seconds=seconds))
        return pickle.loads(Path(kept.name).read_bytes())


def run_all(only: str = "") -> Iterator[tuple[str, str | None]]:
    """(row, None or what is wrong) of every case whose row contains `only`."""
    for row, function in CASES.items():
        if only not in row:
            continue
        with tempfile.TemporaryDirectory(prefix="penny-fault-") as folder:

            def run(function: Case = function, folder: str = folder) -> None:
                function(Path(folder))

            found = forked(run, seconds=240)
        lines = found.err.strip().splitlines()
        yield row, None if found.code == 0 else (lines[-1][:400] if lines else found.said)
