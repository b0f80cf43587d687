"""One process at a time: locks that end with the process that holds them, `kill -9` included.

They are flock's, from the standard library. The package `filelock` has the same underneath, but does not say who holds
a lock, and where a file system has no flock it turns to files that outlive their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pennyweight.disk import reading
from pennyweight.runs.space import FULL

_MOST_BYTES = 4096


class _Holder(BaseModel):
    """What a lock file says of the process that holds it."""

    model_config = ConfigDict(frozen=True)

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Held(RuntimeError):
    """Another process holds the lock; the message says which one, since when and where."""


class Lock:
    """A folder's lock, held from the start until `close`, the end of its context, or that of the process."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is not there. Raises Held at once if somebody else holds it, RuntimeError if the
        folder cannot be made or locked."""
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as err:
            if err.errno in FULL:
                raise
            raise RuntimeError(f"cannot write to the run folder {folder}: {err}; choose another --run") from err
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said = _Holder(pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%d %H:%M:%S"))
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, said.model_dump_json().encode(), 0)
        except BlockingIOError as err:
            self.close()
            raise Held(f"{folder} is worked on by {_holder(path)}; the same command goes on after that") from err
        except OSError as err:
            self.close()
            if err.errno in FULL:
                raise
            raise RuntimeError(f"{path} cannot be locked: {err}; choose another --run") from err

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def _holder(path: Path) -> str:
    try:
        return str(reading.json_file(path, _Holder, most_bytes=_MOST_BYTES))
    except (OSError, ValueError):  # it has not said so yet, or is gone by now
        return "another process"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until nobody else is in such a context for `path`, a lock file beside what it guards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
