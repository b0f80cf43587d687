"""Measure this computer: memory bandwidth, matrix arithmetic, and what single blocks really cost.

Block times come from the slope method: a model of N copies of a block and one of 2N in the native engine, steps
interleaved; the difference of their medians over N is one copy. Measuring a block on its own would miss what a running
model does to caches, and include the clock's overhead. A model without blocks tells the cost of the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch

from pennyweight.checkpoint import write_atomic
from pennyweight.cost import Machine, Seconds, Workload, makes_logits
from pennyweight.events import Listener, Silent
from pennyweight.runtime.bench import Stepper, prefill_seconds
from pennyweight.runtime.engine import Engine, native_module, physical_cores
from pennyweight.runtime.random_weights import RandomWeights, tensors
from pennyweight.slots import Attention, Embedding, GatedMLP, Head, Linear, Noop, Shape, Shapes, Slot, Stored

_STACK_BYTES = 2**26  # a stack need not be larger to be read from memory; a smaller one has as many blocks as the model
_STEPS = 40
_PREFILLS = 5


def cache_folder() -> Path:
    """Where measurements of this computer are kept: $PENNY_CACHE, else pennyweight in the user's cache folder."""
    named = os.environ.get("PENNY_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pennyweight"


def machine(*, again: bool = False) -> Machine:
    """This computer, measured once and remembered in `cache_folder()`; `again` measures anew."""
    path = cache_folder() / "machine.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    key = f"{platform.node()}|{processor()}|{torch.get_num_threads()}|{torch.__version__}|{_memory_is_told_by()}"
    if again or key not in kept:
        kept[key] = dataclasses.asdict(measured_machine())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(kept, indent=1).encode())
    return Machine(**kept[key])


def processor() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def measured_machine(*, seconds: float = 2.0) -> Machine:
    """Measure for about `seconds`. Peaks are the best that large operations reached: reading 256 MiB with the native
    module's threads, copying them with torch's where it was not built, and 2048-cubed products in bfloat16."""
    size = 2048
    a, b = torch.randn(size, size, dtype=torch.bfloat16), torch.randn(size, size, dtype=torch.bfloat16)
    return Machine(
        name=f"{processor()}, {torch.get_num_threads()} threads",
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=_bandwidth(seconds / 2),
        flops=2 * size**3 / _best(lambda: a @ b, seconds / 2),
        bandwidth_share=0.8,
        flops_share=0.8,
        source=f"measured: best of repeated {_memory_is_told_by()} of 256 MiB and 2048-cubed bfloat16 products",
    )


def _memory_is_told_by() -> str:
    return "reads" if importlib.util.find_spec("pennyweight._native") else "copies"


def _bandwidth(seconds: float) -> float:
    size = 2**28
    if _memory_is_told_by() == "reads":
        reader = native_module().Reader(size, physical_cores())
        return size / _best(lambda: reader.run(0, size), seconds)
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    return 2 * size / _best(lambda: target.copy_(source), seconds)


def _best(call: Any, seconds: float) -> float:
    call()
    times, started = [], time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 3:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclasses.dataclass(frozen=True)
class Latencies:
    """Measured seconds (prefill, decode) for one workload in the native engine on this machine: of blocks by shape, and
    of everything that is no block by how the matrix of the logits is stored."""

    blocks: Mapping[Shape, tuple[float, float]]
    rest: Mapping[Stored, tuple[float, float]]

    def seconds(self) -> Seconds:
        """As prices. The rest is charged to the slot that holds the matrix of the logits."""

        def look_up(shape: Shape, workload: Workload) -> tuple[float, float]:
            if isinstance(shape, Attention | GatedMLP | Linear):
                return self.blocks[_timed_as(shape, workload)]
            return (
                self.rest[shape.stored] if isinstance(shape, Embedding | Head) and makes_logits(shape) else (0.0, 0.0)
            )

        return look_up


def _timed_as(shape: Shape, workload: Workload) -> Shape:
    """Shapes that run the same code are measured once: a window of the whole context is none, and comparing channels by
    importance or not takes the same time."""
    if isinstance(shape, Attention) and shape.window is not None and shape.window >= workload.context:
        shape = dataclasses.replace(shape, window=None)
    if isinstance(shape, Attention | GatedMLP) and shape.sparsity is not None:
        shape = dataclasses.replace(shape, sparsity=dataclasses.replace(shape.sparsity, weighted=False))
    return shape


