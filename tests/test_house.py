"""The plan of the house: few rooms, no circles, nobody in another room's drawers, names of tensors in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pennyweight

ROOT = Path(pennyweight.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
BENCHMARKS = sorted((ROOT.parents[1] / "benchmarks").glob("*.py"))

KNOW_NAMES = ("families", "disk/gguf")
"""Rooms that may name tensors and modules of checkpoints."""

PATHS = re.compile(
    r"\bmodel\.(layers|embed_tokens|norm)\b|self_attn|lm_head|embed_tokens|\bmlp\.|_layernorm|linear_attn|linear_mlp"
    r"|[a-z]_proj\.(weight|bias)|[qk]_norm\.weight"
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of ours that a file imports, wherever in the file, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner == "pennyweight._native":  # compiled: it imports nothing of ours
                    continue
                yield (inner if inner in MODULES else node.module), node.lineno


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_module_imports_itself_by_a_detour():
    assert circles({name: {other for other, _ in imports(path)} for name, path in MODULES.items()}) == []


def test_no_room_imports_itself_by_a_detour():
    """Rooms are folders of the package; what only type checkers read does not count here."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name in ("pennyweight", "pennyweight.__main__"):
            continue
        room = name.split(".")[1]
        unread = {node.lineno for block in typing_blocks(path) for node in ast.walk(block) if hasattr(node, "lineno")}
        found = {other.split(".")[1] for other, line in imports(path) if "." in other and line not in unread}
        graph.setdefault(room, set()).update(found - {room})
    assert circles(graph) == []


def typing_blocks(path: Path) -> Iterator[ast.If]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nobody_imports_a_private_module_of_another_room(path):
    own = module_of(path).rpartition(".")[0] if path in FILES else ""
    if path.name == "__init__.py":
        own = module_of(path)
    foreign = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if any(part.startswith("_") and part != "__main__" for part in name.split(".")[1:])
        and name.rpartition(".")[0] != own
    ]
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_only_families_name_tensors_and_modules_of_checkpoints(path):
    if any(path.relative_to(ROOT).as_posix().startswith(room) for room in KNOW_NAMES):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    named = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and PATHS.search(node.value)
    ]
    assert not named


def test_few_rooms_and_fewer_single_modules():
    entries = [path for path in ROOT.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    singles = [path.name for path in entries if path.suffix == ".py"]
    rooms = [path.name for path in entries if path.is_dir()]
    assert len(singles) <= 8, singles
    assert len(singles) + len(rooms) <= 28, sorted(singles + rooms)
