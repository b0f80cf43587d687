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
from pennyweight.live.walk import Walk, run_layer, run_slot
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.model.slots import Slot
from pennyweight.prices import cost
from pennyweight.variants import apply, bits, choice_from_json, ffn_width, kv_heads, linear, noop, window
from tests.conftest import SHAPES

AXES = kinds.names("variants")
STRUCTURAL = [axis for axis in AXES if axis != "bits"]


class Bench:
    """A walked pico model with real statistics of one layer."""

    def __init__(self, folder) -> None:
        self.walk = Walk(Checkpoint(folder))
        self.positions = self.walk.positions(48)
        ids = torch.arange(4 * 48).mul(7919).remainder(300).view(4, 48)
        self.hidden = self.walk.embedding()(ids)
        layer = self.walk.layer(0)
        self.shapes = {kind: self.walk.shapes[Slot(kind, 0)] for kind in ("mixer", "ffn")}
        with torch.no_grad():
            with Collector(layer, self.shapes, NAMES) as collector:
                run_layer(layer, self.hidden, self.positions)
            middle = self.hidden + run_slot(layer, "mixer", self.hidden, self.positions)
        self.stats = {name: value / collector.tokens for name, value in collector.sums.items()}
        self.entering = {"mixer": self.hidden, "ffn": middle}  # what each block sees in the parent

    def of(self, kind: str) -> SlotStats:
        return of_slot(self.stats, kind)

    @torch.no_grad()
    def run(self, kind: str, choice: Choice):
        """(parts after the choice, what the slot adds to the stream)."""
        layer = self.walk.layer(0)
        parts = apply(self.walk.parts(layer, Slot(kind, 0)), choice, self.of(kind))
        return parts, run_slot(layer, kind, self.entering[kind], self.positions)


@pytest.fixture(scope="module", params=SHAPES)
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
        held = {name: tuple(m.weight.shape) for name, m in parts.linears().items()}
        assert held == {w.name: w.shape for w in parts.shape.weights() if len(w.shape) == 2}, (kind, spec)
        parameters = sum(p.numel() for m in (parts.block,) for p in m.parameters())
        norm = 0 if axis == "noop" else shape.hidden_size
        assert parameters + norm == sum(w.parameters for w in parts.shape.weights()), (kind, spec)
        assert cost.weight_bytes(parts.shape) <= cost.weight_bytes(shape)


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
    down = layer.mlp.down_proj.weight
    mean_abs = bench.of("ffn")["activation_mean_abs"]
    ranked = ffn_width.ranking(down, mean_abs)
    contribution = mean_abs * down.norm(dim=0)
    assert (contribution[ranked].diff() <= 1e-6).all()
    kept = [set(ranked[: spec.width].tolist()) for spec in ffn_width.options(shape)]
    assert all(narrow < wide for wide, narrow in itertools.pairwise(kept))


def test_ffn_width_computes_the_kept_channels(bench):
    layer = bench.walk.layer(0)
    kept = ffn_width.ranking(layer.mlp.down_proj.weight, bench.of("ffn")["activation_mean_abs"])[:48]
    with torch.no_grad():
        x = layer.post_attention_layernorm(bench.entering["ffn"])
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        mask = torch.zeros(inner.shape[-1]).index_fill(0, kept, 1.0)
        expected = layer.mlp.down_proj(inner * mask)
    _, found = bench.run("ffn", Choice((("ffn_width", ffn_width.Spec(48)),)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fewer_kv_heads_by_mean_are_the_means(bench):
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    before = bench.walk.layer(0).self_attn.k_proj.weight.view(shape.num_kv_heads, shape.head_dim, -1)
    parts, _ = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(1, "mean")),)))
    torch.testing.assert_close(parts.block.k_proj.weight, before.mean(dim=0), rtol=1e-6, atol=1e-7)


def test_best_kv_heads_keep_the_attention_of_the_kept_heads(bench):
    """With everything but the kept groups silenced in the parent, the child computes the same."""
    shape = bench.shapes["mixer"]
    assert isinstance(shape, Attention)
    heads = shape.num_kv_heads // 2
    layer = bench.walk.layer(0)
    energy = kv_heads.group_energy(layer.self_attn.o_proj.weight, bench.of("mixer")["output_moment"], shape)
    kept = energy.argsort(descending=True)[:heads]
    width = shape.num_heads // shape.num_kv_heads * shape.head_dim
    mask = torch.zeros(shape.num_kv_heads, width)
    mask[kept] = 1
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(mask.flatten())
        expected = run_slot(layer, "mixer", bench.hidden, bench.positions)
    _, found = bench.run("mixer", Choice((("kv_heads", kv_heads.Spec(heads, "best")),)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 47])
def test_window_equals_a_hand_made_mask(bench, tokens):
    """Key j is seen from i iff 0 <= i - j < tokens: the current token is one of them."""
    layer = bench.walk.layer(0)
    i = torch.arange(48)
    seen = (i[:, None] >= i[None]) & (i[:, None] - i[None] < tokens)
    with torch.no_grad():
        normed = layer.input_layernorm(bench.hidden)
        expected = layer.self_attn(normed, attention_mask=seen[None, None], **bench.positions)[0]
    _, found = bench.run("mixer", Choice((("window", window.Spec(tokens)),)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_texts_within_the_window_are_computed_as_by_the_parent(bench):
    layer = bench.walk.layer(0)
    short, positions = bench.hidden[:, :16], bench.walk.positions(16)
    with torch.no_grad():
        expected = run_slot(layer, "mixer", short, positions)
        window.apply(bench.walk.parts(layer, Slot("mixer", 0)), window.Spec(16), SlotStats({}))
        found = run_slot(layer, "mixer", short, positions)
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
        matrix = next(iter(parts.linears().values()))
        for _ in range(5):
            nudged = copy.deepcopy(matrix.weight)
            matrix.weight.data += 1e-2 * nudged.std() * torch.randn(nudged.shape, generator=generator)
            with torch.no_grad():
                worse = (run_slot(parts.layer, kind, bench.entering[kind], bench.positions) - target).square().mean()
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
        expected = run_slot(layer, "mixer", one, bench.walk.positions(1))
        linear.apply(bench.walk.parts(layer, Slot("mixer", 0)), linear.Spec("product"), bench.of("mixer"))
        found = run_slot(layer, "mixer", one, bench.walk.positions(1))
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
