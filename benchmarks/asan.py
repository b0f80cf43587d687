"""Run Python with sanitizers in the native module: `python benchmarks/asan.py -m pytest tests/test_native.py`.

The package is built with AddressSanitizer and UndefinedBehaviorSanitizer, once for every state of the sources, into a
folder of the cache, beside and not in what is installed. Every process that is started with `environment()` uses it:
the sanitizers are loaded before Python, and a sitecustomize.py takes finders of editable installs out of the way. The
first access out of bounds, or operation that is not defined, ends the process with a report.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _bench

_SITECUSTOMIZE = """\
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


def why_not() -> str | None:
    """What is missing for such a build, if anything is."""
    if not sys.platform.startswith("linux"):
        return "sanitizers are loaded into Python on Linux only"
    if shutil.which(_compiler()) is None:
        return f"no compiler {_compiler()}"
    missing = [name for name, path in _libraries().items() if path is None]
    return f"{_compiler()} has no {' and no '.join(missing)}" if missing else None


def environment() -> dict[str, str]:
    """This process's environment for Python commands with that module, which is built where it is not there yet. Raises
    RuntimeError with the reason where it cannot be."""
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    libraries = " ".join(str(path) for path in _libraries().values())
    # Python does not free everything it has; memory that is not there is answered by Python, not by the sanitizer.
    options = "detect_leaks=0:allocator_may_return_null=1"
    return {**os.environ, "PYTHONPATH": str(_built()), "LD_PRELOAD": libraries, "ASAN_OPTIONS": options}


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _libraries() -> dict[str, Path | None]:
    found: dict[str, Path | None] = {}
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(asked.stdout.strip())
        found[name] = path if path.is_absolute() else None
    return found


def _built() -> Path:
    """The folder that holds the package and sitecustomize.py."""
    root, digest = _bench.REPOSITORY, hashlib.sha256(_bench.package_hash().encode())
    for path in (root / "pyproject.toml", *sorted(path for path in (root / "native").rglob("*") if path.is_file())):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    out = _bench.work_folder("asan") / digest.hexdigest()[:16]
    if out.exists():
        return out
    print(f"building {out}", file=sys.stderr, flush=True)
    staged = out.with_suffix(".partial")
    shutil.rmtree(staged, ignore_errors=True)
    settings = ("-Ccmake.define.PENNY_SANITIZE=ON", f"-Cbuild-dir={staged.with_suffix('.build')}")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", staged, *settings)
    subprocess.run([*pip, root], check=True)
    if not list(staged.glob("pennyweight/_native*")):
        raise RuntimeError("the native module could not be built with sanitizers")
    (staged / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    shutil.rmtree(staged.with_suffix(".build"), ignore_errors=True)
    return staged.rename(out)


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    return subprocess.run([sys.executable, *sys.argv[1:]], env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
