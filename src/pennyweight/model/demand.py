"""What a model has to serve, and what it may cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

Cache = Literal["float16", "int8", "float32"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the model has to serve: `concurrency` sequences, each of `prompt` tokens, then `new` generated ones.

    `context` is how long a sequence may grow: memory is reserved for it. Times are for prompt and new tokens. `cache`:
    how the engine keeps keys and values.
    """

    prompt: int = 256
    new: int = 128
    concurrency: int = 1
    context: int = 0
    cache: Cache = "float16"

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context == 0:
            object.__setattr__(self, "context", self.prompt + self.new)
        if self.context < self.prompt + self.new:
            raise ValueError(f"context {self.context} is shorter than prompt {self.prompt} + new {self.new}")
        if self.cache not in get_args(Cache):
            raise ValueError(f"keys and values cannot be kept in {self.cache!r}; {', '.join(get_args(Cache))}")

    @property
    def mean_length(self) -> int:
        """Tokens in the cache at the middle of generation, where decode time is priced."""
        return self.prompt + self.new // 2


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds (lower for tokens_per_second); None means no bound.

    weight_bytes: tensors on disk. memory_bytes: weights + KV cache + work space, as the native engine takes
    them. ttft_seconds: prompt to first token,
    all sequences prefilled together. tpot_seconds: one decode step. tokens_per_second: generated tokens over prefill
    plus decode time, all sequences together.
    """

    weight_bytes: int | None = None
    memory_bytes: int | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        for name, bound in dataclasses.asdict(self).items():
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} is {bound}; a bound must be above 0")

    def bounds(self) -> dict[str, float]:
        return {name: bound for name, bound in dataclasses.asdict(self).items() if bound is not None}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A workload that a model has to serve beside its first one, with bounds of its own. Its sequences run together as
    many as it says, under a bound on throughput too."""

    workload: Workload
    budget: Budget

    def __str__(self) -> str:
        w = self.workload
        together = f", {w.concurrency} at once" if w.concurrency > 1 else ""
        return f"prompts of {w.prompt} and {w.new} new tokens{together}"


def batches(budget: Budget, workload: Workload) -> tuple[Workload, ...]:
    """The workloads that may meet a budget, fewest sequences at once first. Under a bound on throughput `concurrency`
    is the most that may run at once, and every power of two below it is tried too: what is lighter affords more, what
    is heavier may be fast enough with fewer. Otherwise it is what was asked for."""
    most = workload.concurrency
    if budget.tokens_per_second is None:
        return (workload,)
    grid = sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})
    return tuple(dataclasses.replace(workload, concurrency=concurrency) for concurrency in grid)
