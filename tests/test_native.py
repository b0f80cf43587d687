"""The native module, where a compiler was there to build it; everything else works without."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.mark.skipif(not BUILT, reason="the native module was not built: no C++ compiler at install time")
def test_wrong_arguments_are_python_errors():
    """Whatever comes in: no crash, nothing read or written out of bounds; benchmarks/asan.py brings sanitizers."""
    from pennyweight import _native as n

    def floats(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def linear(rows: int, columns: int) -> Any:
        made = n.Linear()
        made.add(n.Matrix.wide(floats(rows, columns).view(np.uint8), n.Float.float32))
        return made

    def model(context: int = 20, window: int = 0) -> Any:
        made = n.Model(n.Embedding(table), linear(7, 8), context)
        made.add(n.Attention(linear(16, 8), linear(8, 8), window=window, **heads))
        return made

    table = n.Matrix.wide(floats(7, 8).view(np.uint8), n.Float.float32)
    heads = {"heads": 1, "kv_heads": 1, "head_dim": 4, "value_dim": 8}
    most, codes, halves = 2**31 - 1, np.zeros((4, 32), np.uint8), np.zeros((4, 1), np.uint16)
    zigzag, symmetric = np.zeros(8 * 128, np.uint8), n.Scales.symmetric
    engine, empty, product = n.Engine(model(), n.Threads(1)), n.Linear(), n.Product(linear(7, 8), 1)
    engine.open(20)
    reader = n.Reader(512, 1)
    biased = linear(7, 8)
    biased.set_bias(floats(7))
    rows, logits = np.array([[0, 0, 1, 1, 0]], np.int32), floats(1, 7)
    wrong: list[Callable[[], object]] = [
        *(lambda count=count: n.Threads(count) for count in (0, -1, 1025, most, 2**40)),
        *(lambda count=count: n.Product(linear(7, 8), count) for count in (0, -1, 4096, most)),
        *(lambda count=count: n.Reader(512, count) for count in (0, -1, 4096)),
        lambda: n.Reader(-1, 1),
        lambda: n.Reader(0, 1),
        lambda: n.Product(empty, 1),
        lambda: n.Product(None, 1),
        lambda: n.Product(linear(7, 8), 1, "sse"),
        *(lambda part=part: reader.run(*part) for part in ((0, 1024), (256, 256), (-256, 256), (0, 511), (0, 256, 3))),
        lambda: product.run(floats(1, 7), floats(1, 7)),
        lambda: product.run(floats(1, 8), floats(2, 7)),
        lambda: product.run(floats(0, 8), floats(0, 7)),
        lambda: product.run(floats(513, 8), floats(513, 7)),
        lambda: product.run(floats(8), floats(7)),
        lambda: product.run(floats(2, 8), floats(4, 7)[::2]),
        lambda: product.run(floats(1, 8).astype(float), floats(1, 7)),
        lambda: product.run(floats(8, 2).T, floats(2, 7)),
        lambda: n.Matrix.wide(floats(0, 8).view(np.uint8), n.Float.float32),
        lambda: n.Matrix.wide(np.zeros((3, 0), np.uint8), n.Float.float32),
        lambda: n.Matrix.wide(np.zeros((3, 6), np.uint8), n.Float.float32),
        lambda: n.Matrix.wide(floats(3, 8), n.Float.float32),
        lambda: n.Matrix.wide(np.zeros((3, 8), np.uint8), 99),
        *(
            lambda cols=cols, bits=bits, group=group: n.Matrix.rows(codes, halves, None, cols, bits, group, False)
            for cols, bits, group in (
                *((-1, 8, 32), (0, 8, 32), (-most - 1, 8, -1), (most, 8, most), (33, 8, 33), (32, 8, 0), (32, 8, -32)),
                *(
                    (32, 0, 32),
                    (32, -8, 32),
                    (32, 2, 32),
                    (32, 7, 32),
                    (32, 16, 32),
                    (32, 8, 16),
                    (32, 8, 64),
                    (2**40, 8, 32),
                ),
            )
        ),
        lambda: n.Matrix.rows(codes, halves[:3], None, 32, 8, 32, False),
        lambda: n.Matrix.rows(codes, halves, halves[:3], 32, 8, 32, False),
        *(
            lambda size=size: n.Matrix.zigzag(zigzag, *size, symmetric)
            for size in (
                *((-1, 8, 128, 64), (128, -1, 128, 64), (128, 8, -128, 64), (128, 8, 0, 64), (128, 8, 128, 0)),
                *(
                    (128, 8, 128, -64),
                    (128, 8, 128, 16),
                    (most, most, 128, 64),
                    (128, 8, most - 127, 64),
                    (128, 9, 128, 64),
                ),
            )
        ),
        lambda: n.Matrix.zigzag(zigzag, 128, 8, 128, 64, symmetric, row_scale=floats(127)),
        lambda: n.Matrix.zigzag(zigzag, 128, 8, 128, 64, symmetric, order=np.array([0, 1, 2, 3, 4, 5, 6, 6], np.int32)),
        lambda: n.Matrix.zigzag(zigzag, 128, 8, 128, 64, symmetric, order=np.arange(1, 9, dtype=np.int32)),
        *(lambda row=row: table.row(row, floats(8)) for row in (-1, 7, most, 2**40)),
        lambda: table.row(0, floats(7)),
        lambda: table.set_importance(floats(7)),
        lambda: empty.add(None),
        lambda: biased.add(table),
        lambda: linear(7, 8).add(n.Matrix.wide(floats(7, 9).view(np.uint8), n.Float.float32)),
        lambda: linear(7, 8).set_bias(floats(8)),
        lambda: n.Embedding(None),
        lambda: n.Rotary(floats(3, 4), floats(4, 4)),
        lambda: n.Rotary(floats(3, 0), floats(3, 0)),
        lambda: n.Rotary(floats(3, 4), floats(3, 4)).extend(floats(3, 5), floats(3, 5)),
        *(lambda context=context: model(context) for context in (0, -1, most, 2**40)),
        lambda: n.Model(None, linear(7, 8), 20),
        lambda: n.Model(n.Embedding(table), empty, 20),
        lambda: n.Model(n.Embedding(table), linear(7, 8), 20, norm=floats(7)),
        lambda: model().add(None),
        lambda: model().state_bytes(-1),
        lambda: model().reserved_bytes(most),
        *(lambda window=window: model(window=window) for window in (-1, -(2**63), 2**64)),
        *(
            lambda name=name, value=value: n.Attention(linear(16, 8), linear(8, 8), **{**heads, name: value})
            for name in heads
            for value in (0, -1, 2**16, 2**30, most, 2**40)
        ),
        lambda: n.Engine(None, n.Threads(1)),
        lambda: n.Engine(model(), None),
        lambda: n.Engine(model(), n.Threads(1), "sse"),
        *(lambda capacity=capacity: engine.open(capacity) for capacity in (0, -1, 21, most, 2**40)),
        *(lambda number=number: engine.close(number) for number in (-1, 1, most)),
        *(lambda number=number: engine.trouble(number) for number in (-1, 1, most)),
        *(lambda part=part: engine.fill(*part) for part in ((0, -1), (0, 21), (1, 1), (-1, 1), (0, most))),
        *(lambda part=part: engine.copy(*part) for part in ((0, 0, -1), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0))),
        lambda: engine.can_go_back(-1, 0),
        *(
            lambda column=column, value=value: engine.step(_with(rows, column, value), logits)
            for column, value in ((0, -1), (0, 1), (0, most), (1, -1), (1, 1), (1, most), (2, -1), (2, 7), (2, most))
        ),
        lambda: engine.step(rows, floats(2, 7)),
        lambda: engine.step(rows, floats(1, 6)),
        lambda: engine.step(rows, floats(0, 7)),
        lambda: engine.step(rows[:0], floats(0, 7)),
        lambda: engine.step(rows[:, :4], logits),
        lambda: engine.step(rows.astype(np.int64), logits),
        lambda: engine.step(rows, logits.astype(float)),
        lambda: engine.step(np.zeros((513, 5), np.int32), floats(0, 7)),
    ]
    for number, call in enumerate(wrong):
        try:
            call()
        except (ValueError, TypeError):
            continue
        pytest.fail(f"call {number} was taken")
    engine.step(rows, logits)
    assert np.isfinite(logits).all()


def _with(rows: np.ndarray, column: int, value: int) -> np.ndarray:
    changed = rows.copy()
    changed[0, column] = value
    return changed


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
