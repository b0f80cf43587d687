"""How fast a model runs here: time to first token, time per output token, and how far both are from what memory allows.

A token's time is bounded by the bytes that have to be read for it: every matrix once, and the keys and values so far.
The share of the measured read bandwidth says how good the engine is; the rest is overhead.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
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
    values, read for one token of every sequence. `tokens_per_second` counts written tokens over the time of prompts and
    writing together, as a budget's throughput does; `writing_tokens_per_second` over that of writing alone.
    joules_per_token is None where it is not told."""

    prompt: int
    new: int
    concurrency: int
    threads: int
    kernels: str
    ttft: float
    tpot: float
    tpot_p05: float
    prefill_tokens_per_second: float
    writing_tokens_per_second: float
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
        run_rows(self._engine, self._rows)
        return time.perf_counter() - started

    def close(self) -> None:
        for sequence in self._sequences:
            self._engine.close(sequence)


def run_rows(engine: Engine, rows: Sequence[Row]) -> np.ndarray:
    """The likeliest token after each row that wants logits, in as many steps as so many rows take."""
    starts = range(0, len(rows), engine.max_rows)
    return np.concatenate([engine.step(rows[at : at + engine.max_rows]).argmax(axis=-1) for at in starts])


def prefill_seconds(engine: Engine, workload: Workload, *, seed: int = 0) -> float:
    """Seconds from random prompts of all sequences to the first token of each."""
    sequences, _, seconds = _read_prompts(engine, workload, np.random.default_rng(seed))
    for sequence in sequences:
        engine.close(sequence)
    return seconds


def bench(engine: Engine, workload: Workload, *, repeats: int = 3, seed: int = 0) -> Speed:
    """Read random prompts and write `workload.new` tokens to each, `repeats` times. Raises ValueError if that exceeds
    the context."""
    (found,) = bench_in_turn([engine], workload, repeats=repeats, seed=seed)
    return found


def bench_in_turn(engines: Sequence[Engine], workload: Workload, *, repeats: int = 3, seed: int = 0) -> list[Speed]:
    """The same of several engines, a repeat of each in turn: what else a machine does slows all of them alike."""
    prompt, new = workload.prompt, workload.new
    for engine in engines:
        if prompt + new > engine.context:
            raise ValueError(
                f"a prompt of {prompt} and {new} new tokens; the model takes up to {engine.context} in all"
            )
    timed = [_Timed(engine, workload, np.random.default_rng(seed)) for engine in engines]
    for _ in range(repeats):
        for one in timed:
            one.repeat()
    return [one.speed() for one in timed]


class _Timed:
    """An engine that answers a workload's prompts, and what that took so far."""

    def __init__(self, engine: Engine, workload: Workload, rng: np.random.Generator) -> None:
        self._engine, self._workload, self._rng = engine, workload, rng
        self._first, self._each, self._rates, self._moved = [], [], [], []
        self._joules, self._energy = energy_meter()
        self._spent = 0.0

    def repeat(self) -> None:
        prompt, new, together = self._workload.prompt, self._workload.new, self._workload.concurrency
        sequences, tokens, seconds = _read_prompts(self._engine, self._workload, self._rng)
        self._first.append(seconds)
        before = self._joules() if self._joules else 0.0
        each = []
        for i in range(new):
            rows = [Row(s, prompt + i, int(token), sparse=True) for s, token in zip(sequences, tokens, strict=True)]
            started = time.perf_counter()
            tokens = run_rows(self._engine, rows)
            each.append(time.perf_counter() - started)
            self._moved.append(self._engine.bytes_read([prompt + i] * together))
        self._spent += self._joules() - before if self._joules else 0.0
        for sequence in sequences:
            self._engine.close(sequence)
        self._each += each
        self._rates.append(together * new / (seconds + sum(each)))

    def speed(self) -> Speed:
        prompt, new, together = self._workload.prompt, self._workload.new, self._workload.concurrency
        ttft, tpot = float(np.median(self._first)), float(np.median(self._each))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Speed(
            prompt=prompt,
            new=new,
            concurrency=together,
            threads=self._engine.threads,
            kernels=self._engine.kernels,
            ttft=ttft,
            tpot=tpot,
            tpot_p05=float(np.quantile(self._each, 0.05)),
            prefill_tokens_per_second=together * prompt / ttft,
            writing_tokens_per_second=together / tpot,
            tokens_per_second=float(np.median(self._rates)),
            bytes_per_step=int(np.mean(self._moved)),
            peak_rss_bytes=peak * (1 if sys.platform == "darwin" else 1024),
            joules_per_token=self._spent / (len(self._first) * new * together) if self._joules else None,
            energy=self._energy,
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
    tokens = run_rows(engine, rows)
    return sequences, tokens, time.perf_counter() - started
