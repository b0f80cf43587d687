"""How fast a model runs here: time to first token, time per output token, and how far both are from what memory allows.

A token's time is bounded by the bytes that have to be read for it: every matrix once, and the keys and values so far.
The share of the measured read bandwidth says how good the engine is; the rest is overhead.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pennyweight.model.demand import Workload
from pennyweight.runtime.energy import energy_meter
from pennyweight.runtime.engine import Engine, Row


@dataclass(frozen=True)
class Speed:
    """Seconds: `ttft` from the prompts of all sequences to the first token of each, `tpot` for one token of every
    sequence; medians, and the 5th percentile, which is what the machine can do. `bytes_per_step`: of weights, keys and
    values, read for one token of every sequence. joules_per_token is None where it is not told."""

    prompt: int
    new: int
    concurrency: int
    threads: int
    kernels: str
    ttft: float
    tpot: float
    tpot_p05: float
    prefill_tokens_per_second: float
    tokens_per_second: float
    bytes_per_step: int
    peak_rss_bytes: int
    joules_per_token: float | None
    energy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Stepper:
    """An engine in the middle of a workload's answers, from which single decode steps can be timed."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine, length = engine, workload.mean_length
        self._sequences = [engine.open(length + 1) for _ in range(workload.concurrency)]
        for sequence in self._sequences:
            engine.fill(sequence, length)
        self._rows = [Row(sequence, length, 1, sparse=True) for sequence in self._sequences]

    def step(self) -> float:
        """Seconds of one token for every sequence. Each step writes over the last, so that all see the same length."""
        started = time.perf_counter()
        self._engine.step(self._rows).argmax(axis=-1)
        return time.perf_counter() - started

    def close(self) -> None:
        for sequence in self._sequences:
            self._engine.close(sequence)


def prefill_seconds(engine: Engine, workload: Workload, *, seed: int = 0) -> float:
    """Seconds from random prompts of all sequences to the first token of each."""
    sequences, _, seconds = _read_prompts(engine, workload, np.random.default_rng(seed))
    for sequence in sequences:
        engine.close(sequence)
    return seconds


def bench(engine: Engine, workload: Workload, *, repeats: int = 3, seed: int = 0) -> Speed:
    """Read random prompts and write `workload.new` tokens to each, `repeats` times. Raises ValueError if that exceeds
    the context."""
    prompt, new, together = workload.prompt, workload.new, workload.concurrency
    if prompt + new > engine.context:
        raise ValueError(f"a prompt of {prompt} and {new} new tokens; the model takes up to {engine.context} in all")
    rng = np.random.default_rng(seed)
    first, each, moved = [], [], []
    joules, energy = energy_meter()
    spent = 0.0
    for _ in range(repeats):
        sequences, tokens, seconds = _read_prompts(engine, workload, rng)
        first.append(seconds)
        before = joules() if joules else 0.0
        for i in range(new):
            rows = [Row(s, prompt + i, int(token), sparse=True) for s, token in zip(sequences, tokens, strict=True)]
            started = time.perf_counter()
            tokens = engine.step(rows).argmax(axis=-1)
            each.append(time.perf_counter() - started)
            moved.append(engine.bytes_read([prompt + i] * together))
        spent += joules() - before if joules else 0.0
        for sequence in sequences:
            engine.close(sequence)
    ttft, tpot = float(np.median(first)), float(np.median(each))
    return Speed(
        prompt=prompt,
        new=new,
        concurrency=together,
        threads=engine.threads,
        kernels=engine.kernels,
        ttft=ttft,
        tpot=tpot,
        tpot_p05=float(np.quantile(each, 0.05)),
        prefill_tokens_per_second=together * prompt / ttft,
        tokens_per_second=together / tpot,
        bytes_per_step=int(np.mean(moved)),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        joules_per_token=spent / (repeats * new * together) if joules else None,
        energy=energy,
    )


def _read_prompts(engine: Engine, workload: Workload, rng: np.random.Generator) -> tuple[list[int], np.ndarray, float]:
    """Open sequences that hold random prompts, with room for the answers; the first token of each; seconds it took."""
    sequences = [engine.open(workload.prompt + workload.new) for _ in range(workload.concurrency)]
    prompts = rng.integers(0, engine.vocab_size, (workload.concurrency, workload.prompt)).tolist()
    rows = [
        Row(sequence, i, token, i == workload.prompt - 1)
        for sequence, prompt in zip(sequences, prompts, strict=True)
        for i, token in enumerate(prompt)
    ]
    started = time.perf_counter()
    logits = [engine.step(rows[start : start + engine.max_rows]) for start in range(0, len(rows), engine.max_rows)]
    seconds = time.perf_counter() - started
    return sequences, np.concatenate(logits).argmax(axis=-1), seconds
