"""Is memory predicted as the engine takes it? Predicted bytes against the most that were resident, in twelve settings.

Each setting is a model of random weights in a process of its own: how long sequences may grow, how many there are,
which layers have a window, how keys and values are kept, how matrices are. The process first runs a tiny model the same
way, so that what the interpreter and its libraries take is known and taken off; then it loads the model, reads all
prompts, fills all caches to the end of the context and writes a token to each sequence (runtime/footprint.py). Loading
is told apart: a matrix is there twice for a moment. The last row is the shipped model, read from its folder.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import _bench
import _reference
from pennyweight import families
from pennyweight.disk.model_config import read_config
from pennyweight.formats import packed_int
from pennyweight.model.demand import Cache, Workload
from pennyweight.model.shapes import Attention, GatedMLP, Shapes
from pennyweight.prices.cost import computed, model_figures
from pennyweight.prices.machine import Machine
from pennyweight.runtime import footprint
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.sources.random import RandomWeights, tensors
from pennyweight.units import show_bytes

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Setting:
    """`window`: of every second layer. `bits`: of the blocks' matrices."""

    context: int
    concurrency: int
    window: int | None = None
    cache: Cache = "float16"
    bits: int = 16

    @property
    def workload(self) -> Workload:
        prompt = min(self.context // 2, max(8, 512 // self.concurrency))
        return Workload(prompt=prompt, new=4, concurrency=self.concurrency, context=self.context, cache=self.cache)

    @property
    def shapes(self) -> Shapes:
        found = dict(families.shapes(CONFIG))
        for slot, shape in found.items():
            if self.bits < 16 and isinstance(shape, Attention | GatedMLP):
                shape = dataclasses.replace(shape, stored=packed_int.Spec(self.bits, 64))
            if isinstance(shape, Attention) and (slot.layer or 0) % 2:
                shape = dataclasses.replace(shape, window=self.window)
            found[slot] = shape
        return found


SETTINGS = (
    Setting(512, 1),
    Setting(2048, 1, bits=4),
    Setting(8192, 1),
    Setting(8192, 1, cache="float32", bits=8),
    Setting(2048, 4, cache="int8"),
    Setting(2048, 8, bits=4),
    Setting(4096, 4, window=128),
    Setting(8192, 4, window=512, cache="int8", bits=8),
    Setting(16384, 2, window=1024),
    Setting(1024, 16, cache="int8"),
    Setting(1024, 32, window=64, bits=4),
    Setting(512, 64, cache="float32", bits=4),
)


def main() -> int:
    parser = _reference.parser(__doc__)
    parser.add_argument("--setting", type=int, help="measure this one here, in a process that does nothing else")
    options = parser.parse_args()
    if options.setting is not None:
        asked = SETTINGS[options.setting]
        found = footprint.here(
            lambda: _first(asked),
            lambda: Engine(RandomWeights(CONFIG, asked.shapes), context=asked.context, cache=asked.cache),
            asked.workload,
        )
        print(json.dumps(asdict(found)))
        return 0
    rows = [compared(str(asked), asked.shapes, asked.workload, measured(i)) for i, asked in enumerate(SETTINGS)]
    load = Workload(prompt=256, new=128, concurrency=8)
    shipped = footprint.of_folder(options.model, load)
    folder = compared("the shipped model", families.shapes(read_config(options.model)), load, shipped)
    errors = [abs(row["error"]) for row in (*rows, folder)]
    keys = {"settings": rows, "folder": folder, "worst_abs_error": max(errors)}
    bars = [
        _bench.bar("settings", len(rows), ">=", 12),
        _bench.bar("worst absolute error", max(errors), "<=", 0.05),
    ]
    return _bench.finish("memory_check", options.quick, keys, bars)


def _first(asked: Setting) -> Engine:
    """A tiny model, after one matrix of every kind has been made: what it takes to draw weights is not the engine's."""
    for weight in {weight for shape in asked.shapes.values() for weight in shape.weights() if weight.is_matrix}:
        rows, columns = weight.shape
        tensors(((rows, columns, weight.stored),))
    return Engine(RandomWeights(footprint.TINY, families.shapes(footprint.TINY)), cache=asked.cache)


def measured(index: int) -> footprint.Footprint:
    command = [sys.executable, __file__, "--setting", str(index)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return footprint.Footprint(**json.loads(done.stdout.splitlines()[-1]))


def compared(name: str, shapes: Shapes, load: Workload, found: footprint.Footprint) -> dict[str, Any]:
    predicted = model_figures(shapes, load, computed(Machine.load("h100")))["memory_bytes"]
    error = predicted / found.peak_bytes - 1
    taken = f"measured {show_bytes(found.peak_bytes):>10}, {show_bytes(found.loading_bytes)} while loading"
    print(f"{name}: predicted {show_bytes(predicted):>10}, {taken}: {error:+.1%}", flush=True)
    return {"setting": name, "predicted_bytes": predicted, "error": error, **asdict(found)}


if __name__ == "__main__":
    sys.exit(main())