def latencies(
    config: Mapping[str, Any],
    shapes: Shapes,
    wanted: Iterable[Shape],
    workload: Workload,
    *,
    cache: Path | None = None,
    listen: Listener | None = None,
) -> Latencies:
    """Measure every distinct shape of `wanted` inside models of the config's family.

    `cache`: a JSON file of earlier measurements on this machine, extended with what is new. Raises RuntimeError if a
    slope stays negative after three tries (the machine is too busy to measure), or without the native module.
    """
    listen, wanted = listen or Silent(), list(wanted)
    blocks = sorted({_timed_as(s, workload) for s in wanted if isinstance(s, Attention | GatedMLP | Linear)}, key=repr)
    heads = sorted({s.stored for s in wanted if isinstance(s, Embedding | Head) and makes_logits(s)}, key=repr)
    known = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    model = [config[key] for key in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")]
    where = f"{platform.node()}|{physical_cores()}|{_native_digest()}|{model}|{workload}"
    models = _Models(config, shapes, workload)
    listen.begin("measure", total=len(blocks) + len(heads), unit="shapes")

    def once(done: int, what: Any, measured: Callable[[Any], tuple[float, float]]) -> tuple[float, float]:
        key = f"{where}|{what}"
        if key not in known:
            known[key] = measured(what)
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(cache, json.dumps(known, indent=1).encode())
        listen.advance(done)
        prefill, decode = known[key]
        return prefill, decode

    times = {shape: once(done, shape, models.slope) for done, shape in enumerate(blocks, 1)}
    rest = {stored: once(done, stored, models.rest) for done, stored in enumerate(heads, len(blocks) + 1)}
    listen.end()
    return Latencies(times, rest)


def _native_digest() -> str:
    """Of the engine's machine code: another build has other times."""
    return hashlib.blake2b(Path(native_module().__file__).read_bytes(), digest_size=8).hexdigest()


class _Models:
    """Models with random weights to be timed: stacks of one block, and none at all."""

    def __init__(self, config: Mapping[str, Any], shapes: Shapes, workload: Workload) -> None:
        self._config, self._shapes, self._workload = config, shapes, workload
        self._make = lru_cache(maxsize=8)(tensors)

    def slope(self, shape: Shape) -> tuple[float, float]:
        """Prefill and decode seconds of one block."""
        nbytes = sum(weight.nbytes for weight in shape.weights())
        copies = max(2, min(self._config["num_hidden_layers"], _STACK_BYTES // nbytes))
        few, many = (self.engine(*self.stack(shape, count)) for count in (copies, 2 * copies))
        for more in (1, 4, 16):  # a slope that noise has made negative is measured again, longer
            prefills = [partial(prefill_seconds, engine, self._workload) for engine in (few, many)]
            prefill = _interleaved(*prefills, repeats=_PREFILLS * more, seconds=more, pick=min)
            steppers = [Stepper(engine, self._workload) for engine in (few, many)]
            steps = [stepper.step for stepper in steppers]
            decode = _interleaved(*steps, repeats=_STEPS * more, seconds=more, pick=statistics.median)
            for stepper in steppers:
                stepper.close()
            if prefill[1] > prefill[0] and decode[1] > decode[0]:
                return (prefill[1] - prefill[0]) / copies, (decode[1] - decode[0]) / copies
        raise RuntimeError(
            f"measuring {shape} gave a negative time three times: other work is running. "
            "Measure when the machine is idle, or plan with --machine and computed prices"
        )

    def rest(self, stored: Stored) -> tuple[float, float]:
        """Prefill and decode seconds of a model without blocks whose logits come from a matrix stored this way."""
        config, row = self.stack(None, 1)
        for slot, shape in row.items():
            if isinstance(shape, Embedding | Head) and makes_logits(shape):
                row[slot] = dataclasses.replace(shape, stored=stored)
        engine = self.engine(config, row)
        prefill = min(prefill_seconds(engine, self._workload) for _ in range(_PREFILLS))
        stepper = Stepper(engine, self._workload)
        return prefill, statistics.median(stepper.step() for _ in range(_STEPS))

    def stack(self, shape: Shape | None, copies: int) -> tuple[dict[str, Any], dict[Slot, Shape]]:
        """Config and shapes of a model of `copies` layers whose only blocks are of this shape."""
        kind = "ffn" if isinstance(shape, GatedMLP) else "mixer"
        row: dict[Slot, Shape] = {slot: own for slot, own in self._shapes.items() if slot.layer is None}
        for slot in (Slot(each, layer) for layer in range(copies) for each in ("mixer", "ffn")):
            row[slot] = Noop(hidden_size=self._config["hidden_size"]) if shape is None or slot.kind != kind else shape
        return {**self._config, "num_hidden_layers": copies}, row

    def engine(self, config: Mapping[str, Any], shapes: Shapes) -> Engine:
        longest = max(self._workload.context, self._workload.mean_length + 1)
        return Engine(RandomWeights({**config, "max_position_embeddings": longest}, shapes, self._make))


def _interleaved(
    first: Callable[[], float],
    second: Callable[[], float],
    *,
    repeats: int,
    seconds: float,
    pick: Callable[[Iterable[float]], float],
) -> tuple[float, float]:
    """Typical times of two calls made in turn, so that a drifting machine drifts for both; fewer than `repeats` times
    if that takes more than so many seconds, but three times at least."""
    first()
    second()
    gc.collect()
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(pairs) < repeats and (len(pairs) < 3 or time.perf_counter() - started < seconds):
        pairs.append((first(), second()))
    return pick(p[0] for p in pairs), pick(p[1] for p in pairs)
