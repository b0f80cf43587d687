"""The run folder: what a long job has finished, kept so that it can be killed at any moment.

`run.sqlite` (WAL) holds small results and the names of files; `files/<sha256>` holds large ones, named by content. A
result is either there whole or not at all. The identity of a run (model, text, config) is its first entry; the same
folder with another identity is refused with the difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Store:
    """Results by key. Keys are paths like `score/3/7.ffn`; values are JSON or files."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open or create. Raises ValueError if it belongs to another run, RuntimeError if it cannot be written."""
        self.folder = folder
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "run.sqlite", isolation_level=None, timeout=30.0)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("create table if not exists results (key text primary key, value text not null)")
        except (OSError, sqlite3.Error) as err:
            raise RuntimeError(f"cannot write to the run folder {folder}: {err}; choose another --run") from err
        known = self.get("identity")
        wanted = json.loads(json.dumps(identity))
        if known is None:
            self.put("identity", wanted)
        elif known != wanted:
            self.close()
            raise ValueError(
                f"{folder} belongs to another run: {_difference(known, wanted)}. Choose another --run folder"
            )

    def close(self) -> None:
        self._db.close()

    def get(self, key: str) -> Any:
        """The JSON value, or None."""
        row = self._db.execute("select value from results where key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        try:
            self._db.execute("insert or replace into results values (?, ?)", (key, json.dumps(value)))
        except sqlite3.Error as err:
            raise RuntimeError(f"cannot write to {self.folder / 'run.sqlite'}: {err}") from err

    def keys(self, prefix: str) -> list[str]:
        rows = self._db.execute(
            "select key from results where key >= ? and key < ? order by key", (prefix, prefix + "\uffff")
        )
        return [row[0] for row in rows]

    def put_tensors(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors in a content-addressed safetensors file."""
        from safetensors.torch import save

        self.put_bytes(key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def put_bytes(self, key: str, content: bytes) -> None:
        name = hashlib.sha256(content).hexdigest()
        path = self.folder / "files" / name
        if not path.exists():
            from pennyweight.disk.writer import write_atomic

            write_atomic(path, content)
        self.put(key, {"file": name})

    def path(self, key: str) -> Path | None:
        """The file kept under a key, or None."""
        value = self.get(key)
        return None if value is None else self.folder / "files" / value["file"]

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """Raises KeyError if nothing is kept under the key, ValueError if its file is gone or damaged."""
        from pennyweight.disk.checkpoint import Entry, read_entry, read_header

        path = self.path(key)
        if path is None:
            raise KeyError(key)
        if not path.exists():
            raise ValueError(f"{path} ({key}) is gone; delete the run folder and start again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != path.name:
                raise ValueError(f"{path} ({key}) is damaged; delete the run folder and start again")
        entries: dict[str, Entry] = read_header(path)
        return {name: read_entry(name, entry) for name, entry in entries.items()}

    def drop(self, prefix: str) -> None:
        """Forget results, and delete files that nothing else names."""
        for key in self.keys(prefix):
            path = self.path(key) if isinstance(self.get(key), dict) and "file" in self.get(key) else None
            self._db.execute("delete from results where key = ?", (key,))
            if (
                path is not None
                and not self._db.execute(
                    "select 1 from results where value = ?", (json.dumps({"file": path.name}),)
                ).fetchone()
            ):
                path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Space left on the run folder's disk."""
        stat = os.statvfs(self.folder)
        return stat.f_bavail * stat.f_frsize


def _difference(known: Any, wanted: Any, path: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for key in sorted(set(known) | set(wanted)):
            if known.get(key) != wanted.get(key):
                return _difference(known.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {_short(known)}, now it is {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
