"""Tasks run here or on Ray, to the same results in the same order."""

from __future__ import annotations

import importlib.util

import pytest

from pennyweight import executor


def square(n: int) -> int:
    return n * n


def test_local_results_come_in_order():
    assert list(executor.run(square, [(n,) for n in range(5)])) == [0, 1, 4, 9, 16]


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="'dask' is unknown; there are local and ray"):
        executor.run(square, [], "dask")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed, so it cannot be missing")
def test_ray_missing_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"pip install 'pennyweight\[ray\]'"):
        list(executor.run(square, [(1,)], "ray"))


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'pennyweight[ray]'"
)
def test_ray_gives_the_same():
    assert list(executor.run(square, [(n,) for n in range(5)], "ray")) == [0, 1, 4, 9, 16]
