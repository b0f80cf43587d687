"""Devices as a few numbers: what a roofline needs to know of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device. Peak numbers are data-sheet or measured ones; the shares say how much of them real kernels reach.

    block_seconds is spent per block whatever its size (launches, dispatch). `source` says where the numbers are from.
    """

    name: str
    memory_bytes: int
    bandwidth: float  # bytes per second
    flops: float  # dense bfloat16 operations per second
    bandwidth_share: float = 0.7
    flops_share: float = 0.5
    block_seconds: float = 0.0
    source: str = ""

    @staticmethod
    def shipped() -> dict[str, Path]:
        return {path.stem: path for path in sorted((Path(__file__).parent / "machines").glob("*.json"))}

    @staticmethod
    def load(name_or_path: str) -> Machine:
        """A shipped description by name, or a JSON file. Raises ValueError if neither fits."""
        path = Machine.shipped().get(name_or_path, Path(name_or_path))
        if not path.is_file():
            raise ValueError(f"no machine {name_or_path!r}: give a JSON file or one of {', '.join(Machine.shipped())}")
        try:
            return Machine(**json.loads(path.read_text()))
        except (TypeError, json.JSONDecodeError) as err:
            raise ValueError(f"{path} is not a machine description: {err}") from err
