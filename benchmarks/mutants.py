"""Tests that fail when the code is wrong: one operator, number or call of the maths is changed at a time.

A mutant is run in a fork of a process that has imported everything but this package and its tests, so that it costs
the tests that may see it and not the seconds that torch takes to be imported. Which these are is found out once: every
test of a room's files is run under a tracer, and a mutant is given to those that ran its line, the quickest first,
until one fails. It is killed if one does, if it cannot be imported, or if it takes far longer than the tests do.

Not changed: text, types, what is raised and told, constants of a module that are choices (but those of formats/, which
are on disk). Mutants that nothing can tell from the original are in mutants.toml, with the reason. Results are kept:
a killed mutant as long as its module is the same, a survivor as long as the tests of its room are, too.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import _bench

PACKAGE = _bench.REPOSITORY / "src" / "pennyweight"
GUARDS = {
    "judge": ("score", "assembled", "stats", "moments", "library"),
    "search": ("search",),
    "heal": ("heal", "library"),
    "prices": ("cost", "offers", "measure"),
    "variants": ("variants", "moments", "kinds", "slots", "sparsity"),
    "formats": ("formats", "kinds", "quantize", "zigzag"),
    "quantize": ("quantize", "moments", "formats"),
}
"""Files of tests, by what follows test_, of every room."""
AT_LEAST = 0.9
_SECONDS = 40.0  # of tests that a mutant is given, as they took under the tracer; what comes later does not guard it
_LOADED = ("torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers", "pydantic", "compressed_tensors")
_TOLD = ("listen", "executor", "progress")  # what is told of the work is not the work

_SWAPS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_NAMES = [("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("zeros", "ones"), ("ceil", "floor")]
_RENAMED = {a: b for pair in _NAMES for a, b in (pair, pair[::-1])} | {
    "clamp_min": "clamp_max",
    "clamp_max": "clamp_min",
}


@dataclass(frozen=True)
class Mutant:
    """One change of a module: `number` among its changes; `lines` of the statement that it is in."""

    module: str
    number: int
    where: str
    was: str
    becomes: str
    lines: range

    @property
    def name(self) -> str:
        return f"{self.module}:{self.lines.start} {self.where}: {self.was} -> {self.becomes}"


# ------------------------------------------------------------------------------------------------------ operators


def _edits(tree: ast.Module, *, constants: bool) -> Iterator[tuple[ast.AST, str, Callable[[], None], str, ast.stmt]]:
    """(node, function it is in, what changes it in place, the changed node in words, its statement) of all changes."""

    def visit(node: ast.AST, where: str, statement: ast.stmt, put: Callable[[ast.AST], None]) -> Iterator[Any]:
        if isinstance(node, ast.stmt):
            statement = node
        if _left_alone(node, where, constants):
            return
        for new in _changed(node):
            yield node, where, lambda put=put, new=new: put(new), ast.unparse(new), statement
        inside = f"{where}.{node.name}".lstrip(".") if isinstance(node, ast.FunctionDef | ast.ClassDef) else where
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment", "format_spec", "bases"):
                continue
            if isinstance(value, ast.AST):
                yield from visit(value, inside, statement, lambda new, n=node, f=name: setattr(n, f, new))
            elif isinstance(value, list):
                for i, each in enumerate(value):
                    if isinstance(each, ast.AST):
                        yield from visit(each, inside, statement, lambda new, v=value, i=i: v.__setitem__(i, new))

    body: list[Any] = tree.body
    for i, statement in enumerate(body):
        yield from visit(statement, "", statement, lambda new, i=i: body.__setitem__(i, new))


def _left_alone(node: ast.AST, where: str, constants: bool) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign | ast.AnnAssign) and not where and not constants:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return isinstance(target, ast.Name) and target.id.isupper()
    if isinstance(node, ast.Expr):
        root = node.value
        while isinstance(root, ast.Call | ast.Attribute):
            root = root.func if isinstance(root, ast.Call) else root.value
        return isinstance(root, ast.Constant) or (isinstance(root, ast.Name) and root.id in _TOLD)
    return False


def _changed(node: ast.AST) -> Iterator[Any]:
    """What a node may become."""

    def like(**fields: Any) -> Any:
        new = type(node)(**{**dict(ast.iter_fields(node)), **fields})
        return ast.copy_location(new, node)

    if isinstance(node, ast.BinOp | ast.AugAssign):
        if not any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in ast.walk(node)):
            yield from (like(op=other()) for other in _SWAPS.get(type(node.op), ()))
    elif isinstance(node, ast.BoolOp):
        yield from (like(op=other()) for other in _SWAPS[type(node.op)])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _SWAPS[type(op)]:
                yield like(ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield like(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield like(test=ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield like(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield like(value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield like(value=2 * node.value or 1.0)
    elif isinstance(node, ast.Name) and node.id in _RENAMED:
        yield like(id=_RENAMED[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in _RENAMED:
        yield like(attr=_RENAMED[node.attr])
    elif isinstance(node, ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.copy_location(ast.Pass(), node)


def _all_edits(module: str) -> tuple[ast.Module, list[Any]]:
    tree = ast.parse((PACKAGE / module).read_text())
    return tree, list(_edits(tree, constants=module.startswith("formats/")))


def mutants(module: str) -> list[Mutant]:
    found = []
    for number, (node, where, _, becomes, statement) in enumerate(_all_edits(module)[1]):
        body = getattr(statement, "body", None)  # of a statement that holds others, its head
        last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
        lines = range(statement.lineno, max(statement.lineno, last) + 1)
        found.append(Mutant(module, number, where, ast.unparse(node), becomes, lines))
    return found


class _Changed(SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports one module as a mutant says."""

    def __init__(self, mutant: Mutant) -> None:
        path = PACKAGE / mutant.module
        super().__init__(".".join(["pennyweight", *path.relative_to(PACKAGE).with_suffix("").parts]), str(path))
        self.name = self.name.removesuffix(".__init__")
        self._tree, edits = _all_edits(mutant.module)
        edits[mutant.number][2]()
        ast.fix_missing_locations(self._tree)

    def get_code(self, fullname: str) -> Any:
        return compile(self._tree, self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        inside = [str(Path(self.path).parent)] if self.path.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self, submodule_search_locations=inside
        )


