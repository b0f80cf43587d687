"""Distillation brings blocks and models closer to the parent, and resumes to the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.heal import local, whole
from pennyweight.heal import schedule as _schedule
from pennyweight.live.load import load_model
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from pennyweight.runs.store import Store
from pennyweight.variants import ffn_width, linear, noop
from tests.test_heterogeneous import build

LAYOUT = {
    Slot("ffn", 0): Choice((("ffn_width", ffn_width.Spec(64)),)),
    Slot("mixer", 1): Choice((("linear", linear.Spec("product")),)),
    Slot("ffn", 2): Choice((("noop", noop.Spec()),)),
}


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    parent = pico("qwen3")
    return parent, build(parent, tmp_path_factory.mktemp("heal") / "child", LAYOUT)


def ids(rows=64, tokens=32):
    return torch.randint(300, (rows, tokens), generator=torch.Generator().manual_seed(3))


def heal_blocks(pair, store, lr=1e-3):
    parent, child = (Walk(Checkpoint(folder)) for folder in pair)
    return local.heal(
        parent,
        child,
        list(LAYOUT),
        ids(),
        tokens=60 * 4 * 32,
        lr=lr,
        batch_rows=4,
        store=store,
        listen=Silent(),
    )


def test_blocks_learn_what_the_parents_blocks_do(pair, tmp_path):
    store = Store(tmp_path, {})
    healed = heal_blocks(pair, store)
    assert set(healed) == {Slot("ffn", 0), Slot("mixer", 1)}  # a block that is gone has nothing to learn
    for slot in healed:
        first, last = store.get(f"heal/local-loss/{slot}")
        assert last < 0.95 * first, slot
    assert set(healed[Slot("mixer", 1)]) == {
        f"model.layers.1.{name}.weight" for name in ("self_attn.linear_attn", "input_layernorm")
    }


def test_finished_blocks_are_not_trained_again(pair, tmp_path):
    store = Store(tmp_path, {})
    first = heal_blocks(pair, store)
    store.put("heal/local-loss/0.ffn", "left alone")
    again = heal_blocks(pair, store)
    assert store.get("heal/local-loss/0.ffn") == "left alone"
    for slot, tensors in first.items():
        assert all(torch.equal(tensors[name], again[slot][name]) for name in tensors)


@dataclass
class Stop(Silent):
    """Ends the process, as far as the code under test can tell, after some steps."""

    after: int
    seen: list[float] = field(default_factory=list)

    def advance(self, done: int, **figures: float) -> None:
        if "loss" in figures:
            self.seen.append(figures["loss"])
        if done == self.after:
            raise KeyboardInterrupt


def heal_whole(pair, store, listen, lr=3e-4):
    parent = load_model(pair[0], dtype=torch.float32).requires_grad_(False)
    child = load_model(pair[1], dtype=torch.float32)
    whole.heal(
        parent, child, ids(), tokens=12 * 4 * 32, lr=lr, batch_rows=4, dtype=torch.float32, store=store, listen=listen
    )
    return {name: p.detach().clone() for name, p in child.named_parameters()}


def test_the_whole_child_comes_closer(pair, tmp_path):
    listen, store = Stop(after=10**9), Store(tmp_path, {})
    heal_whole(pair, store, listen)
    assert len(listen.seen) == 12
    first, last = store.get("heal/whole/judged")
    assert last < 0.95 * first


def test_training_that_does_harm_is_thrown_away(pair, tmp_path):
    child = load_model(pair[1], dtype=torch.float32)
    healed = heal_whole(pair, Store(tmp_path / "whole", {}), Silent(), lr=30.0)
    assert all(torch.equal(healed[name], p) for name, p in child.named_parameters())
    blocks = heal_blocks(pair, Store(tmp_path / "blocks", {}), lr=30.0)
    walk = Walk(Checkpoint(pair[1]))
    for slot, tensors in blocks.items():
        parameters = dict(walk.layer(slot.layer).parts[slot].parameters())
        assert all(torch.equal(parameters[name].bfloat16(), tensor) for name, tensor in tensors.items())


def test_a_stopped_run_ends_with_the_same_weights(pair, tmp_path, monkeypatch):
    straight = heal_whole(pair, Store(tmp_path / "a", {}), Silent())
    monkeypatch.setattr(whole, "_CHECKPOINT_S", 0.0)
    for after in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            heal_whole(pair, Store(tmp_path / "b", {}), Stop(after=after))
    resumed = heal_whole(pair, Store(tmp_path / "b", {}), Silent())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_loss_is_zero_for_the_parent_itself(pair):
    parent = load_model(pair[0], dtype=torch.float32)
    out = parent(ids(2), use_cache=False, output_hidden_states=True)
    assert float(whole.distillation_loss(out, out).detach()) == pytest.approx(0.0, abs=1e-5)


def test_the_learning_rate_starts_low_and_ends_at_a_tenth():
    rates = [_schedule.cosine(step, 100) for step in range(100)]
    assert rates[0] < rates[4] > 0.9
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_wide_models_and_models_that_lost_little_learn_slowly():
    assert _schedule.local_lr(512) == _schedule.local_lr(256) / 2
    assert _schedule.whole_lr(256, 1.0) == pytest.approx(1e-3)
    assert _schedule.whole_lr(512, 1.0) == pytest.approx(0.5e-3)
    assert _schedule.whole_lr(256, 0.009) == pytest.approx(0.2e-3)


@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (2, 1), (20, 4), (1000, 8)])
def test_some_rows_judge(rows, kept):
    assert _schedule.judges(rows) == kept


def test_without_a_learning_rate_one_is_chosen(pair, tmp_path):
    store = Store(tmp_path, {})
    heal_blocks(pair, store, lr=None)
    for slot in (Slot("ffn", 0), Slot("mixer", 1)):
        first, last = store.get(f"heal/local-loss/{slot}")
        assert last < first, slot
