"""The native module, where a compiler was there to build it; everything else works without."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pennyweight.runtime import engine

BUILT = importlib.util.find_spec("pennyweight._native") is not None


@pytest.mark.skipif(not BUILT, reason="the native module was not built: no C++ compiler at install time")
def test_features_are_those_of_this_processor():
    from pennyweight import _native

    found = _native.cpu_features()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        assert set(found) <= set(flags.split())


def test_a_module_that_is_not_there_is_told_from_one_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "pennyweight._native", None)
    with pytest.raises(engine.NativeMissing, match="without a C"):
        engine.native_module()

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3foo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="undefined symbol") as caught:
        engine.native_module()
    assert not isinstance(caught.value, engine.NativeMissing)


def test_the_package_works_without_it():
    code = (
        "import sys; sys.modules['pennyweight._native'] = None\n"
        "import pennyweight, pennyweight.job.run, pennyweight.prices.planning, pennyweight.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
