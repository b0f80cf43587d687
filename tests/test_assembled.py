"""Children assembled from blocks made once: what they measure is what the whole child measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pennyweight import texts
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge import score, stats
from pennyweight.judge.assembled import Assembled
from pennyweight.judge.stats import SlotStats, of_slot
from pennyweight.live.walk import Layer, Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.variants import apply, bits, ffn_width, noop

HALF = Choice((("ffn_width", ffn_width.Spec(64)), ("bits", bits.Spec(4, 32, "gptq"))))
NARROW = Choice((("ffn_width", ffn_width.Spec(32)),))
GONE, BITS = Choice((("noop", noop.Spec()),)), Choice((("bits", bits.Spec(4, 32)),))
LAYOUTS = [
    {Slot("ffn", 1): HALF},
    {Slot("ffn", 2): NARROW, Slot("mixer", 2): GONE},
    {Slot("embed"): BITS, Slot("ffn", 0): HALF},
    {Slot("head"): BITS},
    {Slot("embed"): BITS, Slot("head"): BITS, Slot("mixer", 1): GONE},
]


class Bench:
    def __init__(self, folder, work) -> None:
        self.walk = Walk(Checkpoint(folder))
        ids = (np.arange(5 * 17) * 7919 % 300).reshape(5, 17)
        scored = np.ones((5, 16), bool)
        scored[1, 3] = scored[4, 0] = False
        self.rows = texts.Rows(ids, scored, scored.sum(axis=1))
        names = {slot: stats.NAMES for slot in self.walk.shapes if slot.layer is not None}
        stats.embed(folder, {0: ids[:, :-1]}, work, torch.float32)
        self.stats = []
        for layer in range(self.walk.layers):
            here = {slot: own for slot, own in names.items() if slot.layer == layer}
            stats.calibrate(folder, layer, [0], here, work, torch.float32)
            self.stats.append(stats.merge(work, 1, layer, ids[:, :-1].size))
        self.read: list[int] = []

    def assembled(self) -> Assembled:
        return Assembled(self.walk, lambda layer: self.read.append(layer) or self.stats[layer], self.rows)

    @torch.no_grad()
    def whole(self, layout) -> dict[str, float]:
        """The child and its parent, every token from the embedding on, in float64 behind the logits."""
        walk, ids = self.walk, torch.from_numpy(self.rows.ids)
        embedding, head = walk.embedding(), walk.head()
        states = [embedding.root(ids[:, :-1])]
        logits = [head.root]
        for slot, parts in ((Slot("embed"), walk.embedding()), (Slot("head"), walk.head())):
            if layout.get(slot):
                apply(parts, layout[slot], SlotStats({}))
            states += [parts.root(ids[:, :-1])] if slot.kind == "embed" else []
            logits += [parts.root] if slot.kind == "head" else []
        finals = []
        for hidden, changed in zip(states, ({}, layout), strict=True):
            for layer in walk.each():
                for slot, own in layer.parts.items():
                    apply(own, changed.get(slot, Choice()), of_slot(self.stats[layer.index], slot.kind))
                hidden = layer.run(hidden)
            finals.append(walk.norm()(hidden))
        mask, targets = torch.from_numpy(self.rows.scored), ids[:, 1:]
        p, q = (make(final)[mask].double().log_softmax(-1) for make, final in zip(logits, finals, strict=True))
        parent, child = (final.double() for final in finals)
        return {
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "lm": float((p - q).gather(1, targets[mask][:, None]).mean()),
            "cosine": float((1 - torch.cosine_similarity(parent.flatten(1), child.flatten(1))).mean()),
            "nmse": float(((child - parent).square().mean((1, 2)) / parent.square().mean((1, 2))).mean()),
        }


@pytest.fixture(scope="module")
def bench(pico, tmp_path_factory):
    return Bench(pico("llama"), tmp_path_factory.mktemp("assembled"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(map(str, layout)))
def test_an_assembled_child_measures_what_the_whole_one_does(bench, layout):
    found, wanted = bench.assembled().measure(layout), bench.whole(layout)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=5e-3, abs=2e-6), name
    assert wanted["kl"] > 1e-5


def test_the_parent_measures_zero_and_blocks_are_made_once(bench, monkeypatch):
    made, bench.read = bench.assembled(), []
    assert made.measure({}) == dict.fromkeys(score.METRICS, 0.0)
    first = made.measure(LAYOUTS[0])
    assert bench.read == [1]
    assert made.measure({**LAYOUTS[0], Slot("ffn", 2): NARROW}) != first
    assert made.measure({Slot("ffn", 1): NARROW}) != first
    assert made.measure(LAYOUTS[0]) == first, "what is tried in between leaves no trace"
    assert bench.read == [1, 2, 1]


def test_only_what_comes_behind_the_first_change_runs_again(bench, monkeypatch):
    made, ran, run = bench.assembled(), [], Layer.run
    monkeypatch.setattr(Layer, "run", lambda self, *args, **more: ran.append(self.index) or run(self, *args, **more))
    for layout, layers in (
        ({Slot("ffn", 1): HALF}, [1, 2]),
        ({Slot("head"): BITS}, []),
        ({Slot("embed"): BITS}, [0, 1, 2]),
    ):
        ran.clear()
        made.measure(layout)
        assert ran == layers
