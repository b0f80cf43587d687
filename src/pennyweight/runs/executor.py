"""Where independent tasks run: in this process, or on Ray. Same tasks, same results, byte for byte."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

Where = Literal["local", "ray"]


_on_tick: Callable[[float], None] | None = None  # while a task runs in this process


def tick(steps: float = 1) -> None:
    """Called by a task that takes long: so many more of its steps are done. Heard where tasks run in this process."""
    if _on_tick is not None:
        _on_tick(steps)


def run(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    where: Where = "local",
    *,
    on_tick: Callable[[float], None] | None = None,
) -> Iterator[Any]:
    """function(*task) for every task, results in the order of tasks as they become ready.

    Tasks must be pure functions of picklable arguments. With Ray the run and model folders must be visible to all
    workers. `on_tick` hears the running task's `tick`s. Raises ValueError for an unknown engine, RuntimeError if Ray is
    asked for and not installed.
    """
    return _local(function, tasks, on_tick) if named(where) == "local" else _ray(function, tasks)


def named(where: str) -> Where:
    """Raises ValueError for an engine that is unknown."""
    for known in get_args(Where):
        if where == known:
            return known
    raise ValueError(f"engine {where!r} is unknown; there are {' and '.join(get_args(Where))}")


def _local(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], on_tick: Callable[[float], None] | None
) -> Iterator[Any]:
    global _on_tick
    for task in tasks:
        _on_tick = on_tick
        try:
            result = function(*task)
        finally:
            _on_tick = None
        yield result


def _ray(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as err:
        raise RuntimeError("--engine ray needs the extra: pip install 'pennyweight[ray]'") from err
    import torch

    threads = torch.get_num_threads()  # sums depend on the split among threads: workers use the same
    if not ray.is_initialized():  # a user's own cluster is joined by `ray.init` before, or by RAY_ADDRESS
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
        os.environ.setdefault("RAY_worker_niceness", "0")  # as the local engine; Ray's 15 starves beside other work
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def call(*task: Any) -> Any:
        import torch

        torch.set_num_threads(threads)
        return function(*task)

    remote = ray.remote(max_retries=2)(call)
    for reference in [remote.remote(*task) for task in tasks]:
        yield ray.get(reference)