# ---------------------------------------------------------------------------------------------------------- tests


class _Pico:
    """A plugin: the families between which everything occurs are enough, and small models that an earlier run of the
    tests made are taken from a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        conftest: Any = sys.modules["tests.conftest"]
        others = {*conftest.FAMILIES} - {*conftest.DISTINCT}
        items[:] = [item for item in items if not others & _texts(getattr(item, "callspec", None))]

    def pytest_collection_finish(self) -> None:
        conftest: Any = sys.modules["tests.conftest"]
        make = conftest._make

        def kept(model_type: str, changes: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
            digest = hashlib.sha256(repr((model_type, sorted(changes.items()))).encode()).hexdigest()[:16]
            known = self._folder / digest
            if not known.exists():
                partial = shutil.copytree(make(model_type, changes, tokenizer, folder), f"{known}.{os.getpid()}")
                Path(partial).rename(known)
                shutil.rmtree(folder)
            return Path(shutil.copytree(known, folder))

        conftest._make = kept


def _texts(call: Any) -> set[str]:
    return set() if call is None else {value for value in call.params.values() if isinstance(value, str)}


class _Tracer:
    """A plugin: which tests ran which lines of a room, by themselves or through a fixture, and their seconds."""

    def __init__(self, files: frozenset[str]) -> None:
        self._files, self._now, self._hit = files, {("import", "")}, {}
        self.fixtures: dict[str, set[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.failed: list[str] = []

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self._hit.setdefault((frame.f_code.co_filename, frame.f_lineno), set()).update(self._now)
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before, self._now = self._now, {("fixture", fixturedef.argname)}
        try:
            return (yield)
        finally:
            self._now = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self._now = {("test", item.nodeid)}
        for name in item.fixturenames:
            self.fixtures.setdefault(name, set()).add(item.nodeid)
        try:
            return (yield)
        finally:
            self._now = {("import", "")}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed += [report.nodeid] if report.failed else []

    def told(self) -> dict[str, Any]:
        lines: dict[tuple[str, int], set[str] | None] = {}
        for line, contexts in self._hit.items():
            tests = set()
            for kind, name in contexts:
                tests |= {name} if kind == "test" else self.fixtures.get(name, set()) if kind == "fixture" else set()
            lines[line] = None if ("import", "") in contexts else tests  # at import: all of them
        names = sorted(name for name in sys.modules if name.split(".")[0] in _LOADED)
        return {"lines": lines, "modules": names, "seconds": dict(self.seconds), "failed": self.failed}

    def __enter__(self) -> _Tracer:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)


def _files_of(room: str) -> list[str]:
    files = [f"tests/test_{name}.py" for name in GUARDS[room]]
    return [file for file in files if (_bench.REPOSITORY / file).exists()]


_BROKEN = 70


def _forked(run: Callable[[], Any], seconds: float) -> tuple[int | None, Any]:
    """(exit code, what was returned) of a function in a child of this process; a code of None if it took longer."""
    with tempfile.TemporaryDirectory(prefix="penny-mutants-") as folder:
        answer = Path(folder) / "answer"
        sys.stdout.flush()
        child = os.fork()
        if not child:
            code = _BROKEN
            try:
                os.setsid()
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
                os.environ["TMPDIR"] = tempfile.tempdir = folder
                os.chdir(_bench.REPOSITORY)
                for name in [name for name in sys.modules if name.split(".")[0] in ("pennyweight", "tests")]:
                    if name != "pennyweight._native":
                        del sys.modules[name]
                found = run()
                answer.write_bytes(pickle.dumps(found))
                code = 0
            finally:
                os._exit(code)
        until = time.monotonic() + seconds
        try:
            while True:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    return code, pickle.loads(answer.read_bytes()) if code == 0 else None
                if time.monotonic() > until:
                    return None, None
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "-o", "timeout=600"]


def traced(room: str, file: str, pico: Path) -> dict[str, Any]:
    """Which tests of a file ran which lines of a room, and their seconds. Raises RuntimeError if one fails as it is."""
    files = frozenset(str(path) for path in (PACKAGE / room).glob("*.py"))

    def run() -> dict[str, Any]:
        with _Tracer(files) as tracer:
            code = pytest.main([*_OPTIONS, file], plugins=[tracer, _Pico(pico)])
        return {**tracer.told(), "code": int(code)}

    code, told = _forked(run, 900)
    if not told or told["code"]:
        raise RuntimeError(f"{file} fails as the code is: {told and told['failed']} (exit {code})")
    return told


def _load(told: dict[str, Any]) -> None:
    """Import what tests import of others here, before the next fork."""
    for name in told["modules"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def judged(mutant: Mutant, told: dict[str, Any], pico: Path) -> str:
    """survived, killed, slow, or untested: no test runs its line."""
    path, every = str(PACKAGE / mutant.module), told["seconds"]
    runs: set[str] = set()
    for line in mutant.lines:
        runs |= told["lines"].get((path, line), set())
    tests, spent = [], 0.0
    for test in sorted(runs, key=lambda test: (every[test], test)):
        spent += every[test]
        if tests and spent > _SECONDS:
            break
        tests.append(test)
    if not tests:
        return "untested"

    def run() -> int:
        sys.meta_path.insert(0, _Changed(mutant))
        return int(pytest.main([*_OPTIONS, *tests], plugins=[_Pico(pico)]))

    code, answer = _forked(run, 30 + 4 * min(spent, _SECONDS))
    if code == _BROKEN:
        raise RuntimeError(f"{mutant.name}: pytest itself failed")
    return "slow" if code is None else "survived" if (code, answer) == (0, 0) else "killed"


# --------------------------------------------------------------------------------------------------------- results


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Kept:
    """Results of earlier runs, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[str, str] = dict(json.loads(line) for line in lines if line.endswith("]"))

    def keys(self, mutant: Mutant) -> tuple[str, str]:
        """Under which it is found when it was killed, and when it was not."""
        own = f"{_digest(PACKAGE / mutant.module)} {mutant.number} {mutant.name}"
        room = mutant.module.split("/")[0]
        return own, f"{own} {_digest(*(_bench.REPOSITORY / file for file in _files_of(room)))}"

    def get(self, mutant: Mutant) -> str | None:
        return next((self._found[key] for key in self.keys(mutant) if key in self._found), None)

    def put(self, mutant: Mutant, result: str) -> None:
        key = self.keys(mutant)[result in ("survived", "untested")]
        self._found[key] = result
        with self._path.open("a") as file:
            file.write(json.dumps([key, result]) + "\n")


