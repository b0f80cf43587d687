"""Models for comparisons with llama.cpp: one set of weights as GGUF files for both engines and as a sparse folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

import _bench
import _llama
import _random_model
from streaming import SHAPE

SHIPPED = _bench.REPOSITORY / "src" / "pennyweight" / "data" / "reference-dense"
CONTEXT = 1024  # or what the model takes, if that is less
_LITTLE = 32 << 20  # bytes of tensors that are too small for pages of 2 MiB


def folder(name: str) -> Path:
    """`reference`: the shipped model. `1b`: random weights in the shapes of Llama-3.2-1B."""
    if name == "reference":
        return SHIPPED
    return _random_model.write(SHAPE, _bench.work_folder("streaming") / "llama-1b-random", shard_bytes=600_000_000)


def gguf(name: str, kind: str, ggml: _llama.Ggml) -> Path:
    """Every matrix in one tensor type; q4_0 runs without change of a bit in both engines."""
    return _llama.write_gguf(folder(name), _bench.work_folder("decode") / f"{name}-{kind}.gguf", kind, ggml)


def sparse_folder(name: str, share: float) -> Path:
    """Where `sparse` makes its model."""
    return _bench.work_folder("decode") / f"{name}-sparse-{share}-g64"


def sparse(name: str, share: float) -> Path:
    """Every block in zigzag, groups of 64, leaving out `share` of its inputs' channels by tables counted on a little
    text; embedding and head in 4 bits by rows, groups of 64 as well: 4.25 bits everywhere. Made once."""
    out = sparse_folder(name, share)
    if out.exists():
        return out
    import torch

    from pennyweight.disk.checkpoint import Checkpoint
    from pennyweight.job.pack import pack
    from pennyweight.live.load import compute_dtype
    from pennyweight.live.walk import Walk
    from pennyweight.model.choices import Choice
    from pennyweight.model.slots import Slot
    from pennyweight.runs.events import Silent
    from pennyweight.runs.store import Store
    from pennyweight.variants import bits, sparsity

    walk = Walk(Checkpoint(folder(name)), dtype=compute_dtype("auto"))
    block = Choice((("sparsity", sparsity.Spec(share, share, method="rtn")),))
    layout = {slot: block for slot in walk.shapes if slot.kind in ("mixer", "ffn")}
    layout[Slot("embed")] = Choice((("bits", bits.Spec(4, 64)),))
    rows = torch.arange(256).mul(7919).remainder(walk.checkpoint.config["vocab_size"]).view(2, 128)
    run = out.with_name(out.name + ".run")
    shutil.rmtree(run / "model", ignore_errors=True)  # packed layers of a stopped run are used again
    pack(walk, layout, rows, run / "model", files={}, store=Store(run / "store", {}), listen=Silent())
    shutil.move(run / "model", out)
    shutil.rmtree(run)
    return out


class Ours:
    """Our engine with the face of `_llama.Worker`."""

    def __init__(self, model: Path, *, threads: int, sparsity: float | None = None) -> None:
        from pennyweight.runtime.engine import Engine

        self.engine = Engine(model, context=CONTEXT, threads=threads, sparsity=sparsity)
        self._sequence = self.engine.open(self.engine.context)
        self._position, self._logits = 0, np.empty((0, 0), np.float32)
        self.kept: list[float] = []  # share of their columns that sparse matrices read, of every token written

    def prompt(self, tokens: list[int]) -> float:
        from pennyweight.runtime.engine import Row

        started = time.perf_counter()
        last = len(tokens) - 1
        for at in range(0, len(tokens), self.engine.max_rows):
            part = tokens[at : at + self.engine.max_rows]
            rows = [Row(self._sequence, at + i, token, at + i == last) for i, token in enumerate(part)]
            self._logits = self.engine.step(rows)
        self._position = len(tokens)
        return time.perf_counter() - started

    def write(self, tokens: int) -> list[float]:
        from pennyweight.runtime.engine import Row

        seconds = []
        for _ in range(tokens):
            token = int(self._logits[-1].argmax())
            started = time.perf_counter()
            self._logits = self.engine.step([Row(self._sequence, self._position, token, True, True)])
            seconds.append(time.perf_counter() - started)
            self.kept.append(self.engine.kept_share)
            self._position += 1
        return seconds

    def close(self) -> None:
        self.engine.close(self._sequence)


def theirs(model: Path, *, threads: int) -> _llama.Worker:
    """llama.cpp with a model. Raises RuntimeError if the system has huge pages and most of its weights are in small
    ones: ours would be read faster for that alone."""
    worker, nbytes = _llama.Worker(model, context=CONTEXT, threads=threads), model.stat().st_size
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has = enabled.exists() and "[never]" not in enabled.read_text()
    if has and worker.huge_bytes < 0.8 * (nbytes - _LITTLE):
        worker.close()
        raise RuntimeError(
            f"llama.cpp has {worker.huge_bytes >> 20} of {nbytes >> 20} MiB in huge pages, ours has all; free memory, "
            "so that the system finds some, and try again"
        )
    return worker


def prompt(vocabulary: int, tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(1, min(vocabulary, 256), tokens)]


def in_turn(
    variants: dict[str, Any], ids: list[int], *, rounds: int, new: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of prompts and of tokens of each variant, measured in turn: a round is one prompt and `new` tokens."""
    prompts: dict[str, list[float]] = {name: [] for name in variants}
    tokens: dict[str, list[float]] = {name: [] for name in variants}
    for each in variants.values():  # caches, pages, threads
        each.prompt(ids)
        each.write(2)
    for _ in range(rounds):
        for name, each in variants.items():
            prompts[name].append(each.prompt(ids))
            tokens[name] += each.write(new)
    return prompts, tokens
