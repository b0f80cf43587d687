"""What a model has to serve, and what it may cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the model has to serve: `concurrency` sequences, each of `prompt` tokens, then `new` generated ones.

    `context` is how long a sequence may grow: memory is reserved for it. Times are for prompt and new tokens.
    """

    prompt: int = 256
    new: int = 128
    concurrency: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.context == 0:
            object.__setattr__(self, "context", self.prompt + self.new)
        if self.context < self.prompt + self.new:
            raise ValueError(f"context {self.context} is shorter than prompt {self.prompt} + new {self.new}")

    @property
    def mean_length(self) -> int:
        """Tokens in the cache at the middle of generation, where decode time is priced."""
        return self.prompt + self.new // 2


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds (lower for tokens_per_second); None means no bound.

    weight_bytes: tensors on disk. memory_bytes: weights + KV cache + work space. ttft_seconds: prompt to first token,
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
