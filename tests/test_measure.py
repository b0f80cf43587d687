"""Measuring this machine: slopes separate a block from the rest, and nothing is measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pennyweight import measure, planning
from pennyweight.cost import Machine, Workload
from pennyweight.slots import BFLOAT16, Attention, GatedMLP, Noop, Stored

ATTENTION = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
FFN = GatedMLP(hidden_size=64, intermediate_size=128)
LOAD = Workload(prompt=32, new=16, concurrency=1, context=64)
CONFIG = {"model_type": "llama", "hidden_size": 64, "vocab_size": 300}


class Clock:
    """Stands in for timed models: a stack of n blocks takes 7 + 3 n to prefill and 0.5 + 0.25 n to decode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rising: bool = True) -> None:
        self.stacks: list[Any] = []
        sign = 1 if rising else -1

        def stack(_config: Any, _shapes: Any, shape: Any, copies: int) -> int:
            self.stacks.append(shape)
            return copies

        class Stepper:
            def __init__(self, copies: int, _workload: Workload) -> None:
                self.copies = copies

            def step(self) -> float:
                return 0.5 + sign * 0.25 * self.copies

        monkeypatch.setattr(measure, "_stack", stack)
        monkeypatch.setattr(measure, "prefill_seconds", lambda copies, _workload: 7 + sign * 3 * copies)
        monkeypatch.setattr(measure, "Stepper", Stepper)


def test_the_slope_is_one_block_and_the_rest_what_no_block_takes(monkeypatch):
    Clock(monkeypatch)
    found = measure.latencies(CONFIG, {}, [FFN], LOAD)
    assert found.blocks == {FFN: (pytest.approx(3), pytest.approx(0.25))}
    assert found.rest == (pytest.approx(7), pytest.approx(0.5))


def test_prices_look_shapes_up_and_charge_the_rest_to_the_head(monkeypatch):
    Clock(monkeypatch)
    seconds = measure.latencies(CONFIG, {}, [FFN, ATTENTION], LOAD).seconds()
    head = planning.slots({**CONFIG, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128})
    shapes = {type(shape).__name__: shape for shape in head.values()}
    assert seconds(FFN, LOAD) == (pytest.approx(3), pytest.approx(0.25))
    assert seconds(Noop(hidden_size=64), LOAD) == (0, 0)
    assert seconds(shapes["Head"], LOAD) == (pytest.approx(7), pytest.approx(0.5))
    assert seconds(shapes["Embedding"], LOAD) == (0, 0)


def test_shapes_that_run_the_same_code_are_measured_once(monkeypatch):
    clock = Clock(monkeypatch)
    narrow, wide = (dataclasses.replace(ATTENTION, window=window) for window in (16, 64))
    packed = dataclasses.replace(FFN, stored=Stored(bits=4, group=64))
    assert packed.stored != BFLOAT16
    seconds = measure.latencies(CONFIG, {}, [ATTENTION, narrow, wide, FFN, packed], LOAD).seconds()
    assert set(clock.stacks) == {ATTENTION, narrow, FFN}  # a window of the whole context is none
    assert seconds(packed, LOAD) == seconds(FFN, LOAD)
    assert seconds(wide, LOAD) == seconds(ATTENTION, LOAD)


def test_what_is_in_the_cache_is_not_measured_again(monkeypatch, tmp_path: Path):
    clock, cache = Clock(monkeypatch), tmp_path / "deep" / "latencies.json"
    first = measure.latencies(CONFIG, {}, [FFN], LOAD, cache=cache)
    measured = len(clock.stacks)
    assert measure.latencies(CONFIG, {}, [FFN], LOAD, cache=cache) == first
    assert len(clock.stacks) == measured
    measure.latencies(CONFIG, {}, [FFN], dataclasses.replace(LOAD, prompt=33), cache=cache)
    assert len(clock.stacks) > measured


def test_a_machine_too_busy_to_measure_is_refused(monkeypatch):
    Clock(monkeypatch, rising=False)
    with pytest.raises(RuntimeError, match="other work is running"):
        measure.latencies(CONFIG, {}, [FFN], LOAD)


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
def test_stacks_hold_copies_of_one_block_alone(pico, shape):
    config = json.loads((pico("llama") / "config.json").read_text())
    shapes = planning.slots(config)
    stack = measure._stack(config, shapes, shape, 3)
    kind = "mlp" if shape is FFN else "self_attn"
    named = [name for name, _ in stack.named_parameters() if ".layers." in name and "layernorm" not in name]
    assert {name.split(".")[3] for name in named} == {kind}
    assert {name.split(".")[2] for name in named} == {"0", "1", "2"}
