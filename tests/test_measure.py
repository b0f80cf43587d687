"""Measuring this machine: slopes separate a block from the rest, and nothing is measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight import families
from pennyweight.formats import packed_int, zigzag
from pennyweight.model.demand import Budget, Workload, batches
from pennyweight.model.shapes import Attention, GatedMLP, Noop, Sparsity
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import measure
from pennyweight.prices.cost import Cost, figures
from pennyweight.prices.machine import Machine
from pennyweight.runs.events import Silent
from pennyweight.runtime import bench as bench_module
from pennyweight.runtime.bench import Stepper, bench, bench_in_turn, prefill_seconds
from pennyweight.runtime.engine import Row

ATTENTION = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
FFN = GatedMLP(hidden_size=64, intermediate_size=128)
LOAD = Workload(prompt=32, new=16, concurrency=1, context=64)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 300,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPES = families.shapes(CONFIG)
HEAD = SHAPES[Slot("head")]
MODELS = measure.Models(CONFIG, SHAPES, LOAD)


REST = (pytest.approx(7), pytest.approx(0.5))


class Clock:
    """Stands in for timed engines: a stack of n blocks takes 7 + 3 n to prefill and 0.5 + 0.25 n to decode, times what
    other work slows them down by."""

    slowness = 1.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rising: bool = True) -> None:
        self.engines: list[Any] = []
        clock = self
        sign = 1 if rising else -1

        def engine(_self: Any, shapes: Any) -> int:
            blocks = [shape for slot, shape in shapes.items() if slot.layer is not None and not isinstance(shape, Noop)]
            self.engines.append(blocks[0] if blocks else shapes[Slot("head")])
            return len(blocks)

        class Stepper:
            def __init__(self, copies: int, _workload: Workload) -> None:
                self.copies = copies

            def step(self) -> float:
                return clock.slowness * (0.5 + sign * 0.25 * self.copies)

            def close(self) -> None:
                pass

        monkeypatch.setattr(measure.Models, "engine", engine)
        monkeypatch.setattr(measure, "prefill_seconds", lambda copies, _: clock.slowness * (7 + sign * 3 * copies))
        monkeypatch.setattr(measure, "Stepper", Stepper)
        monkeypatch.setattr(measure, "_ROUND_SECONDS", 0)
        monkeypatch.setattr(measure, "_BURST_SECONDS", 0)
        monkeypatch.setattr(measure.gc, "collect", lambda: 0)


def test_a_block_is_the_slope_and_the_rest_what_a_model_without_blocks_takes(monkeypatch):
    Clock(monkeypatch)
    found = measure.Models(CONFIG, SHAPES, LOAD).latencies([FFN, HEAD])
    assert found.blocks == {FFN: (pytest.approx(3), pytest.approx(0.25))}
    assert found.rest == {BFLOAT16: REST}


@pytest.mark.parametrize("tied", [False, True])
def test_prices_look_shapes_up_and_charge_the_rest_to_the_matrix_of_the_logits(monkeypatch, tied):
    Clock(monkeypatch)
    shapes = families.shapes({**CONFIG, "tie_word_embeddings": tied})
    packed = dataclasses.replace(shapes[Slot("embed" if tied else "head")], stored=packed_int.Spec(8, 64))
    seconds = measure.Models(CONFIG, shapes, LOAD).latencies([FFN, ATTENTION, packed, *shapes.values()]).seconds()
    assert seconds(FFN, LOAD) == (pytest.approx(3), pytest.approx(0.25))
    assert seconds(Noop(hidden_size=64), LOAD) == (0, 0)
    charged = seconds(shapes[Slot("embed")], LOAD), seconds(shapes[Slot("head")], LOAD)
    assert charged == ((REST, (0, 0)) if tied else ((0, 0), REST))
    assert seconds(packed, LOAD) == REST


def test_shapes_that_run_the_same_code_are_measured_once(monkeypatch):
    clock = Clock(monkeypatch)
    narrow, wide = (dataclasses.replace(ATTENTION, window=window) for window in (16, 64))
    sparse, weighted = (
        dataclasses.replace(FFN, stored=zigzag.Spec(64), sparsity=Sparsity(0.5, 0.25, weighted=weighted))
        for weighted in (False, True)
    )
    packed = dataclasses.replace(FFN, stored=packed_int.Spec(4, 64))
    wanted = [ATTENTION, narrow, wide, FFN, packed, sparse, weighted]
    seconds = measure.Models(CONFIG, SHAPES, LOAD).latencies(wanted).seconds()
    assert set(clock.engines) == {ATTENTION, narrow, FFN, packed, sparse}  # a window of the whole context is none
    assert seconds(wide, LOAD) == seconds(ATTENTION, LOAD)
    assert seconds(weighted, LOAD) == seconds(sparse, LOAD)


def test_prices_are_those_of_one_moment_however_slow_the_machine_was_when_each_was_measured(monkeypatch):
    clock, models = Clock(monkeypatch), measure.Models(CONFIG, SHAPES, LOAD)
    quiet = models.latencies([FFN])
    clock.slowness = 3.0
    busy = models.latencies([FFN, ATTENTION, HEAD])
    assert busy.blocks[ATTENTION] == quiet.blocks[FFN] == busy.blocks[FFN]
    assert busy.rest == {BFLOAT16: REST}
    assert models.step_seconds(SHAPES) == pytest.approx(0.5 + 0.25 * 6)


def test_a_machine_that_has_become_busier_is_found_out_and_raw_seconds_stay_raw(monkeypatch):
    clock, models = Clock(monkeypatch), measure.Models(CONFIG, SHAPES, LOAD)
    models.latencies([FFN])
    clock.slowness = 3.0
    assert models.slowdown() == pytest.approx(3)
    assert models.raw_step_seconds(SHAPES) == (pytest.approx(3 * (0.5 + 0.25 * 6)), pytest.approx(3))
    then = Machine(name="then", memory_bytes=1, bandwidth=6.0, flops=1.0)
    monkeypatch.setattr(measure, "_bandwidth", lambda _: 4.0)
    assert measure.slowdown(then) == 1.5


def test_prices_are_measured_for_every_batch_there_may_be(monkeypatch, tmp_path: Path):
    Clock(monkeypatch)
    told = []

    class Listening(Silent):
        def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None:
            told.append(stage)

    grid = batches(Budget(tokens_per_second=1.0), dataclasses.replace(LOAD, concurrency=6))
    assert [each.concurrency for each in grid] == [1, 2, 4, 6]
    cache = tmp_path / "latencies.json"
    seconds = measure.prices(CONFIG, SHAPES, grid, [FFN], cache=cache, listen=Listening())
    assert told == [f"measure {count} at once" for count in (1, 2, 4, 6)]
    assert all(seconds(FFN, each)[1] == pytest.approx(0.25) for each in grid)


def test_prompts_beyond_a_full_step_are_not_read_to_be_timed(monkeypatch):
    Clock(monkeypatch)
    read = []
    monkeypatch.setattr(measure, "prefill_seconds", lambda copies, few: read.append(few.concurrency) or 7 + 3 * copies)
    many = dataclasses.replace(LOAD, concurrency=64)
    found = measure.Models(CONFIG, SHAPES, many).latencies([FFN])
    assert set(read) == {16}, "512 tokens of prompts of 32"
    assert found.blocks[FFN] == (pytest.approx(4 * 3), pytest.approx(0.25))


def test_what_is_in_the_cache_is_not_measured_again(monkeypatch, tmp_path: Path):
    clock, cache = Clock(monkeypatch), tmp_path / "deep" / "latencies.json"
    first = measure.Models(CONFIG, SHAPES, LOAD, cache=cache).latencies([FFN])
    measured = len(clock.engines)
    assert measure.Models(CONFIG, SHAPES, LOAD, cache=cache).latencies([FFN]) == first
    assert len(clock.engines) == measured
    measure.Models(CONFIG, SHAPES, dataclasses.replace(LOAD, prompt=33), cache=cache).latencies([FFN])
    assert len(clock.engines) > measured


def test_what_another_run_measured_meanwhile_is_kept_and_goes_before_one_s_own(monkeypatch, tmp_path: Path):
    clock, cache = Clock(monkeypatch), tmp_path / "latencies.json"
    first, second = (measure.Models(CONFIG, SHAPES, LOAD, cache=cache) for _ in range(2))
    clock.slowness = 2.0
    told = first.latencies([FFN])
    clock.slowness = 1.0
    assert second.latencies([FFN, ATTENTION]).blocks[FFN] == told.blocks[FFN]
    other = measure.Models(CONFIG, SHAPES, dataclasses.replace(LOAD, prompt=33), cache=cache)
    other.latencies([FFN])
    known = len(json.loads(cache.read_text()))
    measured = len(clock.engines)
    again = measure.Models(CONFIG, SHAPES, LOAD, cache=cache, again=True)
    assert known - len(json.loads(cache.read_text())) == 3, "its own yardstick and two blocks are forgotten"
    again.latencies([FFN])
    assert len(clock.engines) > measured


def test_a_damaged_file_of_measurements_is_refused_in_one_line(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PENNY_CACHE", str(tmp_path))
    for name in ("machine.json", "latencies.json"):
        (tmp_path / name).write_text('{"a": {"name": 1}}')
    for opens in (measure.machine, lambda: measure.Models(CONFIG, SHAPES, LOAD, cache=tmp_path / "latencies.json")):
        with pytest.raises(ValueError, match=r"\.json: a.*; remove the file") as err:
            opens()
        assert "\n" not in str(err.value)


def test_progress_counts_what_is_known_as_known(monkeypatch, tmp_path: Path):
    """Otherwise the time left is that of looking things up, and measuring nothing is told as done in no time."""
    Clock(monkeypatch)
    cache, told = tmp_path / "latencies.json", []

    class Listening(Silent):
        def begin(self, stage: str, *, total: int, done: int = 0, unit: str = "") -> None:
            told.append((stage, done, total))

        def advance(self, done: int, **figures: float) -> None:
            told.append(done)

    for wanted in ([FFN], [ATTENTION, FFN, HEAD], [FFN, HEAD]):
        measure.Models(CONFIG, SHAPES, LOAD, cache=cache).latencies(wanted, listen=Listening())
    assert told == [("measure", 0, 1), 1, ("measure", 1, 3), 2, 2, 3]


def test_a_machine_too_busy_to_measure_is_refused(monkeypatch):
    Clock(monkeypatch, rising=False)
    with pytest.raises(RuntimeError, match="other work is running"):
        measure.Models(CONFIG, SHAPES, LOAD).latencies([FFN])


def test_this_machine_is_measured_once(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PENNY_CACHE", str(tmp_path))
    speeds = iter((10.0, 20.0))
    monkeypatch.setattr(
        measure, "measured_machine", lambda: Machine(name="cpu", memory_bytes=1, bandwidth=next(speeds), flops=1.0)
    )
    assert [measure.machine().bandwidth, measure.machine().bandwidth] == [10, 10]
    assert measure.machine(again=True).bandwidth == 20
    assert measure.machine().bandwidth == 20
    assert len(json.loads((tmp_path / "machine.json").read_text())) == 1


def test_measured_peaks_are_those_of_a_computer():
    found = measure.measured_machine(seconds=0.1)
    assert found.bandwidth > 1e8
    assert found.flops > 1e8
    assert found.memory_bytes > 2**29


@pytest.mark.parametrize("shape", [ATTENTION, FFN])
def test_stacks_hold_copies_of_one_block_alone(shape):
    row = MODELS.stack(shape, 5, BFLOAT16)
    assert [slot.layer for slot, own in row.items() if own == shape] == [0, 1, 2, 3, 4]
    assert sum(isinstance(own, Noop) for own in row.values()) == 5
    assert {str(slot) for slot in row if slot.layer is None} == {"embed", "norm", "head"}


SPARSE = Sparsity(0.5, 0.25)


@pytest.mark.parametrize("stored", [BFLOAT16, packed_int.Spec(8, 64), packed_int.Spec(4, 32), zigzag.Spec(64)], ids=str)
def test_random_models_of_any_shape_run_in_the_engine(stored):
    sparsity = SPARSE if stored.down else None
    for shape in (ATTENTION, FFN):
        shape = dataclasses.replace(shape, stored=stored, sparsity=sparsity)
        engine = MODELS.engine(MODELS.stack(shape, 2, BFLOAT16))
        assert prefill_seconds(engine, LOAD) > 0
        assert Stepper(engine, LOAD).step() > 0
        matrices = sum(weight.nbytes for weight in shape.weights() if len(weight.shape) > 1)
        others = 2 * 2 * 300 * 64  # embedding and head
        assert engine.weight_bytes == pytest.approx(2 * matrices + others, rel=0.1)


def test_the_rest_is_measured_for_every_way_to_store_the_logits(monkeypatch):
    monkeypatch.setattr(measure, "_ROUND_SECONDS", 0.01)  # that it is, not how well
    packed = dataclasses.replace(HEAD, stored=packed_int.Spec(8, 64))
    found = measure.Models(CONFIG, SHAPES, LOAD).latencies([HEAD, packed])
    assert set(found.rest) == {BFLOAT16, packed_int.Spec(8, 64)}
    assert min(min(times) for times in found.rest.values()) > 0


def test_random_models_leave_out_exactly_the_share_of_their_shape():
    shape = dataclasses.replace(FFN, intermediate_size=256, stored=zigzag.Spec(64), sparsity=SPARSE)
    engine = MODELS.engine(MODELS.stack(shape, 2, BFLOAT16))
    Stepper(engine, LOAD).step()
    assert engine.kept_share == pytest.approx((0.5 * 64 + 0.75 * 256) / (64 + 256))  # one list for gate and up
    column = {
        rows: 2 * rows // 64 + rows // 2 for rows in (512, 128)
    }  # bytes: gate and up stacked; down, 64 rows filled
    column = {rows: -(-size // 64) * 64 for rows, size in column.items()}
    left_out = 2 * (32 * column[512] + 64 * column[128])
    assert engine.bytes_read([40]) == engine.bytes_read_per_token - left_out
    dense = engine.bytes_read_per_token
    engine.step([Row(engine.open(8), 0, 1)])
    assert engine.bytes_read([0]) == dense


def test_throughput_is_measured_as_it_is_predicted(monkeypatch):
    """Written tokens over the seconds of prompts and writing together, several models in turn."""
    clock, order = [0.0], []
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: clock[0])

    class Engine:
        context, vocab_size, max_rows, threads, kernels = 64, 8, 5, 1, "none"

        def __init__(self, pace: float) -> None:
            self.pace = pace

        def open(self, capacity: int) -> int:
            return 0

        def close(self, sequence: int) -> None:
            order.append(self.pace)

        def bytes_read(self, lengths: list[int]) -> int:
            return 0

        def step(self, rows: list[Row]) -> np.ndarray:
            assert len(rows) <= self.max_rows
            clock[0] += self.pace * (len(rows) if rows[0].sparse else 10)
            return np.zeros((sum(row.wants_logits for row in rows), 8))

    load = Workload(prompt=6, new=3, concurrency=7)
    slow, fast = bench_in_turn([Engine(2.0), Engine(1.0)], load, repeats=2)  # type: ignore[list-item]
    assert order == [2.0] * 7 + [1.0] * 7 + [2.0] * 7 + [1.0] * 7
    prefill, decode = 10 * 9, 7  # 42 prompt tokens in 9 steps, 7 sequences in two
    assert (fast.ttft, fast.tpot) == (prefill, decode)
    predicted = figures(Cost(prefill_seconds=prefill, decode_seconds=decode), load, 0)["tokens_per_second"]
    assert fast.tokens_per_second == pytest.approx(predicted) == pytest.approx(2 * slow.tokens_per_second)


def test_several_sequences_are_stepped_together():
    engine = MODELS.engine(SHAPES)
    found = bench(engine, Workload(prompt=6, new=3, concurrency=4, context=64), repeats=1)
    assert found.bytes_per_step > engine.bytes_read_per_token
    assert found.writing_tokens_per_second == pytest.approx(4 / found.tpot)
    assert found.tokens_per_second < 4 * 3 / found.ttft, "the time of the prompts counts"
    assert prefill_seconds(engine, LOAD) > 0