def _equivalent() -> dict[tuple[str, str, str, str], str]:
    path = Path(__file__).with_suffix(".toml")
    listed = tomllib.loads(path.read_text())["mutant"]
    return {(each["module"], each["in"], each["was"], each["becomes"]): each["reason"] for each in listed}


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--rooms", default=",".join(GUARDS), help="comma-separated")
    parser.add_argument("--sample", type=int, help="so many, drawn by --seed; --quick: 42")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    arguments = parser.parse_args()
    started, work = time.monotonic(), _bench.work_folder("mutants")
    modules = [
        str(path.relative_to(PACKAGE))
        for room in arguments.rooms.split(",")
        for path in sorted((PACKAGE / room).glob("*.py"))
    ]
    everything = [mutant for module in modules for mutant in mutants(module)]
    listed = _equivalent()
    same = [(m, listed.get((m.module, m.where, m.was, m.becomes))) for m in everything]
    asked = [mutant for mutant, reason in same if reason is None]
    sample = arguments.sample or (42 if arguments.quick else None)
    if sample:
        asked = sorted(random.Random(arguments.seed).sample(asked, min(sample, len(asked))), key=everything.index)
    print(
        f"{len(everything)} mutants, {len(everything) - sum(r is None for _, r in same)} equivalent, {len(asked)} asked"
    )
    kept, results, left = Kept(work / "results.jsonl"), {}, 0
    (work / "pico").mkdir(exist_ok=True)
    traces: dict[str, Any] = {}
    for mutant in asked:
        found = kept.get(mutant)
        if found is None and arguments.minutes and time.monotonic() - started > 60 * arguments.minutes:
            left += 1
            continue
        if found is None:
            room = mutant.module.split("/")[0]
            if room not in traces:
                traces[room] = _trace_of(room, work)
            began = time.monotonic()
            found = judged(mutant, traces[room], work / "pico")
            kept.put(mutant, found)
            print(f"{found:9} {time.monotonic() - began:5.1f} s  {mutant.name}", flush=True)
        results[mutant.name] = found
    alive = [name for name, found in results.items() if found in ("survived", "untested")]
    for name in alive:
        print(f"alive: {name} ({results[name]})")
    share = 1 - len(alive) / len(results) if results else float("nan")
    rooms = {
        room: f"{sum(found not in ('survived', 'untested') for found in own)} of {len(own)}"
        for room in GUARDS
        if (own := [found for name, found in results.items() if name.startswith(f"{room}/")])
    }
    keys = {"mutants": len(everything), "judged": len(results), "left": left, "killed": rooms, "seed": arguments.seed}
    return _bench.finish("mutants", arguments.quick, keys, [_bench.bar("share killed", share, ">=", AT_LEAST)])


def _trace_of(room: str, work: Path) -> dict[str, Any]:
    """As it was kept, or made anew, of all files of tests of a room."""
    lines: dict[tuple[str, int], set[str]] = {}
    seconds: dict[str, float] = {}
    for file in _files_of(room):
        digest = _digest(*sorted((PACKAGE / room).glob("*.py")), _bench.REPOSITORY / file)
        path = work / f"trace-{room}-{Path(file).stem}-{digest}.pickle"
        if not path.exists():
            began = time.monotonic()
            path.write_bytes(pickle.dumps(traced(room, file, work / "pico")))
            print(f"{file} traced for {room} in {time.monotonic() - began:.0f} s", flush=True)
        told = pickle.loads(path.read_bytes())
        _load(told)
        seconds |= told["seconds"]
        for line, tests in told["lines"].items():
            lines.setdefault(line, set()).update(told["seconds"] if tests is None else tests)
    return {"lines": lines, "seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(main())
