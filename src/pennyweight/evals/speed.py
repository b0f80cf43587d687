"""Time to first token and time per output token of a transformers model on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from pennyweight.cost import Workload


@dataclass(frozen=True)
class Speed:
    """Seconds. ttft: prompt of every sequence to first token. tpot: one decode step; p05 and median of `steps`."""

    ttft: float
    tpot: float
    tpot_p05: float
    steps: int


class Stepper:
    """A model in the middle of generation, from which single decode steps can be timed."""

    @torch.inference_mode()
    def __init__(self, model: Any, workload: Workload) -> None:
        self.model = model
        ids = torch.arange(workload.mean_length).remainder(model.config.vocab_size).repeat(workload.concurrency, 1)
        out = model(ids, use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds of one decode step. The cache is cut back, so that every step sees the same length."""
        started = time.perf_counter()
        out = self.model(self.next, past_key_values=self.cache, use_cache=True)
        out.logits[:, -1:].argmax(dim=-1)
        seconds = time.perf_counter() - started
        self.cache.crop(-1)
        return seconds


@torch.inference_mode()
def prefill_seconds(model: Any, workload: Workload) -> float:
    """Seconds of one prefill of all sequences."""
    ids = torch.arange(workload.prompt).remainder(model.config.vocab_size).repeat(workload.concurrency, 1)
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)
    return time.perf_counter() - started


def speed(model: Any, workload: Workload, *, steps: int = 40) -> Speed:
    """Warm up, then measure."""
    prefill_seconds(model, workload)
    ttft = min(prefill_seconds(model, workload) for _ in range(3))
    stepper = Stepper(model, workload)
    for _ in range(5):
        stepper.step()
    times = sorted(stepper.step() for _ in range(steps))
    return Speed(ttft, statistics.median(times), times[len(times) // 20], steps)
