"""Room on disk: how much there is, how much is used, and a full disk as one error whoever met it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system calls a disk, or somebody's share of it, that takes no more."""

_SAID = re.compile(
    r"No space left on device|Disk quota exceeded|os error (28|122)\b"
    r"|\d+ requested and \d+ written"  # numpy, which keeps no errno
)
_SQLITE = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


@contextlib.contextmanager
def full_disk_is_one_error() -> Iterator[None]:
    """Whatever a library raises because the disk is full leaves as OSError with errno ENOSPC. Also a decorator."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, sqlite3.Error, SafetensorError) as err:
        if is_full(err):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), getattr(err, "filename", None)) from err
        raise


def is_full(err: Exception) -> bool:
    """Whether an error of a library means that the disk is full: SQLite has codes of its own; shutil, numpy and
    safetensors keep only words."""
    if isinstance(err, sqlite3.Error):
        return getattr(err, "sqlite_errorname", None) in _SQLITE
    return getattr(err, "errno", None) in FULL or _SAID.search(str(err)) is not None


def free_bytes(folder: Path) -> int:
    """Space left on the disk that a folder lies on, or would."""
    disk = _disk_of(folder)
    return disk.f_bavail * disk.f_frsize


def whole_bytes(folder: Path) -> int:
    """All that this disk holds."""
    disk = _disk_of(folder)
    return disk.f_blocks * disk.f_frsize


def _disk_of(folder: Path) -> os.statvfs_result:
    return os.statvfs(next(each for each in (folder, *folder.absolute().parents) if each.exists()))


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    files = (Path(base, name) for base, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files if not path.is_symlink())
