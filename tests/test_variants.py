"""One battery over every axis, then what each axis promises."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from pennyweight import kinds
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge.stats import NAMES, Collector, SlotStats, of_slot
from pennyweight.live.least_squares import solve, without
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.model.slots import Slot
from pennyweight.variants import apply, bits, choice_from_json, ffn_width, kv_heads, linear, noop, window
from tests.conftest import DISTINCT, FAMILIES
from tests.live import after, computed, entering, gate

AXES = kinds.names("variants")
STORING = {"bits", "few_bits", "mid_bits", "mixed_bits", "sparsity", "trellis"}
"""Axes that say how matrices are stored, which takes a while and is the same for every family: tried with some."""


MIXER, FFN = Slot("mixer", 0), Slot("ffn", 0)
SLOTS = {"mixer": MIXER, "ffn": FFN}


class Bench:
    """A walked pico model with real statistics of one layer."""

    def __init__(self, folder, axes) -> None:
        self.axes = axes
        self.walk = Walk(Checkpoint(folder))
        ids = torch.arange(4 * 48).mul(7919).remainder(300).view(4, 48)
        self.hidden = self.walk.embed(ids)
        layer = self.walk.layer(0)
        self.shapes = {kind: self.walk.shapes[slot] for kind, slot in SLOTS.items()}
        with torch.no_grad():
            with Collector(layer.parts, dict.fromkeys(layer.parts, NAMES)) as collector:
                layer.run(self.hidden)
            middle = after(layer, MIXER, self.hidden)
        self.stats = {name: value / ids.numel() for name, value in collector.sums.items()}
        self.entering = {"mixer": self.hidden, "ffn": middle}  # the stream before each slot of the parent

    def of(self, kind: str) -> SlotStats:
        return of_slot(self.stats, kind)

    def uncorrelated(self, kind: str) -> SlotStats:
        """The same, but no channel of the inner activation says anything of another one."""
        own = self.of(kind)
        own["inner_moment"] = torch.eye(len(own["inner_moment"]))
        return own

    @torch.no_grad()
    def run(self, kind: str, choice: Choice, stats: SlotStats | None = None):
        """(parts after the choice, what the block then computes)."""
        layer = self.walk.layer(0)
        parts = apply(layer.parts[SLOTS[kind]], choice, self.of(kind) if stats is None else stats)
        layer.parts[SLOTS[kind]] = parts
        return parts, computed(layer, SLOTS[kind], self.entering[kind])


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request, pico):
    return Bench(pico(request.param), AXES if request.param in DISTINCT else [a for a in AXES if a not in STORING])


def every_option(bench: Bench):
    for kind, shape in bench.shapes.items():
        for axis in bench.axes:
            module = kinds.load("variants", axis)
            for spec in module.options(shape):
                yield kind, shape, axis, module, spec


def test_every_spec_survives_json(bench):
    for _, _, axis, _, spec in every_option(bench):
        choice = Choice(((axis, spec),))
        assert choice_from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_every_option_makes_the_shape_it_says_and_costs_what_it_holds(bench):
    for kind, shape, axis, module, spec in every_option(bench):
        parts, out = bench.run(kind, Choice(((axis, spec),)))
        assert parts.shape == module.reshape(shape, spec), (kind, spec)
        assert torch.isfinite(out).all()
        held = {name: tuple(m.weight.shape) for name, m in parts.matrices().items()}
        assert held == {w.name: w.shape for w in parts.shape.weights() if len(w.shape) == 2}, (kind, spec)
        parameters = sum(p.numel() for m in parts.modules().values() for p in m.parameters())
        assert parameters == sum(w.parameters for w in parts.shape.weights()), (kind, spec)
        assert parts.shape.nbytes <= shape.nbytes


PARENTS_OWN = [
    ("ffn", lambda shape: ("ffn_width", ffn_width.Spec(shape.intermediate_size))),
    ("mixer", lambda shape: ("kv_heads", kv_heads.Spec(shape.num_kv_heads))),
    ("mixer", lambda shape: ("kv_heads", kv_heads.Spec(shape.num_kv_heads, "best"))),
    ("mixer", lambda shape: ("window", window.Spec(48))),
]


@pytest.mark.parametrize("case", range(len(PARENTS_OWN)))
def test_the_parents_own_spec_changes_nothing(bench, case):
    kind, spec = PARENTS_OWN[case]
    _, expected = bench.run(kind, Choice())
    parts, found = bench.run(kind, Choice((spec(bench.shapes[kind]),)))
    if "window" in str(parts.shape) and "window=48" in str(parts.shape):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # a mask instead of is_causal: another kernel
    else:
        assert torch.equal(found, expected)


def test_widths_are_nested_and_keep_the_largest_contributions(bench):
    shape = bench.shapes["ffn"]
    assert isinstance(shape, GatedMLP)
    layer = bench.walk.layer(0)
    down = layer.parts[FFN].matrix("down_proj").weight
    mean_abs = bench.of("ffn")["activation_mean_abs"]
    ranked = ffn_width.ranking(down, mean_abs)
    contribution = mean_abs * down.norm(dim=0)
    assert (contribution[ranked].diff() <= 1e-6).all()
    kept = [set(ranked[: spec.width].tolist()) for spec in ffn_width.options(shape)]
    assert all(narrow < wide for wide, narrow in itertools.pairwise(kept))


@pytest.mark.parametrize("init", ["slice", "fitted"])
def test_ffn_width_computes_the_kept_channels(bench, init):
    """Fitted as well, where those that go are not to be guessed from those that stay."""
    layer = bench.walk.layer(0)
    mlp = layer.parts[FFN].block
    kept = ffn_width.ranking(mlp.down_proj.weight, bench.of("ffn")["activation_mean_abs"])[:48]
    with torch.no_grad():
        x = entering(layer, FFN, bench.entering["ffn"])
        inner = gate(mlp)(layer.parts[FFN].matrix("gate_proj")(x)) * layer.parts[FFN].matrix("up_proj")(x)
        mask = torch.zeros(inner.shape[-1]).index_fill(0, kept, 1.0)
        expected = mlp.down_proj(inner * mask)
    _, found = bench.run("ffn", Choice((("ffn_width", ffn_width.Spec(48, init)),)), bench.uncorrelated("ffn"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_left_of_a_matrix_is_fitted_to_all_of_it(bench):
    """Beside what stays, nothing that lowers the error on the calibration text further; what numpy finds, too."""
    with torch.no_grad():
        _, target = bench.run("ffn", Choice())
        errors = {}
        for init in ("slice", "fitted"):
            parts, found = bench.run("ffn", Choice((("ffn_width", ffn_width.Spec(24, init)),)))
            errors[init] = (found - target).square().mean()
        layer = bench.walk.layer(0)
        x = entering(layer, FFN, bench.entering["ffn"]).flatten(0, 1)
        inner = gate(parts.block)(parts.matrix("gate_proj")(x)) * parts.matrix("up_proj")(x)
        bias = parts.matrix("down_proj").bias
        wanted = (target if bias is None else target - bias).flatten(0, 1).double()
        best = np.linalg.lstsq(inner.double().numpy(), wanted.numpy(), rcond=None)[0]
        least = (inner.double() @ torch.from_numpy(best) - wanted).square().mean()
    assert errors["fitted"] < 0.98 * errors["slice"]
    assert (1 - 1e-6) * least <= errors["fitted"] < 1.002 * least  # what is computed is float32


def test_heads_that_stay_are_fitted_to_all(bench):
    _, target = bench.run("mixer", Choice())
    errors = []
    for stats in (bench.of("mixer"), bench.uncorrelated("mixer")):
        stats_energy = bench.of("mixer")["inner_moment"]
        choice = Choice((("kv_heads", kv_heads.Spec(bench.shapes["mixer"].num_kv_heads // 2, "best")),))
        if stats["inner_moment"] is not stats_energy:
            stats["inner_moment"] = stats["inner_moment"] * stats_energy.diagonal().mean()
        errors.append((bench.run("mixer", choice, stats)[1] - target).square().mean())
    assert errors[0] < errors[1]


def test_directions_that_the_text_does_not_know_stay_as_they_were():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(5, 12, generator=draw)  # five tokens say nothing of most of the 8 channels that stay
    weight, kept = torch.randn(3, 12, generator=draw), torch.arange(8)
    moment = z.T @ z / 5
    found = without(weight, moment, kept)
    known = torch.linalg.svd(z[:, :8])[2][:5]  # directions among the kept channels that occur
    unknown = torch.eye(8) - known.T @ known
    torch.testing.assert_close(found @ unknown, weight[:, :8] @ unknown, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z[:, :8] @ found.T, z @ weight.T, rtol=1e-2, atol=1e-2)  # and fits what it knows


def test_a_solve_that_rounding_breaks_is_damped_and_nonsense_is_refused():
    moment = torch.tensor([[1.0, 1.1], [1.1, 1.0]])  # not a moment: one eigenvalue is negative
    assert torch.isfinite(solve(torch.ones(3, 2), moment)).all()
    assert torch.equal(solve(torch.ones(3, 2), torch.zeros(2, 2), toward=torch.ones(3, 2)), torch.ones(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        solve(torch.ones(3, 2), moment * torch.nan)


def test_fewer_kv_heads_by_mean_are_the_means(bench):
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    before = bench.walk.layer(0).parts[MIXER].matrix("k_proj").weight.view(shape.num_kv_heads, shape.head_dim, -1)
    parts, _ = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(1, "mean")),)))
    torch.testing.assert_close(parts.matrix("k_proj").weight, before.mean(dim=0), rtol=1e-6, atol=1e-7)


def test_best_kv_heads_keep_the_attention_of_the_kept_heads(bench):
    """With everything but the kept groups silenced in the parent, the child computes the same."""
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    heads = shape.num_kv_heads // 2
    layer = bench.walk.layer(0)
    o = layer.parts[MIXER].matrix("o_proj")
    if shape.qk_norm == "all heads":
        pytest.skip("queries and keys are normed over the heads that are left: the child is near, not equal")
    stats = bench.uncorrelated("mixer")
    energy = kv_heads.group_energy(o.weight, stats["inner_moment"], shape)
    kept = energy.argsort(descending=True)[:heads]
    width = shape.num_heads // shape.num_kv_heads * shape.head_dim
    mask = torch.zeros(shape.num_kv_heads, width)
    mask[kept] = 1
    with torch.no_grad():
        o.weight.mul_(mask.flatten())
        expected = computed(layer, MIXER, bench.hidden)
    _, found = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(heads, "best")),)), stats)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 47])
def test_window_equals_a_hand_made_mask(bench, tokens):
    """Key j is seen from i iff 0 <= i - j < tokens: the current token is one of them."""
    layer = bench.walk.layer(0)
    tokens = min(tokens, layer.parts[MIXER].shape.window or tokens)
    i = torch.arange(48)
    seen = (i[:, None] >= i[None]) & (i[:, None] - i[None] < tokens)
    with torch.no_grad():
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        normed, where = entering(layer, MIXER, bench.hidden), {**layer.places(48), "attention_mask": mask}
        expected = layer.parts[MIXER].block(normed, **where)[0]
    _, found = bench.run("mixer", Choice((("window", window.Spec(tokens)),)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_texts_within_the_window_are_computed_as_by_the_parent(bench):
    layer = bench.walk.layer(0)
    short = bench.hidden[:, :16]
    with torch.no_grad():
        expected = computed(layer, MIXER, short)
        window.apply(layer.parts[MIXER], window.Spec(16), SlotStats({}))
        found = computed(layer, MIXER, short)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_fitted_matrix_is_the_best_one(bench):
    """No small change of the fitted matrix lowers the error on the calibration text."""
    for kind in ("mixer", "ffn"):
        _, target = bench.run(kind, Choice())
        parts, found = bench.run(kind, Choice((("linear", linear.Spec("fitted")),)))
        _, product = bench.run(kind, Choice((("linear", linear.Spec("product")),)))
        error = (found - target).square().mean()
        assert error < (product - target).square().mean()
        assert error < target.square().mean()
        generator = torch.Generator().manual_seed(0)
        matrix = parts.matrix("linear")
        x = entering(bench.walk.layer(0), SLOTS[kind], bench.entering[kind])
        for _ in range(5):
            nudged = copy.deepcopy(matrix.weight)
            matrix.weight.data += 1e-2 * nudged.std() * torch.randn(nudged.shape, generator=generator)
            with torch.no_grad():
                worse = (matrix(x) - target).square().mean()
            matrix.weight.data.copy_(nudged)
            assert worse > error * (1 - 1e-6)


def test_the_product_is_attention_to_oneself(bench):
    """On a text of one token, attention without q, k and biases is exactly o @ v."""
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    if shape.qkv_bias or shape.o_bias:
        pytest.skip("biases are dropped by the linear block, so equality holds only without them")
    layer = bench.walk.layer(0)
    one = bench.hidden[:, :1]
    with torch.no_grad():
        expected = computed(layer, MIXER, one)
        linear.apply(layer.parts[MIXER], linear.Spec("product"), bench.of("mixer"))
        found = computed(layer, MIXER, one)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_noop_adds_nothing(bench):
    for kind in ("mixer", "ffn"):
        _, found = bench.run(kind, Choice((("noop", noop.Spec()),)))
        assert not found.any()


def test_fewer_bits_stay_close_and_more_bits_closer(bench):
    for kind in ("mixer", "ffn"):
        _, target = bench.run(kind, Choice())
        errors = {}
        for spec in bits.options(bench.shapes[kind]):
            _, found = bench.run(kind, Choice((("bits", spec),)))
            errors[spec] = float((found - target).square().mean() / target.square().mean())
        eight = [error for spec, error in errors.items() if spec.bits == 8]
        four = [error for spec, error in errors.items() if spec.bits == 4]
        assert max(eight) < 1e-3 < max(four) < 0.1
        assert max(eight) < min(four)


def test_specs_that_do_not_fit_are_refused(bench):
    mixer, ffn = bench.shapes["mixer"], bench.shapes["ffn"]
    for module, shape, spec in [
        (ffn_width, mixer, ffn_width.Spec(8)),
        (ffn_width, ffn, ffn_width.Spec(ffn.intermediate_size + 1)),
        (kv_heads, mixer, kv_heads.Spec(3)),
        (kv_heads, ffn, kv_heads.Spec(1)),
        (window, ffn, window.Spec(8)),
        (bits, dataclasses.replace(ffn, hidden_size=100), bits.Spec(4, 32)),
    ]:
        with pytest.raises(ValueError):
            module.reshape(shape, spec)


def test_the_energy_of_a_group_is_what_its_heads_add_to_the_stream():
    """Mean square over tokens, from moments alone: not what is in the heads, but what o_proj makes of it."""
    shape = Attention(hidden_size=5, num_heads=4, num_kv_heads=2, head_dim=3)
    draw = torch.Generator().manual_seed(0)
    z, o = torch.randn(50, 12, generator=draw), torch.randn(5, 12, generator=draw)
    o[:, :6] *= 0.1
    z[:, :6] *= 3
    found = kv_heads.group_energy(o, z.T @ z / 50, shape)
    wanted = [(z[:, part] @ o[:, part].T).square().sum(dim=1).mean() for part in (slice(6), slice(6, 12))]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert found[0] < found[1]


@pytest.fixture(scope="module")
def four_heads(pico):
    return Bench(pico("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8), AXES)


def heads_of(parts, name: str) -> torch.Tensor:
    return parts.matrix(name).weight.detach().view(-1, 8, 64)


def test_neighbours_are_averaged(four_heads):
    before = four_heads.walk.layer(0).parts[MIXER]
    parts, _ = four_heads.run("mixer", Choice((("kv_heads", kv_heads.Spec(2, "mean")),)))
    for name in ("k_proj", "v_proj"):
        old = heads_of(before, name)
        wanted = torch.stack([(old[0] + old[1]) / 2, (old[2] + old[3]) / 2])
        torch.testing.assert_close(heads_of(parts, name), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(heads_of(parts, "q_proj"), heads_of(before, "q_proj"))


@pytest.mark.parametrize(
    ("energies", "order"), [((1, 4, 3, 2), [2, 3, 0, 1, 4, 5, 6, 7]), ((4, 1, 2, 3), [0, 1, 2, 3, 6, 7, 4, 5])]
)
def test_the_best_heads_stay_and_take_over_the_queries_of_those_that_go(four_heads, energies, order):
    """Two of four stay, in their order; each adopts the query heads of one that goes, whose columns are silent."""
    layer = four_heads.walk.layer(0)
    o = layer.parts[MIXER].matrix("o_proj")
    with torch.no_grad():
        o.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
        o.weight /= o.weight.view(64, 4, 16).square().sum(dim=(0, 2)).sqrt().repeat_interleave(16)
        o.weight *= torch.tensor(energies).sqrt().repeat_interleave(16)
    q, k, whole = (
        heads_of(layer.parts[MIXER], "q_proj"),
        heads_of(layer.parts[MIXER], "k_proj"),
        o.weight.detach().clone(),
    )
    parts = apply(
        layer.parts[MIXER], Choice((("kv_heads", kv_heads.Spec(2, "best")),)), four_heads.uncorrelated("mixer")
    )
    kept = sorted({head // 2 for head in (*order[:2], *order[4:6])})
    assert torch.equal(heads_of(parts, "k_proj"), k[kept])
    assert torch.equal(heads_of(parts, "q_proj"), q[order])
    columns, old = parts.matrix("o_proj").weight.view(64, 8, 8), whole.view(64, 8, 8)
    for place, head in enumerate(order):
        wanted = old[:, head] if head // 2 in kept else torch.zeros(64, 8)
        torch.testing.assert_close(columns[:, place], wanted, rtol=1e-3, atol=1e-5)
