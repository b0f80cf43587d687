"""Memory as it is predicted and as the native engine allocates it: the same bytes, and near what a process takes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from pennyweight import families
from pennyweight.disk.model_config import read_config
from pennyweight.formats import packed_int, planes, zigzag
from pennyweight.model.demand import Workload
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import memory
from pennyweight.prices.cost import computed, model_figures
from pennyweight.prices.machine import Machine

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime import footprint
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.lower import lower
from pennyweight.runtime.sources.random import RandomWeights

CONFIG = {
    "model_type": "llama",
    "hidden_size": 96,
    "vocab_size": 300,
    "intermediate_size": 200,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 40,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
REFERENCE = Path(families.__file__).parents[1] / "data" / "reference-dense"


def model(**changes: object) -> dict[Slot, Shape]:
    """The config's shapes, blocks changed alike where they have such a field."""
    return {
        slot: dataclasses.replace(
            shape,  # type: ignore[type-var]
            **{name: value for name, value in changes.items() if name in {f.name for f in dataclasses.fields(shape)}},
        )
        if isinstance(shape, Attention | GatedMLP)
        else shape
        for slot, shape in families.shapes(CONFIG).items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_size": 40},
        {"num_kv_heads": 3},
        {"stored": packed_int.Spec(8, 96)},
        {"stored": packed_int.Spec(4, 32)},
        {"stored": planes.Spec(3, 96)},
        {"stored": planes.Spec(6, 32)},
        {"stored": zigzag.Spec(64)},
    ],
    ids=str,
)
def test_what_is_predicted_is_what_the_engine_allocates(changes):
    shapes = model(**changes)
    engine = Engine(RandomWeights(CONFIG, shapes), threads=1)
    for rows in (1, 100, 512):
        asked = memory.work_bytes(shapes.values(), rows)
        assert asked == engine._native.work_bytes(rows)
    of_matrices = sum(w.resident_bytes for s in shapes.values() for w in s.weights() if w.is_matrix)
    whole = 1.0 if shapes[Slot("ffn", 0)].stored != zigzag.Spec(64) else 1.03  # stacked ones share their last lines
    assert engine.weight_bytes <= of_matrices <= whole * engine.weight_bytes


@pytest.mark.parametrize("cache", ["float16", "int8", "float32"])
@pytest.mark.parametrize("window", [None, 16, 100])
def test_a_sequence_takes_what_the_engine_reserves_for_it(window, cache):
    shapes = model(window=window)
    native = lower(RandomWeights(CONFIG, shapes), cache=cache).model
    for context in (2, 33, 600, 613, 4096):
        load = Workload(prompt=1, new=1, context=context, cache=cache)
        assert sum(memory.sequence_bytes(s, load) for s in shapes.values()) == native.reserved_bytes(context)
        seen = sum(memory.seen_bytes(s, load, context) for s in shapes.values())
        assert seen == native.state_bytes(context)


def test_rotary_tables_grow_in_pieces():
    def tables(context: int) -> int:
        return memory.workspace_bytes(
            [Attention(hidden_size=64, num_heads=1, num_kv_heads=1, head_dim=40)],
            Workload(prompt=1, new=1, context=context),
        )

    assert tables(1025) - tables(1024) == 2 * 1024 * 40 * 4, "the larger ones, and those that they replace"
    assert tables(1024) == tables(2)


@pytest.mark.skipif(sys.platform != "linux", reason="the most that a process takes is told by Linux alone")
def test_a_process_takes_what_was_predicted():
    load = Workload(prompt=128, new=64, concurrency=8, context=512)
    shapes = families.shapes(read_config(REFERENCE))
    predicted = model_figures(shapes, load, computed(Machine.load("m2-max")))["memory_bytes"]
    found = footprint.of_folder(REFERENCE, load)
    assert found.peak_bytes == pytest.approx(predicted, rel=0.05)
    assert found.loaded_bytes == pytest.approx(sum(s.resident_bytes for s in shapes.values()), rel=0.05)


def test_every_way_to_store_says_what_it_takes():
    for stored in (BFLOAT16, packed_int.Spec(4, 32), packed_int.Spec(8, 100), planes.Spec(3, 32), zigzag.Spec(64)):
        for rows, columns in ((1, 32), (257, 320), (64, 100)):
            own = stored.over(columns)
            assert own.resident_bytes(rows, columns) >= rows * columns * min(own.bits, 16) / 8
