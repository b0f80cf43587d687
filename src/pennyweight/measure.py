"""Measure this computer: memory bandwidth, matrix arithmetic, and what single blocks really cost.

Block times come from the slope method: a model of N copies of a block and one of 2N, steps interleaved; the
difference of their medians over N is one copy, and what is left of the first is the cost of everything that is not a
block. Measuring a block on its own would miss what a running model does to caches, and include the clock's overhead.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from pennyweight import heterogeneous, kinds
from pennyweight.checkpoint import write_atomic
from pennyweight.cost import Machine, Seconds, Workload
from pennyweight.evals.speed import Stepper, prefill_seconds
from pennyweight.events import Listener, Silent
from pennyweight.families._decoder import with_shapes
from pennyweight.slots import BFLOAT16, Attention, GatedMLP, Linear, Noop, Shape, Shapes, Slot

COPIES = 4
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
    key = f"{platform.node()}|{processor()}|{torch.get_num_threads()}|{torch.__version__}"
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
    """Measure for about `seconds`. Peaks are the best that large operations reached."""
    words, size = 2**26, 2048
    source, target = torch.ones(words), torch.zeros(words)
    a, b = torch.randn(size, size, dtype=torch.bfloat16), torch.randn(size, size, dtype=torch.bfloat16)
    return Machine(
        name=f"{processor()}, {torch.get_num_threads()} threads",
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=2 * 4 * words / _best(lambda: target.copy_(source), seconds / 2),
        flops=2 * size**3 / _best(lambda: a @ b, seconds / 2),
        bandwidth_share=0.8,
        flops_share=0.8,
        source="measured: best of repeated copies of 256 MiB and 2048-cubed bfloat16 products",
    )


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
    """Measured seconds (prefill, decode) of blocks by shape, and of everything that is no block, for one workload.

    The runtime measured is transformers on this machine in bfloat16: storing a matrix in fewer bits does not change
    its time there, so shapes are looked up as if stored in 16 bits.
    """

    blocks: Mapping[Shape, tuple[float, float]]
    rest: tuple[float, float]

    def seconds(self) -> Seconds:
        """As prices. The rest is charged to the head's slot."""

        def look_up(shape: Shape, workload: Workload) -> tuple[float, float]:
            if isinstance(shape, Attention | GatedMLP | Linear):
                return self.blocks[_timed_as(shape, workload)]
            return self.rest if type(shape).__name__ == "Head" else (0.0, 0.0)

        return look_up


def _timed_as(shape: Shape, workload: Workload) -> Shape:
    """Shapes that run the same code are measured once."""
    shape = dataclasses.replace(shape, stored=BFLOAT16) if not isinstance(shape, Noop) else shape
    if isinstance(shape, Attention) and shape.window is not None and shape.window >= workload.context:
        shape = dataclasses.replace(shape, window=None)
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
    """Measure every distinct block shape of `wanted` inside models of the config's family.

    `cache`: a JSON file of earlier measurements on this machine, extended with what is new. Raises RuntimeError if a
    slope stays negative after three tries (the machine is too busy to measure).
    """
    listen = listen or Silent()
    blocks = sorted({_timed_as(s, workload) for s in wanted if isinstance(s, Attention | GatedMLP | Linear)}, key=repr)
    known = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    where = f"{platform.node()}|{torch.get_num_threads()}|{torch.__version__}|{config['model_type']}|{workload}"
    times: dict[Shape, tuple[float, float]] = {}
    rests: list[tuple[float, float]] = []
    listen.begin("measure", total=len(blocks), unit="shapes")
    for done, shape in enumerate(blocks, 1):
        key = f"{where}|{config['hidden_size']}|{config['vocab_size']}|{shape}"
        if key not in known:
            known[key] = _slope(config, shapes, shape, workload)
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(cache, json.dumps(known, indent=1).encode())
        prefill, decode, rest_prefill, rest_decode = known[key]
        times[shape] = (prefill, decode)
        rests.append((rest_prefill, rest_decode))
        listen.advance(done)
    listen.end()
    rest = (statistics.median(r[0] for r in rests), statistics.median(r[1] for r in rests))
    return Latencies(times, rest)


def _slope(config: Mapping[str, Any], shapes: Shapes, shape: Shape, workload: Workload) -> list[float]:
    few, many = (_stack(config, shapes, shape, copies) for copies in (COPIES, 2 * COPIES))
    for _ in range(3):
        prefill = _interleaved(
            lambda: prefill_seconds(few, workload), lambda: prefill_seconds(many, workload), _PREFILLS, best=True
        )
        steppers = Stepper(few, workload), Stepper(many, workload)
        decode = _interleaved(steppers[0].step, steppers[1].step, _STEPS)
        if prefill[1] > prefill[0] and decode[1] > decode[0]:
            slopes = [(pair[1] - pair[0]) / COPIES for pair in (prefill, decode)]
            return [*slopes, max(0.0, prefill[0] - COPIES * slopes[0]), max(0.0, decode[0] - COPIES * slopes[1])]
    raise RuntimeError(
        f"measuring {shape} gave a negative time three times: other work is running. "
        "Measure when the machine is idle, or plan with --machine and computed prices"
    )


def _interleaved(first: Any, second: Any, repeats: int, *, best: bool = False) -> tuple[float, float]:
    """Typical times of two calls made in turn, so that a drifting machine drifts for both."""
    first()
    second()
    gc.collect()
    pairs = [(first(), second()) for _ in range(repeats)]
    pick = min if best else statistics.median
    return pick(p[0] for p in pairs), pick(p[1] for p in pairs)


def _stack(config: Mapping[str, Any], shapes: Shapes, shape: Shape, copies: int) -> Any:
    """A model of `copies` layers whose only blocks are of this shape, random weights, bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden = config["hidden_size"]
    kind = "ffn" if isinstance(shape, GatedMLP) else "mixer"
    small = {**config, "num_hidden_layers": copies}
    small.pop("per_layer_config", None)
    if "layer_types" in small:
        small["layer_types"] = ["full_attention"] * copies
    row: dict[Slot, Shape] = {}
    for slot, parent in kinds.family_of(config["model_type"]).slots(small).items():
        row[slot] = shape if slot.kind == kind else Noop(hidden_size=hidden) if slot.layer is not None else parent
    with heterogeneous.installed():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**with_shapes(small, row)), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)
