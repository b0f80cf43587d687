"""Devices as a few numbers: what a roofline needs to know of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from pennyweight.disk import reading

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Machine:
    """A device. Peak numbers are data-sheet or measured ones; the shares say how much of them real kernels reach.

    block_seconds is spent per block whatever its size (launches, dispatch). `source` says where the numbers are from.
    """

    name: str
    memory_bytes: Annotated[int, Field(gt=0)]
    bandwidth: _Positive  # bytes per second
    flops: _Positive  # dense bfloat16 operations per second
    bandwidth_share: _Share = 0.7
    flops_share: _Share = 0.5
    block_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
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
        return reading.json_file(path, Machine)
