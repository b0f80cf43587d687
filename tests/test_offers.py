"""What a slot can become: combinations that make sense, priced by the shape that results, none lost that could win."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight import families, variants
from pennyweight.cli import app
from pennyweight.formats import Grid, packed_int
from pennyweight.model.blocks import Block
from pennyweight.model.choices import PARENT, Choice
from pennyweight.model.demand import Budget, Demand, Workload, batches
from pennyweight.model.shapes import Attention, Embedding, GatedMLP, Head, Norm, Shape
from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16
from pennyweight.prices import measure, offers, planning
from pennyweight.prices.cost import Cost, computed, figures, model_figures, price
from pennyweight.prices.machine import Machine
from pennyweight.prices.offers import combinations, single_choices, undominated
from pennyweight.search import Infeasible, mip
from pennyweight.units import show_bytes
from pennyweight.variants import bits, reshape

ATTENTION = Attention(hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=32, qkv_bias=True)
MLP = GatedMLP(hidden_size=256, intermediate_size=1024)
WORKLOAD = Workload(prompt=63, new=257, concurrency=3)
SECONDS = computed(Machine.load("m2-max"))
CONFIG = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


AXES = variants.order()


def scored(shape: Shape, seed: int = 0, axes=AXES) -> dict[str, float]:
    """Random scores of all single choices; what shrinks more tends to hurt more."""
    rng = np.random.default_rng(seed)
    singles = single_choices(shape, axes, scored_tokens=512)
    return {choice.key(): float(rng.random() * len(str(choice))) for choice in singles}


# --------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize("shape", [ATTENTION, MLP], ids=["mixer", "ffn"])
def test_a_combination_has_one_spec_per_axis_in_order_and_the_parent_comes_first(shape):
    found = list(combinations(shape, scored(shape)))
    assert found[0] == (PARENT, shape, 0.0)
    for choice, _, _ in found:
        axes = [axis for axis, _ in choice.specs]
        assert axes == [axis for axis in variants.order() if axis in axes]
    assert len({choice for choice, _, _ in found}) == len(found)


@pytest.mark.parametrize("shape", [ATTENTION, MLP], ids=["mixer", "ffn"])
def test_a_block_taken_out_has_nothing_left_to_change_and_a_linear_one_only_how_it_is_kept(shape):
    found = [{axis for axis, _ in choice.specs} for choice, _, _ in combinations(shape, scored(shape))]
    assert {"noop"} in found
    assert {"linear", "bits"} in found
    assert all(axes == {"noop"} for axes in found if "noop" in axes)
    assert all(
        len(axes) <= 2 and axes <= {"linear", "bits", "mid_bits", "trellis"} for axes in found if "linear" in axes
    )


def test_axes_that_leave_each_other_alone_multiply():
    axes = ("kv_heads", "window", "bits")
    counts = [1 + len(single_choices(ATTENTION, (axis,), scored_tokens=512)) for axis in axes]
    assert counts[:2] == [1 + 4, 1 + 3]  # 2 or 1 heads, made in 2 ways; 256, 128, 64
    assert counts[2] == 1 + len(bits.options(ATTENTION)) >= 1 + 4  # int8, int4 of 3 groups, and what else there is
    assert len(list(combinations(ATTENTION, scored(ATTENTION, axes=axes)))) == math.prod(counts)


def test_only_what_was_scored_is_combined():
    width, narrower = single_choices(MLP, ("ffn_width",), scored_tokens=512)[:2]
    found = [choice for choice, _, _ in combinations(MLP, {width.key(): 1.0})]
    assert found == [PARENT, width]
    assert narrower not in found
    assert [choice for choice, _, _ in combinations(MLP, {})] == [PARENT]


@pytest.mark.parametrize("shape", [ATTENTION, MLP], ids=["mixer", "ffn"])
def test_costs_are_those_of_the_resulting_shape_and_scores_add_up(shape):
    slot = Slot("mixer" if shape is ATTENTION else "ffn", 1)
    scores = scored(shape)
    for offer in offers.offers(PLACES[slot].having(shape), scores, WORKLOAD, SECONDS):
        resulting = reshape(shape, offer.choice)
        assert offer.shape == resulting
        assert offer.cost == price(resulting, WORKLOAD, SECONDS)
        assert offer.file_bytes == offers.file_bytes(PLACES[slot].having(resulting))
        assert offer.score == pytest.approx(sum(scores[Choice((item,)).key()] for item in offer.choice.specs))


@pytest.mark.parametrize(
    ("scored_tokens", "windows"), [(1024, [512, 256, 128, 64]), (512, [256, 128, 64]), (511, [128, 64]), (127, [])]
)
def test_a_window_longer_than_half_the_scored_text_is_not_offered(scored_tokens, windows):
    found = single_choices(ATTENTION, ("window",), scored_tokens=scored_tokens)
    assert [choice["window"].tokens for choice in found] == windows


def test_only_the_axes_asked_for_are_offered_in_their_order():
    found = single_choices(MLP, ("bits", "noop"), scored_tokens=512)
    assert [axis for choice in found for axis, _ in choice.specs] == ["noop"] + ["bits"] * len(bits.options(MLP))
    assert single_choices(MLP, (), scored_tokens=512) == []
    assert single_choices(Norm(hidden_size=256), variants.order(), scored_tokens=512) == []


# ------------------------------------------------------------------------------------------------------ dominated


def offer(*numbers: float) -> offers.Offer:
    score, file_bytes, state, prefill, decode = numbers
    cost = dataclasses.replace(
        price(MLP, WORKLOAD, SECONDS), state_bytes=state, prefill_seconds=prefill, decode_seconds=decode
    )
    return offers.Offer(PARENT, MLP, score, cost, int(file_bytes))


def test_an_offer_that_another_beats_on_every_count_is_dropped():
    best = offer(1, 5, 5, 5, 5)
    assert undominated([offer(2, 6, 6, 6, 6), best]) == [best]
    assert undominated([offer(1, 5, 5, 5, 6), best]) == [best]
    for axis in range(5):  # better on a single count is enough to stay
        numbers = [2.0, 6.0, 6.0, 6.0, 6.0]
        numbers[axis] = 0.5
        assert undominated([best, offer(*numbers)]) == [best, offer(*numbers)]


def test_an_offer_that_is_better_under_a_further_demand_alone_stays():
    best, worse = offer(1, 5, 5, 5, 5), offer(2, 6, 6, 6, 6)
    slow, fast = (dataclasses.replace(worse.cost, decode_seconds=seconds) for seconds in (2.0, 1.0))
    best, worse = dataclasses.replace(best, also=(slow,)), dataclasses.replace(worse, also=(fast,))
    assert undominated([best, worse]) == [best, worse]
    assert undominated([best, dataclasses.replace(worse, also=(slow,))]) == [best]


def test_of_equal_offers_the_first_stays_and_the_order_is_kept():
    first, second = offer(1, 5, 5, 5, 5), offer(1, 5, 5, 5, 5)
    cheaper = offer(9, 1, 1, 1, 1)
    kept = undominated([first, cheaper, second])
    assert kept[0] is first
    assert kept[1] is cheaper
    assert len(kept) == 2


@pytest.mark.parametrize("seed", range(8))
def test_dropping_the_dominated_drops_no_optimum(seed):
    rng = np.random.default_rng(seed)
    shapes = families.shapes(CONFIG)
    whole = {
        slot: offers.offers(PLACES[slot].having(shape), scored(shape, seed=seed + 100 * i), WORKLOAD, SECONDS)
        for i, (slot, shape) in enumerate(shapes.items())
    }
    kept = {slot: undominated(row) for slot, row in whole.items()}
    assert sum(map(len, kept.values())) < sum(map(len, whole.values()))

    def between(count) -> float:
        least, most = (sum(extreme(count(o) for o in row) for row in whole.values()) for extreme in (min, max))
        return least + rng.uniform(0.2, 0.7) * (most - least)

    overhead = offers.FILE_OVERHEAD
    memory = offers.fixed_spending(whole, WORKLOAD)["memory_bytes"]
    budgets = [
        Budget(weight_bytes=int(overhead + between(lambda o: o.file_bytes))),
        Budget(memory_bytes=int(memory + between(lambda o: o.resident_bytes + o.cost.state_bytes))),
        Budget(
            weight_bytes=int(overhead + between(lambda o: o.file_bytes)),
            ttft_seconds=between(lambda o: o.cost.prefill_seconds),
            tpot_seconds=between(lambda o: o.cost.decode_seconds),
        ),
    ]
    for budget in budgets:
        solved = [mip.solve(offers.problem(table, budget, WORKLOAD)).score for table in (whole, kept)]
        if budget.memory_bytes is not None:  # the work space that is enough for all of fewer offers can be smaller
            assert solved[1] <= solved[0] * (1 + 1e-9)
            continue
        assert solved[0] == pytest.approx(solved[1], rel=1e-9, abs=1e-12)
        assert solved[0] > 0, "the budget should bite"


# -------------------------------------------------------------------------------------------------------- demands


def priced(also=(), seed=3):
    return {
        slot: offers.offers(place, scored(place.shape, seed=seed + i), WORKLOAD, SECONDS, also)
        for i, (slot, place) in enumerate(PLACES.items())
    }


def of_parent(table, number):
    return sum(row[0].also[number].prefill_seconds for row in table.values())


def test_a_further_demand_is_met_at_its_own_workload():
    """The same bound on the first token that the first workload keeps easily binds under long prompts."""
    long = dataclasses.replace(WORKLOAD, prompt=16 * WORKLOAD.prompt, context=0)
    free = Demand(workload=long, budget=Budget(ttft_seconds=1e6))
    table = priced([free])
    for row in table.values():
        assert [offer.also for offer in row] == [(price(offer.shape, long, SECONDS),) for offer in row]
    limit = 0.7 * of_parent(table, 0)
    loose, tight = Budget(weight_bytes=10**12), Demand(workload=long, budget=Budget(ttft_seconds=limit))
    without = mip.solve(offers.problem(table, loose, WORKLOAD))
    both = mip.solve(offers.problem(table, loose, WORKLOAD, [tight]))

    def spent(solution):
        picked = (row[v] for row, v in zip(table.values(), solution.choice, strict=True))
        return sum(offer.also[0].prefill_seconds for offer in picked)

    assert spent(without) > limit >= spent(both)
    assert both.score > without.score
    kept = {slot: undominated(row) for slot, row in table.items()}
    assert mip.solve(offers.problem(kept, loose, WORKLOAD, [tight])).score == pytest.approx(both.score)


def test_two_demands_with_the_same_bound_are_two_rows_of_the_problem():
    long = dataclasses.replace(WORKLOAD, prompt=16 * WORKLOAD.prompt, context=0)
    also = [Demand(workload=long, budget=Budget(ttft_seconds=1.0, tokens_per_second=10))]
    found = offers.problem(priced(also), Budget(ttft_seconds=2.0), WORKLOAD, also)
    assert found.names[0] == "ttft_seconds"
    assert [name.partition(" of ")[0] for name in found.names[1:]] == ["ttft_seconds", "tokens_per_second"]
    assert list(found.limits) == [2.0, 1.0, long.concurrency * long.new / 10]


def test_a_further_demand_that_cannot_be_met_is_named_with_what_could_be():
    long = dataclasses.replace(WORKLOAD, prompt=16 * WORKLOAD.prompt, context=0)
    also = [Demand(workload=long, budget=Budget(ttft_seconds=1e-12))]
    table, loose = priced(also), Budget(weight_bytes=10**12)
    with pytest.raises(Infeasible) as raised:
        mip.solve(offers.problem(table, loose, WORKLOAD, also))
    told = offers.in_users_words(raised.value, table, loose, WORKLOAD, also)
    least = sum(min(offer.also[0].prefill_seconds for offer in row) for row in table.values())
    assert f"ttft_seconds of prompts of {long.prompt} and {long.new} new tokens" in str(told)
    assert told.limit == 1e-12
    assert told.nearest == pytest.approx(least)


# ---------------------------------------------------------------------------------------------------------- bytes

PLACES = families.blocks(CONFIG)


def written(block: Block) -> dict[str, torch.Tensor]:
    """Tensors of a slot as they are shipped: bfloat16, or packed with the scale and the shape beside."""
    tensors = {}
    for name, weight in block.tensors().items():
        if len(weight.shape) == 1 or weight.stored == BFLOAT16:
            tensors[name] = torch.zeros(weight.shape, dtype=torch.bfloat16)
        else:
            rows, columns = weight.shape
            scale = torch.ones(rows, columns // weight.stored.group)
            parts = packed_int.pack(torch.zeros(rows, columns, dtype=torch.int8), Grid(scale), weight.stored)
            tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    return tensors


@pytest.mark.parametrize(
    "stored", [BFLOAT16, packed_int.Spec(8, 128), packed_int.Spec(4, 128), packed_int.Spec(4, 32)], ids=str
)
@pytest.mark.parametrize(
    ("slot", "shape"),
    [
        (
            Slot("mixer", 0),
            Attention(hidden_size=384, num_heads=6, num_kv_heads=2, head_dim=128, qkv_bias=True, qk_norm="each head"),
        ),
        (Slot("ffn", 1), GatedMLP(hidden_size=384, intermediate_size=896)),
        (Slot("embed"), Embedding(vocab_size=1001, hidden_size=384)),
        (Slot("head"), Head(vocab_size=1001, hidden_size=384)),
    ],
    ids=["mixer", "ffn", "embed", "head"],
)
def test_file_bytes_are_at_least_what_is_written_and_not_much_more(tmp_path, slot, shape, stored):
    block = PLACES[slot].having(dataclasses.replace(shape, stored=stored))
    save_file({}, tmp_path / "empty", metadata={"format": "pt"})
    save_file(written(block), tmp_path / "slot", metadata={"format": "pt"})
    actual = (tmp_path / "slot").stat().st_size - (tmp_path / "empty").stat().st_size
    promised = offers.file_bytes(block)
    assert actual <= promised <= 1.03 * actual


@pytest.mark.parametrize("shape", [Norm(hidden_size=63), Norm(hidden_size=1)])
def test_small_slots_are_not_promised_too_few_bytes_either(tmp_path, shape):
    save_file({}, tmp_path / "empty", metadata={"format": "pt"})
    block = PLACES[Slot("norm")].having(shape)
    save_file(written(block), tmp_path / "slot", metadata={"format": "pt"})
    actual = (tmp_path / "slot").stat().st_size - (tmp_path / "empty").stat().st_size
    assert actual <= offers.file_bytes(block)
    tied = Head(vocab_size=257, hidden_size=63, tied=True)
    assert offers.file_bytes(PLACES[Slot("head")].having(tied)) == 0, "a tied head writes nothing"


@pytest.mark.parametrize("shards", [1, 5])
def test_a_whole_model_s_files_keep_to_the_sum_and_the_overhead(tmp_path, shards):
    blocks = families.blocks(CONFIG)
    tensors = {name: t for block in blocks.values() for name, t in written(block).items()}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(part, tmp_path / f"model-{i}.safetensors", metadata={"format": "pt"})
    promised = sum(offers.file_bytes(block) for block in blocks.values())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= promised + offers.FILE_OVERHEAD


# ------------------------------------------------------------------------------------------------------------ plan

SHORT = {**CONFIG, "max_position_embeddings": 8192}
LOAD = Workload(prompt=64, new=64)


def planned(budget: Budget, config=SHORT, axes=None, load=LOAD, machine=None) -> planning.Plan:
    return planning.plan(config, load, machine or Machine.load("m2-max"), budget, axes or variants.default())


def test_the_cache_is_told_as_far_as_the_model_goes():
    assert list(planned(Budget()).kv_bytes) == [128, 8192]
    assert list(planned(Budget(), {**SHORT, "max_position_embeddings": 40_000}).kv_bytes) == [128, 8192, 16384, 40_000]
    assert list(planned(Budget(), CONFIG).kv_bytes) == [128, *planning.CONTEXTS], "a config that does not say"
    assert list(planned(Budget(), load=Workload(prompt=8000, new=500)).kv_bytes) == [8192]


@pytest.mark.parametrize(
    ("budget", "axes", "said"),
    [
        (0.5, variants.default(), "bits alone leaves"),
        (0.2, variants.default(), "bits and ffn_width together leave"),
        (0.45, ("noop", "ffn_width"), "noop alone leaves"),
        (0.02, ("bits", "ffn_width"), None),
    ],
)
def test_a_verdict_says_to_what_a_model_shrinks(budget, axes, said):
    whole = planning.stored_bytes(families.shapes(SHORT), 16)
    verdict = planned(Budget(weight_bytes=int(budget * whole)), axes=axes).verdict
    if said is None:
        assert verdict.startswith("does not fit: weight_bytes of")
        return
    assert verdict.startswith(f"fits after shrinking: {said} ")
    assert verdict.endswith(f"% of the parent's {show_bytes(whole)} in 16 bits")
    # What it names is enough, and every one of them is needed.
    named = [axis for axis in axes if axis in verdict.split(" leave")[0]]
    limit = Budget(weight_bytes=int(budget * whole))
    assert planned(limit, axes=tuple(named)).verdict == verdict
    for axis in named:
        fewer = tuple(other for other in axes if other in named and other != axis)
        assert not fewer or not planned(limit, axes=fewer).verdict.startswith("fits")


@pytest.mark.parametrize("more", [-1, 0])
def test_a_budget_that_the_written_files_just_meet_fits_as_it_is(more):
    """Headers are written too: what fits is told as `fit` tells it."""
    enough = offers.FILE_OVERHEAD + sum(offers.file_bytes(block) for block in families.blocks(SHORT).values())
    verdict = planned(Budget(weight_bytes=enough + more)).verdict
    assert (verdict == "fits as it is") == (more == 0)


def test_plan_and_fit_name_what_they_do_not_know(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHORT))
    (tmp_path / "m.json").write_text('{"name": "x", "memory_bytes": "much", "bandwidth": 1, "flops": 1}')
    fit = ("fit", tmp_path, "--out", tmp_path / "out", "--weights", "50%")
    for option, value, said in (
        ("--axes", "Bits", "there is no variants called 'Bits'; there are: bits"),
        ("--axes", "bits,", "there is no variants called ''"),
        ("--machine", "abacus", "no machine 'abacus'"),
        ("--machine", str(tmp_path / "m.json"), "m.json: memory_bytes: Input should be a valid integer"),
        ("--context", "long", "'long' is not a number of tokens"),
        ("--context", "8", "context 8 is shorter than prompt"),
        ("--weights", "some", "'some' is not a size"),
    ):
        told = [CliRunner().invoke(app, [*map(str, each), option, value]) for each in (("plan", tmp_path), fit)]
        assert [each.exit_code for each in told] == [2, 2], told[0].output
        assert told[0].stderr == told[1].stderr and said in told[0].stderr and told[0].stderr.count("\n") == 1
    assert not (tmp_path / "out.run").exists()


def test_a_plan_is_about_this_computer_unless_another_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SHORT))
    here = Machine(name="a computer", memory_bytes=2**30, bandwidth=1e10, flops=1e11)
    monkeypatch.setattr(measure, "machine", lambda **_: here)

    def told(*more: str) -> list[str]:
        done = CliRunner().invoke(app, ["plan", str(tmp_path), *more])
        assert done.exit_code == 0, done.output
        return [line for line in done.stdout.splitlines() if line.startswith("on ")]

    assert told()[0].startswith("on a computer   memory ")
    assert told("--machine", "h100")[0].startswith("on H100   memory ")
    many = told("--throughput", "1tok/s", "--concurrency", "3", "--cache", "int8")
    assert [line.split("   ")[0] for line in many] == [f"on a computer, {count} at once" for count in (1, 2, 3)]
    assert pw.plan(tmp_path / "config.json").figures == planned(Budget(), load=Workload(), machine=here).figures


def test_plan_takes_axes_as_people_write_them_and_says_what_the_model_can(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHORT))

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["plan", str(tmp_path), "--machine", "m2-max", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert told("--weights", "50%", "--axes", "bits, ffn_width") == told("--weights", "50%", "--axes", "bits,ffn_width")
    assert "16384 tokens" not in told()
    said = told("--context", "32k")
    assert "32768 tokens are asked for, the model takes up to 8192" in said and "KV cache       32768" not in said


# -------------------------------------------------------------------------------------------------- one grid of batches

MACHINE = Machine.load("m2-max")
MANY = Workload(prompt=64, new=64, concurrency=64)


def parents(load: Workload) -> dict[str, float]:
    return model_figures(families.shapes(SHORT), load, computed(MACHINE))


def test_throughput_may_be_met_with_fewer_sequences_than_may_run_at_once():
    """What is refused with 64 at once, for their memory, is fast enough with one."""
    one, all_of_them = (parents(dataclasses.replace(MANY, concurrency=count)) for count in (1, 64))
    memory = int(2 * one["memory_bytes"])
    assert memory < all_of_them["memory_bytes"]
    budget = Budget(memory_bytes=memory, tokens_per_second=one["tokens_per_second"] / 2)
    assert planned(budget, load=MANY).verdict == "fits as it is, with 1 sequence at once"
    assert list(planned(budget, load=MANY).figures) == [1, 2, 4, 8, 16, 32, 64]
    # And where more are needed for the rate, as many as that takes.
    four = parents(dataclasses.replace(MANY, concurrency=4))
    fast = Budget(memory_bytes=int(four["memory_bytes"]) + 1, tokens_per_second=four["tokens_per_second"] * 0.99)
    assert planned(fast, load=MANY).verdict == "fits as it is, with 4 sequences at once"


def test_without_a_rate_all_sequences_run_at_once():
    one = parents(dataclasses.replace(MANY, concurrency=1))
    verdict = planned(Budget(memory_bytes=int(one["memory_bytes"])), load=MANY).verdict
    assert not verdict.startswith("fits as it is") and "at once" not in verdict
    assert batches(Budget(memory_bytes=1), MANY) == (MANY,)


def test_a_refusal_names_the_batch_that_comes_nearest():
    axes = ("bits",)
    found = planning.prospect(PLACES, axes, Budget(tokens_per_second=1.0), MANY, computed(MACHINE), scored_tokens=512)
    rates = {}
    for batch, table in found.offered.items():
        quickest = [
            min((offer.cost for offer in row), key=lambda cost: cost.prefill_seconds + 64 * cost.decode_seconds)
            for row in table.values()
        ]
        rates[batch.concurrency] = figures(sum(quickest, Cost()), batch, 0)["tokens_per_second"]
    best = max(rates, key=lambda count: rates[count])
    with pytest.raises(Infeasible) as err:
        found.hold_against(Budget(tokens_per_second=2 * rates[best]))
    assert err.value.nearest == pytest.approx(rates[best])
    assert str(err.value).endswith(f"the most possible is {rates[best]:.4g}, with {best} sequences at once")


def test_the_best_of_all_batches_is_kept_and_the_smallest_of_equals():
    budget, tried = Budget(tokens_per_second=1.0), []

    def solve(batch: Workload) -> int:
        tried.append(batch.concurrency)
        if batch.concurrency == 1:
            raise Infeasible("tokens_per_second", 1.0, 0.5)
        return batch.concurrency

    assert [found for _, found in offers.met(budget, dataclasses.replace(MANY, concurrency=6), solve)] == [2, 4, 6]
    assert tried == [1, 2, 4, 6]
