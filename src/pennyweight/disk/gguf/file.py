"""Read GGUF files, versions 2 and 3: metadata and where each tensor lies.

Types and their sizes are the `gguf` package's. Its GGUFReader (0.19) is not used: of the 24 damaged files of
tests/test_gguf.py it takes 5, ends in an IndexError or KeyError for 5, and a list said to be longer than its file may
keep it busy for ever; it makes arrays of every string and number, 8.3 s and 490 MB for 150,000 tokens and their merges
where this takes 0.23 s and 24 MB; and it reads tensors from a map of the file, whose pages count as resident memory.
Here a file is believed only as far as it fits itself: every count against the bytes that are left, every tensor's place
against the tensors before it. The layout is told in the ggml project's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from pennyweight.disk.gguf import ggml
from pennyweight.disk.reading import size_of

MAGIC = b"GGUF"
_LISTS = {"tokens": str, "merges": str, "scores": np.floating, "token_type": np.integer}
"""What the lists of `tokenizer.ggml` hold."""
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: from byte `start` of the file; shape (rows, columns), or (columns,) for a vector."""

    name: str
    kind: ggml.Kind
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.columns * self.kind.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class File:
    """Header of a file. Metadata values are Python numbers, bools, strings; arrays are lists of strings or numpy."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value that is an int, float, bool, str or list (any array). Raises ValueError if it is there and
        of another kind, or if it is missing and there is no default."""
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray) and kind is list:
            value = value.tolist()
        if value is None:
            raise ValueError(f"{self.path}: the metadata lack {key}; the file is damaged or not a language model's")
        if type(value) is not kind:
            raise ValueError(f"{self.path}: {key} is {str(value)[:40]!r}; expected {kind.__name__}")
        return value

    def read(self, tensor: Tensor, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows `first` to `first + count` as stored, (count, row_bytes) uint8, by a plain read. Raises ValueError if
        the file has become shorter than its header said."""
        count = math.prod(tensor.shape[:-1]) - first if count is None else count
        start, expected = tensor.start + first * tensor.row_bytes, count * tensor.row_bytes
        raw = np.fromfile(self.path, np.uint8, expected, offset=start)
        if len(raw) != expected:
            raise ValueError(f"{self.path}: ended at byte {start + len(raw)}, inside {tensor.name}")
        return raw.reshape(count, tensor.row_bytes)

    def map(self, tensor: Tensor) -> np.ndarray:
        """A matrix (rows, row_bytes) uint8 where it lies in the file; writing to it does not change the file."""
        return np.memmap(self.path, np.uint8, "c", tensor.start, (tensor.shape[0], tensor.row_bytes))


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: a file that calls itself one, by name or by its first bytes, or the only one in
    a folder that has no config.json. None for anything else. Raises ValueError for a folder with several,
    FileNotFoundError for a name of such a file that is not there."""
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
        return files[0] if files else None
    if not path.is_file():
        if path.suffix == ".gguf" and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        return None
    with path.open("rb") as file:
        return path if path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC else None


def read(path: Path) -> File:
    """The header of a file. Raises ValueError with file, offset, what came and what was expected, for a file that is
    foreign, truncated, damaged, one of several, or holds tensors of a type that is not read."""
    size = size_of(path)
    if size < 24:
        raise ValueError(f"{path}: {size} bytes, the header alone has 24; truncated or not GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        header = _Header(path, view)
        tensor_count, metadata = header.metadata()
        if metadata.get("split.count", 0) not in (0, 1):
            raise ValueError(
                f"{path} is one of {metadata['split.count']} files of a model; join them first: "
                "llama-gguf-split --merge <the first file> <one file>.gguf"
            )
        return File(path, metadata, header.tensors(tensor_count, metadata.get("general.alignment", 32)))


class _Header:
    """Goes through the header from byte 0; `at` is where it stands."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.at = path, view, 0

    def wrong(self, at: int, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what} at byte {at}; the file is damaged")

    def metadata(self) -> tuple[int, dict[str, Any]]:
        """The number of tensors, and the metadata."""
        magic = self.view[:4]
        if magic != MAGIC:
            raise ValueError(f"{self.path}: begins with {magic!r}, not with {MAGIC!r}; it is not a GGUF file")
        self.at = 4
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(struct.pack("<I", version), "big") in _VERSIONS
            why = "it was written for a big-endian machine" if swapped else "versions 2 and 3 are read"
            raise ValueError(f"{self.path}: version {version} at byte 4; {why}")
        tensors = self.count("tensors", 8 + 4 + 8 + 4 + 8)
        out: dict[str, Any] = {}
        for _ in range(self.count("metadata entries", 8 + 4 + 1)):
            start = self.at
            key = self.string()
            if key in out:
                raise self.wrong(start, f"a second entry {key}")
            out[key] = self.value(self.number("I"), key)
            self.check_list(key, out[key], start)
        return tensors, out

    def check_list(self, key: str, value: Any, start: int) -> None:
        wanted = _LISTS.get(key.removeprefix("tokenizer.ggml."))
        if wanted is None or not key.startswith("tokenizer.ggml."):
            return
        texts = isinstance(value, list)
        if not texts and not isinstance(value, np.ndarray):
            raise self.wrong(start, f"{key}, which is no list,")
        if texts != (wanted is str) or not (texts or np.issubdtype(value.dtype, wanted)):
            raise self.wrong(start, f"{key}, a list of {'texts' if texts else value.dtype},")

    def tensors(self, count: int, alignment: Any) -> dict[str, Tensor]:
        """Tensors lie one after the other, each at the next multiple of the alignment: ggml refuses any other file."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}; expected a power of two")
        found: list[tuple[int, Tensor]] = []
        for _ in range(count):
            found.append(self.tensor())
        data, expected = -(-self.at // alignment) * alignment, 0
        out: dict[str, Tensor] = {}
        for at, tensor in found:
            if tensor.name in out:
                raise self.wrong(at, f"a second tensor {tensor.name}")
            if tensor.start != expected:
                raise self.wrong(at, f"{tensor.name} at {tensor.start} of the data instead of {expected},")
            end = data + tensor.start + tensor.nbytes
            if end > len(self.view):
                raise ValueError(
                    f"{self.path}: {tensor.name} ends at byte {end}, the file at {len(self.view)}; truncated"
                )
            expected = -(-(tensor.start + tensor.nbytes) // alignment) * alignment
            out[tensor.name] = Tensor(tensor.name, tensor.kind, tensor.shape, data + tensor.start)
        return out

    def tensor(self) -> tuple[int, Tensor]:
        """Where a tensor's entry stands, and the tensor, its start still counted from the first tensor."""
        start = self.at
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.wrong(start, f"{name} of {dimensions} dimensions (1 to {_MAX_DIMENSIONS} are possible)")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number = self.number("I")
        if number not in ggml.KINDS:
            came = next((kind.name for kind in GGMLQuantizationType if kind == number), "a type unknown to us")
            known = ", ".join(kind.name for kind in ggml.KINDS.values())
            raise ValueError(
                f"{self.path}: {name} is stored as {came} (type {number}, entry at byte {start}); types that are read: "
                f"{known}"
            )
        kind = ggml.KINDS[number]
        if math.prod(shape) < 1 or shape[-1] % kind.columns:
            raise self.wrong(start, f"{name} of shape {shape} in blocks of {kind.columns} ({kind.name})")
        return start, Tensor(name, kind, shape, self.number("Q"))

    def value(self, kind: int, key: str) -> Any:
        start = self.at - 4
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            raise self.wrong(start, f"{key} of type {kind} (0 to 12 exist)")
        kind = self.number("I")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(self.count(f"strings of {key}", 8))]
        if kind not in _NUMBERS:
            raise self.wrong(start + 4, f"{key}, an array of type {kind} (numbers and strings are possible)")
        dtype = np.dtype("<" + _NUMBERS[kind])
        nbytes = self.count(f"values of {key}", dtype.itemsize) * dtype.itemsize
        return np.frombuffer(self.take(nbytes), dtype)

    def count(self, what: str, least: int) -> int:
        """A count of things of at least so many bytes each."""
        start = self.at
        count = self.number("Q")
        if count * least > len(self.view) - self.at:
            raise self.wrong(start, f"{count} {what}, more than the rest of the file could hold,")
        return count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start = self.at
        raw = self.take(self.count("bytes of text", 1))
        try:
            return raw.decode()
        except UnicodeDecodeError as err:
            raise self.wrong(start, f"text that is not UTF-8 ({err.reason})") from err

    def take(self, nbytes: int) -> bytes:
        end = self.at + nbytes
        if end > len(self.view):
            raise ValueError(
                f"{self.path}: the header goes on at byte {self.at}, the file ends at {len(self.view)}; truncated"
            )
        self.at, start = end, self.at
        return self.view[start:end]
