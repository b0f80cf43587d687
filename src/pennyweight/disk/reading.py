"""The one way in for JSON and YAML files: whoever wrote them, they are bounded in size, checked against a type,
and wrong in one line."""

from __future__ import annotations

import functools
import json
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
MOST_BYTES = 64 * 2**20
_SHOWN = 60
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, _SHOWN, _SHOWN


class Said(BaseModel):
    """Of a JSON file what we read of it: types as they stand there, numbers that are numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def json_file(path: Path, kind: type[T], *, most_bytes: int = MOST_BYTES) -> T:
    """A JSON file as a `kind`: a pydantic model, a dataclass, or a type such as dict[str, str].

    Raises FileNotFoundError, or ValueError in one line: file, place, what came, what was expected."""
    return checked(path, _parsed(path, json.loads, "JSON", most_bytes), kind)


def yaml_file(path: Path, kind: type[T], *, most_bytes: int = 2**20) -> T:
    """The same for YAML; an empty file is an empty mapping."""
    import yaml

    # Its aliases let a few lines stand for gigabytes, so none are taken.
    loader = type("Plain", (yaml.SafeLoader,), {"compose_node": _without_aliases})
    return checked(path, _parsed(path, lambda text: yaml.load(text, loader) or {}, "YAML", most_bytes), kind)


def checked(path: Path, value: Any, kind: type[T]) -> T:
    """`value`, read from `path`, as a `kind`. Raises ValueError in one line."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as err:
        raise ValueError(f"{path}: {first_error(err)}") from err


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def first_error(err: ValidationError) -> str:
    """The first of a validation's errors in one line: where, what is wrong, what came."""
    first, count = err.errors(include_url=False)[0], err.error_count()
    where = ".".join(str(part)[:_SHOWN] for part in first["loc"])
    came = first["input"]
    came = _BRIEF.repr(came[:_SHOWN] if isinstance(came, bytes) else came)
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{where + ': ' if where else ''}{first['msg']}; found {came[:_SHOWN]}{more}"


def bytes_of(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All bytes of an ordinary file. Raises FileNotFoundError if there is nothing, ValueError if it is something else
    (a pipe would wait for ever) or larger than `most_bytes`."""
    size = size_of(path)
    if size > most_bytes:
        raise ValueError(f"{path} has {size} bytes; at most {most_bytes} are expected of such a file")
    return path.read_bytes()


def size_of(path: Path) -> int:
    """Bytes of an ordinary file. Raises FileNotFoundError, or ValueError for a folder, pipe, socket or device."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as err:  # a link to itself, a folder that may not be looked into
        raise ValueError(f"{path} cannot be opened: {err.strerror}") from err
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not an ordinary file")
    return found.st_size


def _parsed(path: Path, parse: Callable[[str], Any], language: str, most_bytes: int) -> Any:
    import yaml

    try:
        return parse(bytes_of(path, most_bytes).decode("utf-8-sig" if language == "JSON" else "utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as err:
        if isinstance(err, ValueError) and str(err).startswith(str(path)):
            raise
        said = " ".join((str(err) or type(err).__name__).split())
        raise ValueError(f"{path} is not {language}: {said[:200]}") from err


def _without_aliases(self: Any, parent: Any, index: Any) -> Any:
    import yaml

    if self.check_event(yaml.AliasEvent):
        raise yaml.YAMLError("aliases (*name) are not read")
    return yaml.SafeLoader.compose_node(self, parent, index)
