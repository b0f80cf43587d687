"""What a model costs: published totals to the digit, laws that every price must keep, errors that help."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import families, kinds
from pennyweight.formats import packed_int
from pennyweight.model.blocks import Block
from pennyweight.model.demand import Budget, Workload
from pennyweight.model.shapes import (
    Attention,
    Dense,
    Embedding,
    GatedMLP,
    Head,
    MoE,
    Noop,
    Norm,
    Shape,
    Sparsity,
    parameters,
)
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import offers, planning
from pennyweight.prices.cost import (
    Cost,
    computed,
    figures,
    paged_kv_bytes,
    price,
    total,
)
from pennyweight.prices.machine import Machine
from pennyweight.prices.memory import workspace_bytes
from pennyweight.search import Infeasible
from tests import gpt_oss

GIB, MIB = 2**30, 2**20
ATTENTION = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=48)
# One byte and one operation a second: seconds are then bytes or operations themselves.
READER = Machine(name="reader", memory_bytes=1, bandwidth=1.0, flops=1e30, bandwidth_share=1.0, flops_share=1.0)
ADDER = dataclasses.replace(READER, bandwidth=1e30, flops=1.0)


@pytest.fixture(scope="module")
def parent():
    return families.shapes(json.loads(json.dumps(gpt_oss.PARENT)))


@pytest.fixture(scope="module")
def child():
    return families.shapes(json.loads(json.dumps(gpt_oss.CHILD)))


# ------------------------------------------------------------------------------------------- published totals


def test_the_released_child_has_the_published_layout(child):
    attention = [shape for shape in child.values() if isinstance(shape, Attention)]
    assert [shape.window for shape in attention].count(None) == 10
    assert [shape.window for shape in attention].count(8192) == 8
    assert [shape.window for shape in attention].count(128) == 18
    assert [shape.num_experts for shape in child.values() if isinstance(shape, MoE)].count(64) == 18


def test_parameters_of_gpt_oss_and_of_its_child_are_the_published_ones(parent, child):
    expert = 3 * 2880**2 + 3 * 2880
    assert parameters(parent) == 116_829_156_672
    assert parameters(child) == 88_150_438_080
    # 18 layers lost 64 experts and as many rows of the router each
    assert parameters(parent) - parameters(child) == 18 * 64 * (expert + 2880 + 1)


@pytest.mark.parametrize(
    ("tokens", "of_parent", "of_child"),
    [
        (8192, 292.5, 292.5),
        (16384, 580.5, 452.5),
        (65536, 2308.5, 1412.5),
        (131072, 4612.5, 2692.5),
    ],
)
def test_kv_cache_of_gpt_oss_and_of_its_child_in_mib(parent, child, tokens, of_parent, of_child):
    assert planning.sequence_kv_bytes(parent, tokens) / MIB == of_parent
    assert planning.sequence_kv_bytes(child, tokens) / MIB == of_child


def test_windows_save_what_the_model_card_says(parent, child):
    assert planning.kv_saving(parent, child, 131072) == pytest.approx(0.416, abs=5e-4)
    assert planning.mean_kv_saving(parent, child, Workload(prompt=65536, new=65536)) == pytest.approx(0.407, abs=5e-4)
    assert planning.mean_kv_saving(parent, child, Workload(prompt=4096, new=4096)) == 0.0


@pytest.mark.parametrize(("name", "pool_gib", "sequences"), [("child", 38.72, 21.52), ("parent", 16.57, 6.54)])
def test_a_paged_server_fits_as_many_sequences_as_its_logs_say(request, name, pool_gib, sequences):
    shapes = request.getfixturevalue(name)
    reserved = paged_kv_bytes(shapes, 131072, batched_tokens=8192, bytes_per_value=1)
    assert pool_gib * GIB / reserved == pytest.approx(sequences, rel=1e-3)


def test_a_paged_server_saves_less_than_the_cache_itself(parent, child):
    paged = [paged_kv_bytes(shapes, 131072, batched_tokens=8192) for shapes in (parent, child)]
    assert paged[1] / paged[0] == pytest.approx(0.710, abs=1e-3)
    assert paged[1] > planning.sequence_kv_bytes(child, 131072)


def test_a_paged_server_pads_every_group_to_the_size_that_costs_least():
    def layers(count: int, window: int | None, start: int) -> dict[Slot, Shape]:
        shape = dataclasses.replace(ATTENTION, window=window)
        return {Slot("mixer", start + i): shape for i in range(count)}

    width = 2 * 2 * 48 * 2  # K and V, 2 heads of 48, 2 bytes
    assert paged_kv_bytes(layers(7, None, 0), 100, batched_tokens=8) == 7 * 100 * width
    mixed = layers(3, None, 0) | layers(2, 10, 3)
    # groups of 3: 3 full layers and 2 window layers padded to 3; groups of 2: 4 full and 2 window layers
    window_tokens = 10 - 1 + 2 * 8
    assert paged_kv_bytes(mixed, 100, batched_tokens=8) == (3 * 100 + 3 * window_tokens) * width
    assert paged_kv_bytes(mixed, 20, batched_tokens=8) == (3 * 20 + 3 * 20) * width, "never more than the sequence"
    assert paged_kv_bytes({Slot("ffn", 0): Noop(hidden_size=8)}, 100, batched_tokens=8) == 0


# ------------------------------------------------------------------------------------------------------ memory


def test_fp8_halves_the_cache(parent, child):
    for shapes in (parent, child):
        for shape in shapes.values():
            assert shape.state_bytes(16384, bytes_per_value=1) * 2 == shape.state_bytes(16384)
        halved = paged_kv_bytes(shapes, 65536, batched_tokens=8192, bytes_per_value=1)
        assert halved * 2 == paged_kv_bytes(shapes, 65536, batched_tokens=8192)


def test_head_dim_is_never_hidden_size_over_heads():
    assert ATTENTION.head_dim != ATTENTION.hidden_size // ATTENTION.num_heads
    assert ATTENTION.state_bytes(257) == 2 * 2 * 48 * 257 * 2
    assert dataclasses.replace(ATTENTION, hidden_size=640).state_bytes(257) == ATTENTION.state_bytes(257)
    named = families.shapes({**gpt_oss.PARENT, "model_type": "llama", "head_dim": 62})[Slot("mixer", 1)]
    assert named.state_bytes(1) == 2 * 8 * 62 * 2
    unnamed = {key: value for key, value in gpt_oss.PARENT.items() if key != "head_dim"}
    unnamed |= {"model_type": "llama", "num_attention_heads": 32}
    assert families.shapes(unnamed)[Slot("mixer", 1)].head_dim == 2880 // 32  # where a config names none


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_window_keeps_the_lesser_of_window_and_tokens(tokens, window):
    whole, windowed = ATTENTION, dataclasses.replace(ATTENTION, window=window)
    assert windowed.state_bytes(tokens) == whole.state_bytes(min(tokens, window)) <= whole.state_bytes(tokens)


@pytest.mark.parametrize(
    "shape", [GatedMLP(hidden_size=8, intermediate_size=9), Dense(hidden_size=8), Noop(hidden_size=8)]
)
def test_only_attention_keeps_keys_and_values(shape):
    assert shape.state_bytes(1000) == 0


def test_memory_is_weights_and_every_sequence_s_cache_at_full_context_and_workspace():
    shapes = {Slot("embed"): Embedding(vocab_size=257, hidden_size=64, tied=True), Slot("mixer", 0): ATTENTION}
    shapes |= {Slot("norm"): Norm(hidden_size=64), Slot("head"): Head(vocab_size=257, hidden_size=64, tied=True)}
    workload = Workload(prompt=10, new=20, concurrency=3, context=63)
    workspace = workspace_bytes(shapes.values(), workload)
    found = figures(total(shapes, workload, computed(READER)), workload, workspace)
    assert found["weight_bytes"] == 2 * parameters(shapes)
    # Norms are float32 in memory; 63 positions take whole blocks of 16.
    assert found["memory_bytes"] == 2 * parameters(shapes) + 2 * 2 * 64 + 3 * 2 * 2 * 48 * 64 * 2 + workspace
    # The stream, what is added to it and its norm; queries, keys and values; what o_proj reads. Logits of all
    # sequences, and tables of 1024 positions.
    of_token = 64 + (128 + 128) + 128 + (2 * 4 * 48 + 128) + 256
    assert workspace == 4 * (10 * 3 * of_token + 3 * 257 + 1024 * 48)


def test_the_work_space_is_that_of_a_step_however_many_sequences_there_are():
    def of_activations(**load: int) -> int:
        load = {"new": 1, "context": 200_000, **load}
        return workspace_bytes([ATTENTION], Workload(**load))

    assert of_activations(prompt=100_000) == of_activations(prompt=512) > of_activations(prompt=511)
    assert of_activations(prompt=512, concurrency=64) == of_activations(prompt=512)
    assert of_activations(prompt=8, concurrency=64) == of_activations(prompt=512)
    assert of_activations(prompt=8, concurrency=32) == of_activations(prompt=256)


def test_a_window_reserves_its_positions_and_those_of_a_step_that_moves_it_on():
    windowed = dataclasses.replace(ATTENTION, window=100)

    def reserved(context: int, **changes: str) -> float:
        load = Workload(prompt=1, new=1, context=context, **changes)
        return price(windowed, load, computed(READER)).state_bytes

    each = 2 * 2 * 48
    assert reserved(10_000) == 624 * each * 2, "100 + 512, in blocks of 16"
    assert reserved(300) == 304 * each * 2, "never more than the context"
    assert reserved(10_000, cache="float32") == 624 * each * 4
    assert reserved(10_000, cache="int8") == 624 * (each + 2 * 2 * 2), "a scale of two bytes a head of keys and values"


def test_smaller_keys_and_values_are_read_in_less_time():
    times = [computed(READER)(ATTENTION, Workload(cache=cache))[1] for cache in ("int8", "float16", "float32")]
    assert times == sorted(times) and len(set(times)) == 3
    with pytest.raises(ValueError, match="cannot be kept in 'fp4'; float16, int8, float32"):
        Workload(cache="fp4")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- seconds


@pytest.mark.parametrize(
    ("experts", "distinct"),
    [
        (128, [4.0, 15.3, 28.7, 51.0, 81.7, 111.2, 125.8, 128]),
        (64, [4.0, 14.6, 25.8, 41.2, 55.9, 63.0, 64.0, 64]),
    ],
)
def test_a_batch_reads_the_experts_that_any_of_its_sequences_is_routed_to(experts, distinct):
    moe = MoE(hidden_size=63, intermediate_size=257, num_experts=experts, top_k=4, bias=True, router_bias=True)
    always = sum(weight.nbytes for weight in moe.weights() if weight.active == 1)
    of_experts = moe.nbytes - always
    read = []
    for batch in (1, 4, 8, 16, 32, 64, 128, 256):
        _, decode = computed(READER)(moe, Workload(concurrency=batch))
        read.append((decode - always) / of_experts * experts)
    assert read == pytest.approx(distinct, abs=0.06)


def test_halving_the_experts_saves_traffic_only_in_larger_batches(parent):
    moe = parent[Slot("ffn", 20)]
    half = dataclasses.replace(moe, num_experts=64)

    def saved(batch: int) -> float:
        return (
            1
            - computed(READER)(half, Workload(concurrency=batch))[1]
            / computed(READER)(moe, Workload(concurrency=batch))[1]
        )

    assert [saved(batch) for batch in (1, 8, 32, 128)] == pytest.approx([0.0, 0.10, 0.32, 0.49], abs=0.01)


def test_decoding_reads_weights_once_and_every_sequence_s_cache():
    workload = Workload(prompt=100, new=57, concurrency=3)
    _, decode = computed(READER)(ATTENTION, workload)
    assert decode == ATTENTION.nbytes + 3 * ATTENTION.state_bytes(100 + 57 // 2)


def test_prefill_computes_every_pair_that_may_see_each_other():
    workload = Workload(prompt=63, new=1, concurrency=2)
    matrices = sum(weight.parameters for weight in ATTENTION.weights() if len(weight.shape) > 1)

    def operations(window: int | None) -> float:
        pairs = sum(1 for i in range(63) for j in range(i + 1) if window is None or i - j < window)
        return 2 * 63 * 2 * matrices + 2 * pairs * 2 * 2 * 4 * 48  # q k and p v, a product and a sum each

    for window in (None, 1, 10, 63, 257):
        prefill, _ = computed(ADDER)(dataclasses.replace(ATTENTION, window=window), workload)
        assert prefill == operations(window)


def test_a_block_takes_as_long_as_the_slower_of_reading_and_computing():
    workload = Workload(prompt=63, new=2, concurrency=5)
    both = dataclasses.replace(
        READER, bandwidth=1e9, flops=1e9, bandwidth_share=0.5, flops_share=0.25, block_seconds=7.0
    )
    reading, computing = computed(READER)(ATTENTION, workload), computed(ADDER)(ATTENTION, workload)
    expected = [7 + max(read / 0.5e9, add / 0.25e9) for read, add in zip(reading, computing, strict=True)]
    assert computed(both)(ATTENTION, workload) == pytest.approx(expected)


def test_the_logits_are_charged_to_the_slot_that_holds_their_matrix():
    matrix = (257 * 63 * 2, 257 * 63 * 2)
    tied = (Embedding(vocab_size=257, hidden_size=63, tied=True), Head(vocab_size=257, hidden_size=63, tied=True))
    apart = (Embedding(vocab_size=257, hidden_size=63), Head(vocab_size=257, hidden_size=63))
    assert [computed(READER)(shape, Workload()) for shape in tied] == [matrix, (0, 0)]
    assert [computed(READER)(shape, Workload()) for shape in apart] == [(0, 0), matrix]
    packed = dataclasses.replace(tied[0], stored=packed_int.Spec(8, 21))
    assert computed(READER)(packed, Workload())[1] < 0.6 * matrix[1]
    for free in (Norm(hidden_size=63), Noop(hidden_size=63)):
        assert computed(READER)(free, Workload()) == (0.0, 0.0)


def test_only_the_last_position_of_a_prompt_gets_logits():
    head = Head(vocab_size=257, hidden_size=63)
    assert computed(ADDER)(head, Workload(prompt=1000, concurrency=3))[0] == 3 * 2 * 257 * 63


machines = st.sampled_from([Machine.load(name) for name in Machine.shipped()])
workloads = st.builds(Workload, prompt=st.integers(1, 5000), new=st.integers(1, 500), concurrency=st.integers(1, 300))


@settings(deadline=None, derandomize=True)
@given(
    machines,
    workloads,
    st.integers(1, 4000),
    st.integers(0, 4000),
    st.sampled_from([BFLOAT16, packed_int.Spec(8, 1), packed_int.Spec(4, 1)]),
)
def test_more_bytes_never_take_less_time(machine, workload, narrow, more, stored):
    pairs = [
        tuple(GatedMLP(hidden_size=256, intermediate_size=width, stored=stored) for width in (narrow, narrow + more)),
        tuple(dataclasses.replace(ATTENTION, window=window) for window in (narrow, narrow + more)),
        tuple(dataclasses.replace(ATTENTION, num_kv_heads=heads) for heads in (narrow, narrow + more)),
        tuple(Head(vocab_size=vocab, hidden_size=64) for vocab in (narrow, narrow + more)),
    ]
    for less, greater in pairs:
        costs = [dataclasses.astuple(price(shape, workload, computed(machine))) for shape in (less, greater)]
        assert all(a <= b for a, b in zip(*costs, strict=True))


@settings(deadline=None, derandomize=True)
@given(machines, workloads, st.integers(1, 40))
def test_fewer_bits_never_take_more_time(machine, workload, width):
    made = [
        GatedMLP(hidden_size=256, intermediate_size=64 * width, stored=stored)
        for stored in (packed_int.Spec(4, 64), packed_int.Spec(8, 64), BFLOAT16)
    ]
    costs = [dataclasses.astuple(price(shape, workload, computed(machine))) for shape in made]
    assert all(a <= b <= c for a, b, c in zip(*costs, strict=True))


def test_a_token_is_in_few_experts_at_once(parent):
    """The work space of gpt-oss-120B's prefill at batch 1: 0.08 GiB, not that of a token in all 128 experts (2.1)."""
    assert workspace_bytes(parent.values(), Workload(prompt=512)) / 2**30 == pytest.approx(0.084, abs=0.001)


