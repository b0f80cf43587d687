"""Tasks run here or on Ray, to the same results in the same order."""

from __future__ import annotations

import sys

import pytest

from pennyweight.config import FitConfig, merged
from pennyweight.job.gather import gather_stats, score_choices
from pennyweight.job.job import open_job
from pennyweight.runs import executor


def square(n: int) -> int:
    return n * n


def test_local_results_come_in_order():
    assert list(executor.run(square, [(n,) for n in range(5)])) == [0, 1, 4, 9, 16]


def test_tasks_here_say_how_far_they_are():
    heard: list[int] = []

    def task(n: int) -> int:
        executor.tick()
        executor.tick(n)
        return n

    assert list(executor.run(task, [(3,), (2,)], on_tick=heard.append)) == [3, 2]
    executor.tick(3)  # nobody listens between tasks
    assert heard == [1, 3, 1, 2]


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="'dask' is unknown; there are local and ray"):
        executor.run(square, [], "dask")  # type: ignore[arg-type]


def test_ray_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"pip install 'pennyweight\[ray\]'"):
        list(executor.run(square, [(1,)], "ray"))


@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")  # Ray's own
def test_ray_gives_the_same_statistics_and_scores_byte_for_byte(pico, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'pennyweight[ray]'")
    wanted = merged(
        FitConfig(),
        {
            "budget": {"weights": "50%"},
            "machine": "m2-max",
            "axes": ("noop", "ffn_width", "bits"),
            "data": {"context": 32, "calibration_rows": 4, "score_rows": 4, "rows_per_chunk": 2},
        },
    )
    found = []
    try:
        for engine in ("local", "ray"):
            with open_job(pico("qwen3"), tmp_path / engine, wanted, where=engine) as job:
                gather_stats(job)
                score_choices(job)
                statistics = {key: job.store.path(key).read_bytes() for key in job.store.keys("stats/")}
                found.append((statistics, job.store.values("score/")))
    finally:
        ray.shutdown()
    (local_statistics, local_scores), (ray_statistics, ray_scores) = found
    assert len(local_statistics) == 3
    assert ray_statistics == local_statistics
    assert ray_scores == local_scores
