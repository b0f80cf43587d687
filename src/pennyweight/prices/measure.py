"""Measure this computer: memory bandwidth, matrix arithmetic, and what single blocks really cost.

Block times come from the slope method: a model of N copies of a block and one of 2N in the native engine, run in turn;
their difference over N is one copy. Measuring a block on its own would miss what a running model does to caches, and
include the clock's overhead. What a model takes beyond its blocks is the cost of the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from pennyweight.model.demand import Workload
from pennyweight.model.shapes import Attention, Dense, GatedMLP, Noop, Shape, Shapes
from pennyweight.model.slots import Kind, Slot
from pennyweight.model.stored import Stored
from pennyweight.prices.cost import Seconds
from pennyweight.prices.machine import Machine
from pennyweight.prices.memory import STEP_ROWS
from pennyweight.runs.events import Listener, Silent, waiting
from pennyweight.runs.shared import Shared
from pennyweight.runtime.bench import Stepper, prefill_seconds
from pennyweight.runtime.engine import Engine, native_module, physical_cores
from pennyweight.runtime.sources.random import RandomWeights, tensors

_Timed = Attention | GatedMLP | Dense  # blocks that the engine runs; everything else is the rest
_STACK_BYTES = 2**26  # a stack need not be larger to be read from memory; a smaller one has as many blocks as the model
_ROUNDS = 5
_ROUND_SECONDS = 0.1
_BURST_SECONDS = 0.01
_CAREFULLY = 10  # times as long, for what everything else is told in


def cache_folder() -> Path:
    """Where measurements of this computer are kept: $PENNY_CACHE, else pennyweight in the user's cache folder."""
    named = os.environ.get("PENNY_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pennyweight"


def machine(*, again: bool = False, listen: Listener | None = None) -> Machine:
    """This computer, measured once and remembered in `cache_folder()`; `again` measures anew."""
    shared = Shared(cache_folder() / "machine.json", Machine)
    key = f"{platform.node()}|{processor()}|{torch.get_num_threads()}|{torch.__version__}|{_memory_is_told_by()}"
    kept = None if again else shared.read().get(key)
    if kept is None:
        with waiting(listen or Silent(), "measure machine"):
            kept = shared.add({key: measured_machine()}, forget=key if again else None)[key]
    return kept


def processor() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def measured_machine(*, seconds: float = 2.0) -> Machine:
    """Measure for about `seconds`. Peaks are the best that large operations reached: reading 256 MiB with the native
    module's threads, copying them with torch's where it was not built, and 2048-cubed products in bfloat16 or float32,
    whichever is faster: without instructions of its own bfloat16 takes a hundred times as long."""
    few, size = 256, 2048
    short = {d: torch.randn(few, few, dtype=d) for d in (torch.bfloat16, torch.float32)}
    best = min(short, key=lambda d: _best(lambda: short[d] @ short[d], seconds / 20))
    a, b, kind = torch.randn(size, size, dtype=best), torch.randn(size, size, dtype=best), str(best).split(".")[1]
    return Machine(
        name=f"{processor()}, {torch.get_num_threads()} threads",
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=_bandwidth(seconds / 2),
        flops=2 * size**3 / _best(lambda: a @ b, seconds / 2),
        bandwidth_share=0.8,
        flops_share=0.8,
        source=f"measured: best of repeated {_memory_is_told_by()} of 256 MiB and 2048-cubed {kind} products",
    )


def slowdown(then: Machine) -> float:
    """How many times as long this computer takes to read memory as when `then` was measured."""
    return then.bandwidth / _bandwidth(0.2)


def _memory_is_told_by() -> str:
    return "reads" if importlib.util.find_spec("pennyweight._native") else "copies"


def _bandwidth(seconds: float) -> float:
    size = 2**28
    if _memory_is_told_by() == "reads":
        reader = native_module().Reader(size, physical_cores())
        return size / min(_best(lambda n=n: reader.run(0, size, n), seconds / 2) for n in (1, 4))
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
            if isinstance(shape, _Timed):
                return self.blocks[_timed_as(shape, workload)]
            return self.rest[shape.stored] if shape.makes_logits else (0.0, 0.0)

        return look_up


def _timed_as(shape: Shape, workload: Workload) -> Shape:
    """Shapes that run the same code are measured once: a window of the whole context is none, and comparing channels by
    importance or not takes the same time."""
    changes: dict[str, Any] = {}
    if shape.window is not None and shape.window >= workload.context:
        changes["window"] = None
    if shape.sparsity is not None:
        changes["sparsity"] = dataclasses.replace(shape.sparsity, weighted=False)
    return dataclasses.replace(shape, **changes) if changes else shape  # type: ignore[type-var]


def prices(
    config: Mapping[str, Any],
    shapes: Shapes,
    workloads: Sequence[Workload],
    wanted: Iterable[Shape],
    *,
    cache: Path,
    listen: Listener | None = None,
) -> Seconds:
    """What the shapes of `wanted` take under each of the workloads, measured; see Models."""
    wanted, found = list(wanted), {}
    for workload in workloads:
        stage = "measure" if len(workloads) == 1 else f"measure {workload.concurrency} at once"
        models = Models(config, shapes, workload, cache=cache)
        found[workload] = models.latencies(wanted, listen=listen, stage=stage).seconds()
    return lambda shape, workload: found[workload](shape, workload)


class Models:
    """Models of one config with random weights, timed for one workload to tell what their blocks cost.

    Everything is timed in turn with a yardstick, layers as the config has them, and told in its seconds, which are
    measured once: other work that slows the machine for a minute does not make dear what is measured in that minute.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        shapes: Shapes,
        workload: Workload,
        *,
        cache: Path | None = None,
        again: bool = False,
    ) -> None:
        """`shapes`: the config's own; `cache`: a JSON file of earlier measurements on this machine, extended with what
        is new, those of this model and workload forgotten first if `again`. Raises RuntimeError without the native
        module."""
        self._config, self._shapes, self._workload = config, shapes, workload
        self._cache = None if cache is None else Shared(cache, tuple[float, float])
        model = [config[key] for key in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")]
        own = hashlib.blake2b(repr(list(shapes.values())).encode(), digest_size=8).hexdigest()
        self._where = f"{platform.node()}|{physical_cores()}|{_native_digest()}|{model}|{own}|{workload}"
        if self._cache is not None and again:
            self._cache.add({}, forget=f"{self._where}|")
        self._known = {} if self._cache is None else self._cache.read()
        self._make = lru_cache(maxsize=8)(tensors)
        self._head_slot, self._head = next((slot, own) for slot, own in shapes.items() if own.makes_logits)

    def latencies(
        self, wanted: Iterable[Shape], *, listen: Listener | None = None, stage: str = "measure"
    ) -> Latencies:
        """What every distinct shape of `wanted` takes. Raises RuntimeError if a block's time stays negative after three
        tries: the machine is too busy to measure."""
        wanted = list(wanted)
        blocks = {_timed_as(s, self._workload) for s in wanted if isinstance(s, _Timed)}
        heads = {s.stored for s in wanted if s.makes_logits}
        known = {what for what in (*blocks, *heads) if self._key(what) in self._known}
        done, total = len(known), len(blocks) + len(heads)
        listen = Silent() if listen is None or done == total else listen
        listen.begin(stage, total=total, done=done, unit="shapes")
        times: dict[Shape, tuple[float, float]] = {}
        rest: dict[Stored, tuple[float, float]] = {}
        for shape in sorted(blocks, key=repr):
            times[shape] = self._once(shape, lambda shape=shape: self._block(shape))
            done += shape not in known
            listen.advance(done)
        for stored in sorted(heads, key=repr):
            rest[stored] = self._once(stored, lambda stored=stored: self._rest(stored))
            done += stored not in known
            listen.advance(done)
        listen.end()
        return Latencies(times, rest)

    def step_seconds(self, shapes: Shapes) -> float:
        """Seconds of a decode step of a whole model with these shapes."""
        (found,) = self._steps(self.engine(shapes))
        return found

    def raw_step_seconds(self, shapes: Shapes) -> tuple[float, float]:
        """Seconds of a decode step by the clock, whatever else the machine does, and how many times as long as when
        prices were measured the yardstick took in turn with it."""
        steppers = [Stepper(engine, self._workload) for engine in (self._yardstick, self.engine(shapes))]
        unit, found = _medians(_rounds([stepper.step for stepper in steppers], more=1, burst=_BURST_SECONDS))
        for stepper in steppers:
            stepper.close()
        return found, unit / self._unit[1]

    def slowdown(self) -> float:
        """How many times as long as when prices were measured a decode step takes now."""
        return self.raw_step_seconds(self._shapes)[1]

    def engine(self, shapes: Shapes) -> Engine:
        """A model with these shapes, of as many layers as they name."""
        layers = {slot.layer for slot in shapes if slot.layer is not None}
        longest = max(self._workload.context, self._workload.mean_length + 1)
        config = {**self._config, "num_hidden_layers": len(layers), "max_position_embeddings": longest}
        return Engine(RandomWeights(config, shapes, self._make), cache=self._workload.cache)

    def stack(self, shape: Shape | None, copies: int, stored: Stored) -> dict[Slot, Shape]:
        """Shapes of a model whose only blocks are so many of this shape; the logits' matrix is stored this way."""
        layer: dict[Kind, type] = {slot.kind: type(own) for slot, own in self._shapes.items() if slot.layer == 0}
        kind = next((kind for kind, own in layer.items() if own is type(shape)), next(iter(layer)))
        row: dict[Slot, Shape] = {slot: own for slot, own in self._shapes.items() if slot.layer is None}
        row[self._head_slot] = dataclasses.replace(self._head, stored=stored)  # type: ignore[type-var]
        for slot in (Slot(each, index) for index in range(copies) for each in layer):
            row[slot] = Noop(hidden_size=self._config["hidden_size"]) if shape is None or slot.kind != kind else shape
        return row

    def _key(self, what: object) -> str:
        return f"{self._where}|{what}"

    def _once(self, what: object, measured: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        key = self._key(what)
        if key not in self._known:
            found = {key: measured()}
            self._known[key] = (found if self._cache is None else self._cache.add(found))[key]
        return self._known[key]

    def _block(self, shape: Shape) -> tuple[float, float]:
        """Prefill and decode seconds of one block: what a copy more adds to a model."""
        few, many, copies = self._stacks(shape, self._head.stored)
        for more in (1, 4, 16):  # a slope that noise has made negative is measured again, longer
            short, long = self._prefills(few, many, more=more)
            without, with_more = self._steps(few, many, more=more)
            if long > short and with_more > without:
                return (long - short) / copies, (with_more - without) / copies
        raise RuntimeError(
            f"measuring {shape} gave a negative time three times: other work is running. "
            "Measure when the machine is idle, or plan with --machine and computed prices"
        )

    def _rest(self, stored: Stored) -> tuple[float, float]:
        """Prefill and decode seconds of everything but blocks, logits from a matrix stored this way.

        A decode step is what remains of a model when its blocks are subtracted: they throw the matrix out of caches
        that would keep it in a model without any. Such a model is a lower bound, should noise subtract too much.
        """
        block = next(own for own in self._shapes.values() if isinstance(own, _Timed))
        few, many, _ = self._stacks(block, stored)
        without, with_more = self._steps(few, many)
        alone = self.engine(self.stack(None, 1, stored))
        (prefill,), (decode,) = self._prefills(alone), self._steps(alone)
        return prefill, max(decode, 2 * without - with_more)

    def _stacks(self, shape: Shape, stored: Stored) -> tuple[Engine, Engine, int]:
        """Two models, the second with so many blocks more. A block of a model that caches hold must be timed in a model
        that caches hold, so the larger one has no more of them than the model to be priced, if they are small."""
        nbytes = shape.nbytes
        copies = max(1, min(self._config["num_hidden_layers"] // 2, _STACK_BYTES // nbytes))
        few, many = (self.engine(self.stack(shape, count, stored)) for count in (copies, 2 * copies))
        return few, many, copies

    @cached_property
    def _yardstick(self) -> Engine:
        layer = [own for slot, own in self._shapes.items() if slot.layer == 0]
        nbytes = sum(own.nbytes for own in layer)
        layers = max(1, min(self._config["num_hidden_layers"], 2 * _STACK_BYTES // max(1, nbytes)))
        return self.engine(
            {slot: own for slot, own in self._shapes.items() if slot.layer is None or slot.layer < layers}
        )

    @cached_property
    def _unit(self) -> tuple[float, float]:
        """Prefill and decode seconds of the yardstick."""

        def measured() -> tuple[float, float]:
            stepper = Stepper(self._yardstick, self._workload)
            (decode,) = _medians(_rounds([stepper.step], more=_CAREFULLY, burst=_BURST_SECONDS))
            stepper.close()
            (prefill,) = _medians(_rounds([self._prefill_of(self._yardstick)], more=_CAREFULLY, burst=0))
            return prefill, decode

        return self._once("yardstick", measured)

    def _prefill_of(self, engine: Engine) -> Callable[[], float]:
        """Steps that are full take the same time: as many prompts as fill one stand for all."""
        together = min(self._workload.concurrency, -(-STEP_ROWS // self._workload.prompt))
        few = dataclasses.replace(self._workload, concurrency=together)
        return lambda: prefill_seconds(engine, few) * (self._workload.concurrency / together)

    def _prefills(self, *engines: Engine, more: int = 1) -> list[float]:
        rounds = _rounds([self._prefill_of(engine) for engine in (self._yardstick, *engines)], more=more, burst=0)
        return [self._unit[0] * share for share in _against_the_first(rounds)]

    def _steps(self, *engines: Engine, more: int = 1) -> list[float]:
        steppers = [Stepper(engine, self._workload) for engine in (self._yardstick, *engines)]
        rounds = _rounds([stepper.step for stepper in steppers], more=more, burst=_BURST_SECONDS)
        for stepper in steppers:
            stepper.close()
        return [self._unit[1] * share for share in _against_the_first(rounds)]


def _rounds(calls: Sequence[Callable[[], float]], *, more: int, burst: float) -> list[list[float]]:
    """What calls that return the seconds they took usually take, for every round (rounds, calls).

    A round is turns, for `more` times _ROUND_SECONDS; in a turn each is called for `burst` seconds. The first call of a
    burst does not count unless it is the only one: it finds caches full of what was the others'.
    """
    gc.collect()
    rounds = []
    for _ in range(_ROUNDS):
        times: list[list[float]] = [[] for _ in calls]
        started = time.perf_counter()
        while not times[0] or time.perf_counter() - started < more * _ROUND_SECONDS:
            for call, row in zip(calls, times, strict=True):
                found = [call()]
                begun = time.perf_counter()
                while time.perf_counter() - begun < burst:
                    found.append(call())
                row += found[1:] or found
        rounds.append([statistics.median(row) for row in times])
    return rounds


def _medians(rounds: Iterable[Sequence[float]]) -> list[float]:
    """Over rounds, of which other work may spoil less than half."""
    return [statistics.median(each) for each in zip(*rounds, strict=True)]


def _against_the_first(rounds: Iterable[Sequence[float]]) -> list[float]:
    return _medians([each / first for each in others] for first, *others in rounds)


def _native_digest() -> str:
    """Of the engine's machine code: another build has other times."""
    return hashlib.blake2b(Path(native_module().__file__).read_bytes(), digest_size=8).hexdigest()
