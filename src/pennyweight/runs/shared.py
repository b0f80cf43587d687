"""What several runs know together: a JSON file of one mapping that each of them adds to, none erasing another's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from pennyweight.disk import reading
from pennyweight.disk.writer import write_atomic
from pennyweight.runs.lock import alone

T = TypeVar("T")


class Shared(Generic[T]):
    """A file {key: value} of one type of values."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path, self._kind = path, kind

    def read(self) -> dict[str, T]:
        """All that is known. Raises ValueError in one line for a file that is something else."""
        if not self.path.exists():
            return {}
        try:
            return reading.json_file(self.path, dict[str, self._kind])  # type: ignore[name-defined]
        except ValueError as err:
            raise ValueError(f"{err}; remove the file, and what it held is measured again") from err

    def add(self, found: Mapping[str, T], *, forget: str | None = None) -> dict[str, T]:
        """Put entries in, after those whose key begins with `forget` were taken out, and return all that is known. Who
        found something first is right, so that everybody goes by the same; others that do this are waited for."""
        with alone(self.path.with_name(self.path.name + ".lock")):
            earlier = {k: v for k, v in self.read().items() if forget is None or not k.startswith(forget)}
            known = {**found, **earlier}
            raw = TypeAdapter(dict[str, self._kind]).dump_json(known, indent=1)  # type: ignore[name-defined]
            write_atomic(self.path, raw)
            return known
