"""Moments follow the channels: quantisers of an edited slot are given those of what its matrices now multiply."""

from __future__ import annotations

import pytest
import torch

from pennyweight import formats, quantize
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge.stats import NAMES, Collector, SlotStats, of_slot
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs.scratch import Remembered
from pennyweight.variants import apply, bits, ffn_width, kv_heads, mixed_bits

MIXER, FFN = Slot("mixer", 0), Slot("ffn", 0)
EDITS = {
    FFN: Choice((("ffn_width", ffn_width.Spec(64)),)),
    MIXER: Choice((("kv_heads", kv_heads.Spec(2, "best")),)),
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
LAST = {FFN: "down_proj", MIXER: "o_proj"}


def gathered(walk, layer):
    hidden = walk.embed(torch.arange(4 * 48).mul(7919).remainder(300).view(4, 48))
    with torch.no_grad(), Collector(layer.parts, dict.fromkeys(layer.parts, NAMES)) as collector:
        layer.run(hidden)
    return {name: value / (4 * 48) for name, value in collector.sums.items()}


@pytest.fixture(scope="module", params=[FFN, MIXER], ids=str)
def edited(request, pico):
    """(slot, its statistics in the parent, its parts after the edit, its statistics as the child runs)."""
    walk, slot = Walk(Checkpoint(pico("llama", **HEADS))), request.param
    before = gathered(walk, walk.layer(0))
    layer = walk.layer(0)
    layer.parts[slot] = apply(layer.parts[slot], EDITS[slot], of_slot(before, slot.kind))
    return slot, before, layer.parts[slot], of_slot(gathered(walk, layer), slot.kind)


def test_what_an_edit_says_of_its_channels_is_what_the_child_computes(edited):
    slot, before, parts, seen = edited
    found = of_slot(before, slot.kind).having_inner(parts.inner)
    known = parts.inner >= 0
    assert int(known.sum()) == {FFN: 64, MIXER: 32}[slot] and parts.inner.tolist() != list(range(len(parts.inner)))
    wanted, moment = seen["inner_moment"], found["inner_moment"]
    torch.testing.assert_close(moment[known][:, known], wanted[known][:, known], rtol=1e-4, atol=1e-6)
    assert not moment[~known].any() and not moment[:, ~known].any()
    diagonal = of_slot(before, slot.kind)
    diagonal["inner_moment"] = diagonal["inner_moment"].diagonal()
    assert torch.equal(diagonal.having_inner(parts.inner)["inner_moment"], moment.diagonal())
    if slot == FFN:
        torch.testing.assert_close(found["activation_mean_abs"], seen["activation_mean_abs"], rtol=1e-4, atol=1e-6)
    assert torch.equal(found["input_moment"], of_slot(before, slot.kind)["input_moment"])


@pytest.mark.parametrize(
    "spec", [("bits", bits.Spec(4, 32, "gptq")), ("mixed_bits", mixed_bits.Spec(8, 4, 32))], ids=lambda own: own[0]
)
def test_bits_after_an_edit_are_found_by_the_edited_moments(edited, pico, spec):
    slot, before, parts, seen = edited
    walk = Walk(Checkpoint(pico("llama", **HEADS)))
    own = of_slot(before, slot.kind)
    made = apply(walk.layer(0).parts[slot], Choice((*EDITS[slot].specs, spec)), own)
    stored = {weight.name: weight.stored for weight in made.shape.weights()}[LAST[slot]]
    weight, codes = parts.matrix(LAST[slot]).weight.detach(), made.matrix(LAST[slot]).weight
    told = SlotStats({"inner_moment": own.having_inner(parts.inner)["inner_moment"]})
    assert torch.equal(codes, formats.unpack(quantize.pack(weight, "inner", told, stored, "gptq")).float())
    rounded = formats.unpack(quantize.pack(weight, None, SlotStats({}), stored, "rtn")).float()
    moment = seen["inner_moment"]
    error = lambda found: float((((found - weight) @ moment) * (found - weight)).sum())  # noqa: E731
    assert error(codes) < error(rounded)
    if slot == MIXER:
        assert not codes[:, parts.inner < 0].any(), "heads that are silent stay silent"


def test_codes_are_remembered_by_the_edit_too(edited, tmp_path):
    """The same matrix after another edit has other codes; so has what the parent's own order gave."""
    slot, before, parts, _ = edited
    weight, kept = parts.matrix(LAST[slot]).weight.detach(), Remembered(tmp_path)
    own = of_slot(before, slot.kind, codes=kept, owner=slot)
    turned = parts.inner.roll(1)
    for stats in (own.having_inner(parts.inner), own.having_inner(turned), own.having_inner(turned)):
        found = quantize.pack(weight, "inner", stats, bits.Spec(4, 32, "gptq").stored, "gptq")
        wanted = SlotStats({"inner_moment": stats["inner_moment"]})
        again = quantize.pack(weight, "inner", wanted, bits.Spec(4, 32, "gptq").stored, "gptq")
        assert all(torch.equal(found[name], again[name]) for name in again)
    assert len(set(kept.used)) == 2
    assert own.named("inner_moment") == f"{slot}.inner_moment"
    assert own.having_inner(turned).named("input_moment") == own.named("input_moment") != own.named("inner_moment")
    twice = own.having_inner(turned).having_inner(torch.arange(8))
    assert twice.named("inner_moment") != own.having_inner(torch.arange(8)).named("inner_moment")


def test_what_was_prepared_of_the_input_serves_the_edited_slot(edited):
    slot, before, parts, _ = edited
    asked = []

    class quantiser:
        @staticmethod
        def prepare(moment):
            asked.append(moment)
            return moment

    own = of_slot(before, slot.kind)
    own.prepared("input_moment", quantiser), own.prepared("inner_moment", quantiser)
    later = own.having_inner(parts.inner)
    assert later.prepared("input_moment", quantiser) is own["input_moment"]
    assert later.prepared("inner_moment", quantiser) is later["inner_moment"]
    assert len(asked) == 3
