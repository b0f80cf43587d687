"""The run folder: what a long job has finished, kept so that it can be killed at any moment.

`run.sqlite` (WAL) holds small results and the names of files; `files/<sha256>` holds large ones, named by content. A
result is either there whole or not at all: a row carries the hash of its text, a file is held against its name, and
what is damaged or gone counts as not there, so that the job makes it again.

What the whole run stands on (its origin: model, tokenizer, text, versions) is the first entry; the same folder with
another origin is refused with the difference. Beyond that each stage keeps what it was made from beside its result
(`made_from`), and a result that was made from something else is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.disk import reading
from pennyweight.disk.places import hashes
from pennyweight.disk.writer import write_atomic
from pennyweight.runs import space

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[^/]*\.?partial")
_TABLE = "create table if not exists kept (key text primary key, value text not null, hash text not null)"


class Store:
    """Results by key. Keys are paths like `score/3/7.ffn`; values are JSON or files. One process at a time: the job
    holds the folder's lock (runs/lock.py)."""

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        """Open or create. Raises ValueError if it belongs to another run, RuntimeError if it cannot be read or
        written, OSError if the disk is full."""
        self.folder = folder
        self._whole: set[str] = set()
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "run.sqlite", isolation_level=None, timeout=30.0)
        except (OSError, sqlite3.Error) as err:
            raise self._failed(err) from err
        self._rows("pragma journal_mode=wal")
        # A killed job loses nothing. Without power the last results may be gone, never half there: they are made again,
        # which costs less than waiting for the disk after each of thousands.
        self._rows("pragma synchronous=normal")
        if (found := self._rows("pragma quick_check(1)")) != [("ok",)]:
            raise self._failed(sqlite3.DatabaseError(str(found[0][0])))
        if self._rows("select 1 from sqlite_master where name = 'results'"):
            raise ValueError(
                f"{folder} was begun with an earlier pennyweight; choose another --run folder or delete it"
            )
        self._rows(_TABLE)
        known, wanted = self.get("origin", dict[str, Any]), json.loads(json.dumps(origin))
        if known is None:
            self._rows("delete from kept")  # nobody could say what it was made from
            self.put("origin", wanted)
        elif known != wanted:
            self.close()
            raise ValueError(f"{folder} was begun with {_difference(known, wanted)}")
        self._sweep()

    @staticmethod
    def peek(folder: Path, key: str) -> Any:
        """The JSON value of a run folder that is not opened, nor made; None if there is none, or not as it was
        written."""
        path = folder / "run.sqlite"
        if not path.is_file():
            return None
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=30.0)) as db:
                found = db.execute("select value, hash from kept where key = ?", (key,)).fetchall()
        except sqlite3.Error:
            return None  # opening it says what is wrong
        return json.loads(found[0][0]) if found and found[0][1] == _hash(key, found[0][0]) else None

    def close(self) -> None:
        self._db.close()

    def _failed(self, err: Exception) -> Exception:
        if space.is_full(err):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "run.sqlite"))
        said = " ".join(str(err).split())
        return RuntimeError(f"cannot use the run folder {self.folder}: {said}; choose another --run or delete it")

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as err:
            raise self._failed(err) from err

    def get(self, key: str, kind: Any = Any) -> Any:
        """The JSON value as a `kind`, or None. A row or a file that is not as it was written is dropped and counts as
        not there. Raises ValueError, in one line, for a value of another kind."""
        found = self._rows("select value, hash from kept where key = ?", key)
        if not found:
            return None
        text, written = found[0]
        if written != _hash(key, text) or not self._holds(value := json.loads(text)):
            self._rows("delete from kept where key = ?", key)
            return None
        return value if kind is Any else reading.checked(self.folder / "run.sqlite", value, kind)

    def values(self, prefix: str, kind: Any = Any) -> dict[str, Any]:
        """The values of all keys that begin with `prefix`, each as a `kind`. Files are not looked at."""
        sql = "select key, value, hash from kept where key >= ? and key < ? order by key"
        rows = self._rows(sql, prefix, prefix + "\uffff")
        found = {key: json.loads(text) for key, text, written in rows if written == _hash(key, text)}
        return reading.checked(self.folder / "run.sqlite", found, dict[str, kind])

    def _holds(self, value: Any) -> bool:
        """Whether the file that a value names is there and whole; looked at once."""
        name = _file(value)
        if name is None or name in self._whole:
            return True
        path = self.folder / "files" / name
        if not _NAME.fullmatch(name) or not path.is_file() or path.is_symlink():
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != name:
                return False
        self._whole.add(name)
        return True

    def put(self, key: str, value: Any) -> None:
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, Any]) -> None:
        """Several at once: all of them are there afterwards, or none. Files that they replace are deleted."""
        earlier = [self._value(key) for key in values]
        rows = [(key, text, _hash(key, text)) for key, text in ((k, json.dumps(v)) for k, v in values.items())]
        try:
            with self._db:
                self._db.execute("begin")
                self._db.executemany("insert or replace into kept values (?, ?, ?)", rows)
        except sqlite3.Error as err:
            raise self._failed(err) from err
        for value in earlier:
            self._delete_unless_named(value)

    def keys(self, prefix: str) -> list[str]:
        """Those that begin with `prefix`, sorted."""
        sql = "select key from kept where key >= ? and key < ? order by key"
        return [row[0] for row in self._rows(sql, prefix, prefix + "\uffff")]

    def put_tensors(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors in a content-addressed safetensors file."""
        from safetensors.torch import save

        self.put_bytes(key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def put_bytes(self, key: str, content: bytes) -> None:
        name = hashlib.sha256(content).hexdigest()
        path = self.folder / "files" / name
        if not (path.is_file() and path.stat().st_size == len(content) and self._holds({"file": name})):
            write_atomic(path, content)
        self._whole.add(name)
        self.put(key, {"file": name})

    def path(self, key: str) -> Path | None:
        """The file kept under a key, or None."""
        name = _file(self.get(key))
        return None if name is None else self.folder / "files" / name

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """Raises RuntimeError if nothing is kept under the key, or nothing whole; its file is read to be sure."""
        from pennyweight.disk.tensors import read_entry, read_header

        self._whole.discard(_file(self._value(key)) or "")
        path = self.path(key)
        if path is None:
            raise RuntimeError(f"{key} is gone from {self.folder}, or damaged there; the same command makes it again")
        return {name: read_entry(name, entry) for name, entry in read_header(path).items()}

    def put_folder(self, key: str, folder: Path) -> None:
        """Remember what a finished folder holds, file by file."""
        self.put(key, {"folder": hashes(folder)})

    def folder_digests(self, key: str, folder: Path) -> dict[str, str] | None:
        """{file: SHA-256} of a folder that is still what it was when it was put; None otherwise."""
        kept = self.get(key, dict[str, dict[str, str]])
        if kept is None or not folder.is_dir() or hashes(folder) != kept.get("folder"):
            return None
        return kept["folder"]

    def made_from(self, stage: str, inputs: Mapping[str, Any], *results: str) -> bool:
        """Say what a stage is made from. If its `results` (as `drop` takes them) were made from something else they are
        dropped, and the answer is False; what stands on them has what they are made from among its own inputs."""
        wanted = json.loads(json.dumps(inputs))
        if self.get(f"inputs/{stage}") == wanted:
            return True
        for result in results:
            self.drop(result)
        self.put(f"inputs/{stage}", wanted)
        return False

    def knows_inputs(self, stage: str) -> bool:
        """Whether a stage was ever said to be made from anything."""
        return self.get(f"inputs/{stage}") is not None

    def drop(self, name: str) -> None:
        """Forget the result under a key, or all under keys that begin with `name` if it ends in a slash; files that
        nothing else names are deleted."""
        for key in self.keys(name) if name.endswith("/") else [name]:
            value = self._value(key)
            self._rows("delete from kept where key = ?", key)
            self._delete_unless_named(value)

    def _value(self, key: str) -> Any:
        """As it is, damaged or not."""
        found = self._rows("select value from kept where key = ?", key)
        try:
            return json.loads(found[0][0]) if found else None
        except ValueError:
            return None

    def _delete_unless_named(self, value: Any) -> None:
        name = _file(value)
        if name is None or not _NAME.fullmatch(name):
            return
        if not self._rows("select 1 from kept where value = ?", json.dumps({"file": name})):
            self._whole.discard(name)
            (self.folder / "files" / name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what a killed job left half written or unnamed. Other people's files are left alone."""
        named = {_file(self._value(key)) for key in self.keys("")}
        for path in (self.folder / "files").iterdir():
            if _TEMPORARY.fullmatch(path.name) or (_NAME.fullmatch(path.name) and path.name not in named):
                path.unlink()
        for path in self.folder.glob("*.partial"):  # folders that were being written
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def _file(value: Any) -> str | None:
    """The name of the file that a value stands for."""
    name = value.get("file") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def _hash(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()[:16]


def _difference(known: Any, wanted: Any, path: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for key in sorted(set(known) | set(wanted)):
            if known.get(key) != wanted.get(key):
                return _difference(known.get(key), wanted.get(key), f"{path} {key}".lstrip())
    return f"{path} {_short(known)}, now it is {_short(wanted)}; choose another --run folder, or go back to that"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
