"""data/models.yaml (recipes/models.yaml of the repository): real models that were tried, by the names they may be
typed by."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from pennyweight.disk import reading
from pennyweight.disk.reading import Said

_FILE = Path(__file__).parents[1] / "data" / "models.yaml"
_Word = Annotated[str, Field(min_length=1)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Measured(Said):
    """One number, and the document that has it."""

    model_config = ConfigDict(extra="forbid")

    what: _Word
    value: _Word
    machine: _Word
    where: Annotated[str, Field(pattern=r"^docs/(measurements|log)\.md$")]


class Tried(Said):
    """A model. `hub`: owner/name there. `packages`: of a package registry, in the order in which their largest files,
    one each, are joined to the GGUF file `file`, of so many `bytes` and this `sha256`."""

    model_config = ConfigDict(extra="forbid")

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    family: _Word
    parameters: Annotated[int, Field(ge=1)]
    licence: _Word
    file: Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    packages: Annotated[list[_Word], Field(min_length=1)]
    measured: list[Measured] = Field([])


@functools.cache
def models() -> dict[str, Tried]:
    """By name."""
    return reading.yaml_file(_FILE, dict[_Name, Tried])
