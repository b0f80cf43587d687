"""How fast a model runs here: time to first token, time per output token, and how far both are from what memory allows.

A token's time is bounded by the bytes that have to be read for it: every matrix once, and the keys and values so far.
The share of the measured read bandwidth says how good the engine is; the rest is overhead.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.runtime.engine import Engine, Row


@dataclass(frozen=True)
class Speed:
    """Seconds; p05 is what the machine can do, p50 what it did. joules_per_token is None where it is not told."""

    prompt: int
    new: int
    threads: int
    kernels: str
    ttft_p50: float
    tpot_p05: float
    tpot_p50: float
    prefill_tokens_per_second: float
    tokens_per_second: float
    bytes_per_token: int
    peak_rss_bytes: int
    joules_per_token: float | None
    energy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(engine: Engine, *, prompt: int = 256, new: int = 128, repeats: int = 3, seed: int = 0) -> Speed:
    """Read a random prompt and write `new` tokens, `repeats` times. Raises ValueError if that exceeds the context."""
    if prompt < 1 or new < 1 or prompt + new > engine.context:
        raise ValueError(f"a prompt of {prompt} and {new} new tokens; the model takes up to {engine.context} in all")
    rng = np.random.default_rng(seed)
    first, each = [], []
    logits = np.empty((0, 0), np.float32)
    joules, energy = energy_meter()
    spent = 0.0
    for _ in range(repeats):
        ids = [int(i) for i in rng.integers(0, engine.vocab_size, prompt)]
        sequence = engine.open(prompt + new)
        started = time.perf_counter()
        for start in range(0, prompt, engine.max_rows):
            chunk = ids[start : start + engine.max_rows]
            rows = [Row(sequence, start + i, token, start + i == prompt - 1) for i, token in enumerate(chunk)]
            logits = engine.step(rows)
        first.append(time.perf_counter() - started)
        before = joules() if joules else 0.0
        for i in range(new):
            started = time.perf_counter()
            logits = engine.step([Row(sequence, prompt + i, int(logits[-1].argmax()), sparse=True)])
            each.append(time.perf_counter() - started)
        spent += joules() - before if joules else 0.0
        engine.close(sequence)
    tpot = float(np.median(each))
    return Speed(
        prompt=prompt,
        new=new,
        threads=engine.threads,
        kernels=engine.kernels,
        ttft_p50=float(np.median(first)),
        tpot_p05=float(np.quantile(each, 0.05)),
        tpot_p50=tpot,
        prefill_tokens_per_second=prompt / float(np.median(first)),
        tokens_per_second=1 / tpot,
        bytes_per_token=engine.bytes_read_per_token + engine.cache_bytes_of(prompt + new // 2),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        joules_per_token=spent / (repeats * new) if joules else None,
        energy=energy,
    )


def energy_meter(root: Path = Path("/sys/class/powercap")) -> tuple[Callable[[], float] | None, str]:
    """A function that tells joules used so far by the processor packages, and its source; or None and why not."""
    counters = [path / "energy_uj" for path in sorted(root.glob("*-rapl:?"))]
    if not counters:
        return None, "this machine has no RAPL counters"
    try:
        for counter in counters:
            counter.read_text()
    except PermissionError:
        return None, f"{counters[0]} may be read by root alone"
    return lambda: sum(int(counter.read_text()) for counter in counters) / 1e6, "RAPL, processor packages"