def test_costs_of_slots_add_up(parent):
    workload, seconds = Workload(prompt=1000, new=63, concurrency=7), computed(Machine.load("h100"))
    summed = total(parent, workload, seconds)
    rows = np.array([dataclasses.astuple(price(shape, workload, seconds)) for shape in parent.values()])
    assert dataclasses.astuple(summed) == pytest.approx(rows.sum(axis=0))
    assert total({}, workload, seconds) == Cost()


def test_throughput_counts_generated_tokens_over_prefill_and_decode_time():
    workload = Workload(prompt=100, new=20, concurrency=3)
    found = figures(Cost(5, 5, 7, 2.0, 0.1), workload, 11)
    assert found == {
        "weight_bytes": 5,
        "memory_bytes": 23,
        "ttft_seconds": 2.0,
        "tpot_seconds": 0.1,
        "tokens_per_second": pytest.approx(3 * 20 / (2.0 + 20 * 0.1)),
    }
    assert figures(Cost(), workload, 0)["tokens_per_second"] == math.inf


def small_model() -> dict[Slot, Block]:
    config = {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return families.blocks(config)


@pytest.mark.parametrize("seed", range(6))
def test_a_bound_on_throughput_allows_what_the_bound_on_time_allows(seed):
    rng = np.random.default_rng(seed)
    workload = Workload(
        prompt=int(rng.integers(1, 500)), new=int(rng.integers(1, 200)), concurrency=int(rng.integers(1, 9))
    )
    seconds, blocks = computed(Machine.load("m2-max")), small_model()
    table = {}
    for slot, block in blocks.items():
        free = {
            c.key(): 0.0
            for c in offers.single_choices(block.shape, ("noop", "ffn_width", "kv_heads"), scored_tokens=512)
        }
        row = offers.offers(block, free, workload, seconds)
        table[slot] = [row[i] for i in sorted(rng.choice(len(row), size=min(3, len(row)), replace=False))]
    choices = list(itertools.product(*[range(len(row)) for row in table.values()]))
    rates = []
    for choice in choices:
        costs = [row[v].cost for row, v in zip(table.values(), choice, strict=True)]
        rates.append(figures(sum(costs, Cost()), workload, 0)["tokens_per_second"])
    for rate in (*rng.uniform(min(rates), max(rates), 4), rates[0], min(rates), max(rates)):
        problem = offers.problem(table, Budget(tokens_per_second=rate), workload)
        allowed = [problem.allows(choice) for choice in choices]
        assert allowed == [found >= rate * (1 - 1e-12) for found in rates]
    with pytest.raises(Infeasible, match="tokens_per_second"):
        too_fast = offers.problem(table, Budget(tokens_per_second=1.001 * max(rates)), workload)
        kinds.load("search", "mip").solve(too_fast)


def test_fixed_bytes_are_taken_off_the_limits_and_the_rest_is_left_alone():
    workload, blocks = Workload(prompt=63, new=1), small_model()
    shapes = {slot: block.shape for slot, block in blocks.items()}
    table = {slot: offers.offers(block, {}, workload, computed(READER)) for slot, block in blocks.items()}
    budget = Budget(weight_bytes=10**6, memory_bytes=2 * 10**6, ttft_seconds=3.0, tpot_seconds=2.0)
    problem = offers.problem(table, budget, workload)
    spent_before = {
        "weight_bytes": offers.FILE_OVERHEAD,
        "memory_bytes": workspace_bytes(shapes.values(), workload),
        "ttft_seconds": 0,
        "tpot_seconds": 0,
    }
    assert dict(zip(problem.names, problem.limits, strict=True)) == {
        name: bound - spent_before[name] for name, bound in budget.bounds().items()
    }


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["prompt", "new", "concurrency"])
def test_a_workload_needs_at_least_one_of_everything(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Workload(**{name: 0})


def test_a_context_must_hold_prompt_and_new_tokens():
    assert Workload(prompt=63, new=1).context == 64
    assert Workload(prompt=63, new=1, context=64).context == 64
    with pytest.raises(ValueError, match=r"context 63 is shorter than prompt 63 \+ new 1"):
        Workload(prompt=63, new=1, context=63)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Budget)])
