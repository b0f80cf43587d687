"""Keys and values in 8 bits (`--cache int8`) stay as near to float16 as a cache may, and cost no time.

Real models read text that the standard library holds out (texts.py), token after token seeing the cache's own keys and
values: KL to the same engine with a float16 cache, and how often both put the same token first. Qwen2.5-Coder-1.5B has
biases of several hundred on a few channels of its keys, which plain 8-bit floats do not survive (KL 0.30, 84 %);
SmolLM2-135M has none. How far float16 is from float32 says how much of it is noise: products round activations to
8 bits, which turns any difference of last bits into small jumps.

Speed is the 8192nd token of a text: engines with either cache take turns.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import _bench
import real_models
from pennyweight.model.demand import Workload
from pennyweight.runtime.bench import Stepper
from pennyweight.runtime.engine import Engine, Row
from pennyweight.runtime.model import Model, open_model
from pennyweight.texts import rows, stdlib

SCRIPT = "kv_cache"
MODELS = ("qwen-coder", "smollm2")
CACHES: tuple[str, ...] = ("float16", "int8", "float32")
LENGTH = 8191  # of the text behind which decoding is timed: with that token a context of 8192
CHUNK = 128  # tokens whose logits are held at once
KL, SAME = 0.02, 0.97  # bars


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def agreement(path: Path, *, context: int, count: int) -> dict[str, dict[str, float]]:
    """Of each cache with float16: KL in nats a token, and the share of tokens whose likeliest successor is the same."""
    models: dict[str, Model] = {cache: open_model(path, cache=cache, context=context) for cache in CACHES}
    text = rows(stdlib(held_out=True), models["float16"].tokenizer, context).take(count).ids[:, :-1]
    kl, same = dict.fromkeys(CACHES, 0.0), dict.fromkeys(CACHES, 0)
    for ids in text:
        sequences = {cache: model.engine.open(context) for cache, model in models.items()}
        for start in range(0, context, CHUNK):
            chunk = list(enumerate(ids[start : start + CHUNK].tolist(), start))
            found = {
                cache: log_softmax(models[cache].engine.step([Row(sequence, i, token) for i, token in chunk]))
                for cache, sequence in sequences.items()
            }
            wanted = found["float16"]
            weight, first = np.exp(wanted), wanted.argmax(-1)
            for cache, own in found.items():
                kl[cache] += float((weight * (wanted - own)).sum())
                same[cache] += int((own.argmax(-1) == first).sum())
        for cache, sequence in sequences.items():
            models[cache].engine.close(sequence)
    return {cache: {"kl": kl[cache] / text.size, "same": same[cache] / text.size} for cache in CACHES}


def seconds(path: Path, threads: int, *, rounds: int, steps: int) -> dict[str, float]:
    """Medians of a decode step after LENGTH tokens, by cache."""
    engines = {cache: Engine(path, context=LENGTH + 1, threads=threads, cache=cache) for cache in ("float16", "int8")}
    steppers = {cache: Stepper(engine, Workload(prompt=LENGTH, new=1)) for cache, engine in engines.items()}
    times: dict[str, list[float]] = {cache: [] for cache in engines}
    for turn in range(rounds):
        for cache in sorted(engines, reverse=bool(turn % 2)):
            times[cache] += [steppers[cache].step() for _ in range(1 + steps)][1:]
    return {cache: float(np.median(each)) for cache, each in times.items()}


def main() -> int:
    quick = _bench.parser(__doc__).parse_args().quick
    keys: dict[str, Any] = {}
    bars = []
    for name in MODELS:
        if (path := real_models.path(name)) is None:
            continue
        engine = Engine(path, context=LENGTH, cache="int8")
        share = engine.cache_bytes_of(LENGTH) / Engine(path, context=LENGTH).cache_bytes_of(LENGTH)
        kib = engine.cache_bytes_of(LENGTH) / LENGTH / 1024
        del engine
        found = agreement(path, context=512 if quick else 2048, count=2 if quick else 4)
        print(f"\n{name}: {kib:.2f} KiB a token in int8, {share:.1%} of float16", flush=True)
        for cache, of in found.items():
            if cache != "float16":
                print(f"  {cache:7} beside float16: KL {of['kl']:.5f} nats a token, same first choice {of['same']:.2%}")
        bars.append(_bench.bar(f"{name}: KL of int8 to float16, nats a token", found["int8"]["kl"], "<=", KL))
        if name == "qwen-coder":
            bars.append(_bench.bar(f"{name}: same first choice", found["int8"]["same"], ">=", SAME))
        keys[name] = {"share_of_float16": share, "agreement": found}
        for threads in sorted({1, min(2, os.cpu_count() or 1)}):
            took = seconds(path, threads, rounds=6 if quick else 24, steps=3 if quick else 8)
            ratio = took["float16"] / took["int8"]
            each = ", ".join(f"{cache} {1e3 * of:.2f} ms" for cache, of in took.items())
            print(f"  a token after {LENGTH}, {threads} threads: {each}, ratio {ratio:.3f}", flush=True)
            keys[name][f"{threads}t"] = took
            if name == "qwen-coder":
                bars.append(_bench.bar(f"{name} {threads}t: decode at 8k, float16 / int8", ratio, ">=", 1.0))
    if not bars:
        return _bench.skip(SCRIPT, quick, f"no model: python benchmarks/real_models.py {MODELS[0]}")
    return _bench.finish(SCRIPT, quick, keys, bars)


if __name__ == "__main__":
    sys.exit(main())
