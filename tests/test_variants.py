"""One battery over every axis, then what each axis promises."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch

from pennyweight import kinds
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge.stats import NAMES, Collector, SlotStats, of_slot
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.model.slots import Slot
from pennyweight.variants import apply, bits, choice_from_json, ffn_width, kv_heads, linear, noop, window
from tests.conftest import FAMILIES
from tests.live import after, computed, entering

AXES = kinds.names("variants")
STRUCTURAL = [axis for axis in AXES if axis != "bits"]


MIXER, FFN = Slot("mixer", 0), Slot("ffn", 0)
SLOTS = {"mixer": MIXER, "ffn": FFN}


class Bench:
    """A walked pico model with real statistics of one layer."""

    def __init__(self, folder) -> None:
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

    @torch.no_grad()
    def run(self, kind: str, choice: Choice):
        """(parts after the choice, what the block then computes)."""
        layer = self.walk.layer(0)
        parts = apply(layer.parts[SLOTS[kind]], choice, self.of(kind))
        layer.parts[SLOTS[kind]] = parts
        return parts, computed(layer, SLOTS[kind], self.entering[kind])


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request, pico):
    return Bench(pico(request.param))


def every_option(bench: Bench):
    for kind, shape in bench.shapes.items():
        for axis in AXES:
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
        parameters = sum(p.numel() for m in (parts.block,) for p in m.parameters())
        norm = 0 if axis == "noop" else shape.hidden_size
        assert parameters + norm == sum(w.parameters for w in parts.shape.weights()), (kind, spec)
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


def test_ffn_width_computes_the_kept_channels(bench):
    layer = bench.walk.layer(0)
    mlp = layer.parts[FFN].block
    kept = ffn_width.ranking(mlp.down_proj.weight, bench.of("ffn")["activation_mean_abs"])[:48]
    with torch.no_grad():
        x = entering(layer, FFN, bench.entering["ffn"])
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        mask = torch.zeros(inner.shape[-1]).index_fill(0, kept, 1.0)
        expected = mlp.down_proj(inner * mask)
    _, found = bench.run("ffn", Choice((("ffn_width", ffn_width.Spec(48)),)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fewer_kv_heads_by_mean_are_the_means(bench):
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    before = bench.walk.layer(0).parts[MIXER].matrix("k_proj").weight.view(shape.num_kv_heads, shape.head_dim, -1)
    parts, _ = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(1, "mean")),)))
    torch.testing.assert_close(parts.block.k_proj.weight, before.mean(dim=0), rtol=1e-6, atol=1e-7)


def test_best_kv_heads_keep_the_attention_of_the_kept_heads(bench):
    """With everything but the kept groups silenced in the parent, the child computes the same."""
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    heads = shape.num_kv_heads // 2
    layer = bench.walk.layer(0)
    o = layer.parts[MIXER].matrix("o_proj")
    if shape.qk_norm == "all heads":
        pytest.skip("queries and keys are normed over the heads that are left: the child is near, not equal")
    energy = kv_heads.group_energy(o.weight, bench.of("mixer")["inner_moment"], shape)
    kept = energy.argsort(descending=True)[:heads]
    width = shape.num_heads // shape.num_kv_heads * shape.head_dim
    mask = torch.zeros(shape.num_kv_heads, width)
    mask[kept] = 1
    with torch.no_grad():
        o.weight.mul_(mask.flatten())
        expected = computed(layer, MIXER, bench.hidden)
    _, found = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(heads, "best")),)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 47])
def test_window_equals_a_hand_made_mask(bench, tokens):
    """Key j is seen from i iff 0 <= i - j < tokens: the current token is one of them."""
    layer = bench.walk.layer(0)
    i = torch.arange(48)
    seen = (i[:, None] >= i[None]) & (i[:, None] - i[None] < tokens)
    with torch.no_grad():
        normed, positions = entering(layer, MIXER, bench.hidden), bench.walk.positions(48)
        expected = layer.parts[MIXER].block(normed, attention_mask=seen[None, None], **positions)[0]
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