@pytest.mark.parametrize("bound", [0, -1, math.nan])
def test_a_bound_must_be_above_zero(name, bound):
    with pytest.raises(ValueError, match=f"{name} is {bound}; a bound must be above 0"):
        Budget(**{name: bound})


def test_a_budget_without_bounds_has_none():
    assert Budget().bounds() == {}
    assert Budget(weight_bytes=1).bounds() == {"weight_bytes": 1}


@pytest.mark.parametrize("name", sorted(Machine.shipped()))
def test_shipped_machines_load_and_say_where_their_numbers_are_from(name):
    machine = Machine.load(name)
    assert machine.source
    assert 0 < machine.bandwidth_share <= 1
    assert 0 < machine.flops_share <= 1
    assert machine.flops > machine.bandwidth > machine.memory_bytes > 10**9


def test_an_unknown_machine_is_answered_with_those_there_are():
    with pytest.raises(ValueError) as err:
        Machine.load("abacus")
    assert str(err.value) == f"no machine 'abacus': give a JSON file or one of {', '.join(Machine.shipped())}"


def test_a_machine_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(READER)))
    assert Machine.load(str(path)) == READER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON: Expecting property name"),
        ('{"name": "x"}', "memory_bytes: Field required"),
        ('{"name": "x", "memory_bytes": 1, "bandwidth": 0, "flops": 1}', "bandwidth: Input should be greater than 0"),
        ('{"name": "x", "memory_bytes": 1, "bandwidth": 1, "flops": 1, "colour": 1}', "colour"),
        ("[1]", "should be a dictionary"),
    ],
)
def test_a_file_that_is_no_machine_is_named_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"mine.json.*{reason}"):
        Machine.load(str(path))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_reads_the_columns_that_any_of_its_sequences_keeps(batch):
    """Each leaves out its own: of a column kept with probability p by each of B, 1 - (1 - p)^B is read."""
    dense = GatedMLP(hidden_size=256, intermediate_size=512)
    sparse = dataclasses.replace(dense, sparsity=Sparsity(0.25, 0.5))
    share = {"gate_proj": 0.75, "up_proj": 0.75, "down_proj": 0.5}
    wanted = sum(weight.nbytes * (1 - (1 - share.get(weight.name, 1.0)) ** batch) for weight in sparse.weights())
    workload = Workload(prompt=7, new=9, concurrency=batch)
    prefill, decode = computed(READER)(sparse, workload)
    assert decode == pytest.approx(wanted)
    assert prefill == sum(weight.nbytes for weight in sparse.weights()), "prompts are read with all columns"
