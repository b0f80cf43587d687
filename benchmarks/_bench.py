"""What all benchmark scripts share: the --quick flag, bars, the closing JSON line, optional data, kept results.

A script makes one claim. It prints what a reader wants to see, then one line of JSON, the last of its output, and
exits with 0 if every bar holds and 1 if one does not. With --quick it takes a smaller sample; costly numbers that a
full run kept are used again only as long as the code and the inputs they came from are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pennyweight.prices.measure import processor

REPOSITORY = Path(__file__).resolve().parents[1]
_BENCHMARKS = REPOSITORY / "benchmarks"
_PACKAGE = REPOSITORY / "src" / "pennyweight"
_NATIVE = REPOSITORY / "native"
_KEPT = _BENCHMARKS / ".cache"
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with --quick; a script adds its own options."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a smaller sample; may use numbers kept by a full run")
    return made


def machine() -> str:
    """Processor, cores and torch version in one line."""
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def bar(name: str, value: float, op: str, bound: float) -> dict[str, Any]:
    """The claim `value op bound`, and whether it holds; NaN fails every bar."""
    return {"name": name, "value": value, "op": op, "bar": bound, "ok": bool(_OPERATORS[op](value, bound))}


def finish(script: str, quick: bool, keys: dict[str, Any], bars: list[dict[str, Any]]) -> int:
    """Print the closing line; returns the exit code."""
    print(json.dumps({"script": script, "machine": machine(), "quick": quick, **keys, "bars": bars}), flush=True)
    return 0 if all(one["ok"] for one in bars) else 1


def skip(script: str, quick: bool, reason: str) -> int:
    """The closing line of a script that lacks what it needs: no bars, and the exit code of success."""
    return finish(script, quick, {"skipped": reason}, [])


def data_folder() -> Path | None:
    """The optional folder of books and test sets: $PENNY_DATA, else ../shared/data beside the repository, else None."""
    named = os.environ.get("PENNY_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def work_folder(name: str) -> Path:
    """A folder outside the repository for what a script makes once and keeps: $PENNY_CACHE/<name>, else in ~/.cache."""
    root = Path(os.environ.get("PENNY_CACHE", Path.home() / ".cache" / "pennyweight"))
    folder = root / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(script: str, inputs_hash: str) -> dict[str, Any] | None:
    """What `remember` kept for this script, or None if there is nothing or code or inputs have changed since."""
    path = _KEPT / f"{script}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept["result"] if kept["key"] == _key(script, inputs_hash) else None


def remember(script: str, inputs_hash: str, result: dict[str, Any]) -> None:
    """Keep the numbers of a full run for later --quick runs."""
    _KEPT.mkdir(exist_ok=True)
    (_KEPT / ".gitignore").write_text("*\n")
    path = _KEPT / f"{script}.json"
    partial = path.with_suffix(".partial")  # a run stopped while writing leaves the old file whole
    partial.write_text(json.dumps({"key": _key(script, inputs_hash), "result": result}, indent=1))
    partial.replace(path)


def _key(script: str, inputs_hash: str) -> str:
    """SHA-256 over the inputs, the script, its helpers and every file of the package and its native module."""
    own = (_BENCHMARKS / f"{script}.py", *sorted(_BENCHMARKS.glob("_*.py")))
    return hashlib.sha256(f"{inputs_hash} {_hash(own)} {package_hash()}".encode()).hexdigest()


def package_hash() -> str:
    """SHA-256 over every file of the package and of its native module."""
    files = (path for folder in (_PACKAGE, _NATIVE) for path in folder.rglob("*"))
    return _hash(sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts))


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"\n{path.relative_to(REPOSITORY)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()
