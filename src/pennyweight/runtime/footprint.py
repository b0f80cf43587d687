"""The most memory that an engine takes for a workload, measured: resident bytes of a process of its own.

The process first runs a model of a few kilobytes through everything that follows, so that libraries, threads and what
they load on first use are there; what is resident then is the interpreter's and is taken off. The model is loaded, what
loading has freed goes back to the system, all sequences are opened, their prompts read, their caches filled to the end
of the context, and a token is written to each. Linux alone tells the peaks (/proc/self/status, VmHWM).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pennyweight import families
from pennyweight.model.demand import Workload
from pennyweight.runs.allocator import give_back_freed_memory
from pennyweight.runtime.bench import run_rows
from pennyweight.runtime.engine import Engine, Row

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


class NotTold(RuntimeError):
    """This system does not say how much memory a process has taken at most."""


@dataclass(frozen=True)
class Footprint:
    """Bytes beyond the interpreter's `base_bytes`: `loaded_bytes` once the model is there, `loading_bytes` the most on
    the way there, `peak_bytes` the most while it serves."""

    base_bytes: int
    loading_bytes: int
    loaded_bytes: int
    peak_bytes: int


def of_folder(folder: Path, workload: Workload) -> Footprint:
    """Of a model folder or a GGUF file. Raises NotTold, RuntimeError if the process that measures fails."""
    if not _CLEAR.exists():
        raise NotTold("this system does not tell how much memory a process takes at most")
    asked = json.dumps({"folder": str(folder), "workload": asdict(workload)})
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory could not be measured: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def here(tiny: Callable[[], Engine], make: Callable[[], Engine], workload: Workload) -> Footprint:
    """Of the engine that `make` makes, in this process, which should have done nothing else. `tiny` makes one of a few
    kilobytes by the same ways."""
    _serve(tiny(), Workload(prompt=400, new=1, concurrency=2))
    base, _ = _resident()
    engine = make()
    loaded, loading = _resident()
    _serve(engine, workload)
    peak = _told("VmHWM")
    return Footprint(base, loading - base, loaded - base, peak - base)


def _serve(engine: Engine, workload: Workload) -> None:
    last = workload.context - 1
    sequences = [engine.open(workload.context) for _ in range(workload.concurrency)]
    places = ((sequence, position) for sequence in sequences for position in range(workload.prompt))
    while some := [*islice(places, engine.max_rows)]:
        engine.step([Row(sequence, position, 1, position == workload.prompt - 1) for sequence, position in some])
    for sequence in sequences:
        engine.fill(sequence, last)
    run_rows(engine, [Row(sequence, last, 1, sparse=True) for sequence in sequences])


def _resident() -> tuple[int, int]:
    """Bytes now, and the most since this was last asked."""
    peak = _told("VmHWM")
    gc.collect()
    give_back_freed_memory()
    _CLEAR.write_text("5")  # the peak begins anew
    return _told("VmRSS"), peak


def _told(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    asked = json.loads(sys.argv[1])
    workload = Workload(**asked["workload"])
    with tempfile.TemporaryDirectory() as made:
        tiny = _written(Path(made) / "tiny")
        found = here(
            lambda: Engine(tiny, cache=workload.cache),
            lambda: Engine(Path(asked["folder"]), context=workload.context, cache=workload.cache),
            workload,
        )
    print(json.dumps(asdict(found)))


def _written(folder: Path) -> Path:
    """A model folder with the tiny model."""
    import torch

    from pennyweight.disk.writer import Writer

    writer = Writer(folder)
    for block in families.blocks(TINY).values():
        for name, weight in block.tensors().items():
            writer.add(name, torch.zeros(weight.shape, dtype=torch.bfloat16))
    writer.finish(TINY)
    return folder


if __name__ == "__main__":
    main()
