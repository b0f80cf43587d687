"""Distillation brings blocks and models closer to the parent, and resumes to the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.heal import local, loop, whole
from pennyweight.heal import schedule as _schedule
from pennyweight.live.load import load_model
from pennyweight.live.walk import Layer, Walk
from pennyweight.model.choices import Choice
from pennyweight.model.slots import Slot
from pennyweight.runs.events import Silent
from pennyweight.runs.store import Store
from pennyweight.variants import ffn_width, linear, noop
from tests.live import after
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
    for steps in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            heal_whole(pair, Store(tmp_path / "b", {}), Stop(after=steps))
    resumed = heal_whole(pair, Store(tmp_path / "b", {}), Silent())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_loss_is_zero_for_the_parent_itself(pair):
    parent = load_model(pair[0], dtype=torch.float32)
    out = parent(ids(2), use_cache=False, output_hidden_states=True)
    assert float(whole.distillation_loss(out, out).detach()) == pytest.approx(0.0, abs=1e-5)


def outputs(seed: int) -> SimpleNamespace:
    """What transformers gives of a model of two layers: (2, 3) tokens, hidden 4, vocabulary 5."""
    random = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, 3, 4, generator=random) for _ in range(3))
    return SimpleNamespace(hidden_states=states, logits=torch.randn(2, 3, 5, generator=random))


def by_hand(child: SimpleNamespace, parent: SimpleNamespace) -> tuple[float, float]:
    """Summed cosine distances of the layers' outputs, and KL(parent || child) per token, in float64."""
    distance = 0.0
    for c, p in zip(child.hidden_states[1:], parent.hidden_states[1:], strict=True):
        c, p = c.double().numpy(), p.double().numpy()
        cosine = (c * p).sum(-1) / np.sqrt((c * c).sum(-1) * (p * p).sum(-1))
        distance += (1 - cosine).mean()
    p, q = (np.exp(out.logits.double().numpy()) for out in (parent, child))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return distance, (p * np.log(p / q)).sum(-1).mean()


def test_the_loss_of_the_whole_is_its_formula():
    child, parent = outputs(1), outputs(2)
    distance, kl = by_hand(child, parent)
    assert float(whole.distillation_loss(child, parent)) == pytest.approx(distance + kl, rel=1e-5)
    assert abs(by_hand(parent, child)[1] - kl) > 0.01  # the other direction is another number
    child.hidden_states = parent.hidden_states
    assert float(whole.distillation_loss(child, parent)) == pytest.approx(kl, rel=1e-5)
    child.hidden_states, child.logits = outputs(1).hidden_states, parent.logits
    assert float(whole.distillation_loss(child, parent)) == pytest.approx(distance, rel=1e-5)


@dataclass
class Rates(Silent):
    """Hears the learning rate of every step of a run."""

    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)

    def advance(self, done: int, **figures: float) -> None:
        if "loss" in figures:
            self.seen.append(self.optimizers[-1].param_groups[0]["lr"])


def test_the_whole_is_trained_by_schedule_and_never_on_the_rows_that_judge(pair, tmp_path, monkeypatch):
    parent = load_model(pair[0], dtype=torch.float32).requires_grad_(False)
    child = load_model(pair[1], dtype=torch.float32)
    trained, judged, rates = [], [], Rates()

    def seen(module, args, kwargs):
        (trained if torch.is_grad_enabled() else judged).append(args[0].clone())

    child.register_forward_pre_hook(seen, with_kwargs=True)
    adamw = loop.adamw

    def kept(*args, **kwargs):
        rates.optimizers.append(adamw(*args, **kwargs))
        return rates.optimizers[-1]

    monkeypatch.setattr(loop, "adamw", kept)
    rows, steps = ids(10), 40
    settings = {"tokens": steps * 2 * 32, "lr": 1e-4, "batch_rows": 2, "dtype": torch.float32, "listen": rates}
    whole.heal(parent, child, rows, store=Store(tmp_path, {}), **settings)
    kept_rows = _schedule.judges(10)
    assert torch.equal(torch.cat(judged), torch.cat([rows[-kept_rows:]] * 2))
    wanted = torch.arange(2 * steps).remainder(10 - kept_rows)
    assert torch.equal(torch.cat(trained), rows[wanted])
    assert rates.seen == pytest.approx([1e-4 * _schedule.cosine(step, steps) for step in range(steps)])


def test_the_loss_of_a_block_is_that_of_the_parents_layer_around_it(pico, tmp_path):
    both = {slot: LAYOUT[slot] for slot in (Slot("ffn", 0), Slot("mixer", 1))}
    both[Slot("ffn", 1)] = LAYOUT[Slot("ffn", 0)]  # beside a mixer that is changed as well
    folders = pico("qwen3"), build(pico("qwen3"), tmp_path / "child", both)
    parent, child = (Walk(Checkpoint(folder)) for folder in folders)
    store, rows = Store(tmp_path / "run", {}), ids()
    settings = {"tokens": 4 * 32, "lr": 1e-3, "batch_rows": 4, "store": store, "listen": Silent()}
    local.heal(parent, child, list(both), rows, **settings)
    judges = slice(-_schedule.judges(len(rows)), None)
    x = parent.embed(rows)
    with torch.no_grad():
        for index in range(2):
            theirs, pupils = parent.layer(index), child.layer(index)
            mixer, ffn = Slot("mixer", index), Slot("ffn", index)
            between = after(theirs, mixer, x)
            y = after(theirs, ffn, between)
            made = {mixer: after(theirs, ffn, after(pupils, mixer, x)), ffn: after(pupils, ffn, between)}
            for slot in made.keys() & both:
                wanted = (made[slot] - y)[judges].square().mean() / ((y - x)[judges].square().mean() + 1e-6)
                assert store.get(f"heal/local-loss/{slot}")[0] == pytest.approx(float(wanted), rel=1e-4), slot
            x = y


def test_a_step_is_clipped():
    weight = torch.nn.Parameter(torch.zeros(4))
    loop.run(
        lambda step: 1e6 * weight.sum(), [weight], [torch.optim.SGD([weight], 1.0)], steps=1, rate=lambda step: 1.0
    )
    assert float(weight.detach().norm()) == pytest.approx(1.0, rel=1e-4)


def test_blocks_are_trained_by_schedule_and_never_on_the_rows_that_judge(pair, tmp_path, monkeypatch):
    calls, seen = [], []
    train, run = loop.run, Layer.run

    def layer_run(self, hidden, **kw):
        if torch.is_grad_enabled():
            seen.append(hidden.detach())
        return run(self, hidden, **kw)

    monkeypatch.setattr(loop, "run", lambda loss_of, *args, **kw: calls.append(kw) or train(loss_of, *args, **kw))
    monkeypatch.setattr(Layer, "run", layer_run)
    heal_blocks(pair, Store(tmp_path, {}))
    steps, rows = calls[0]["steps"], ids()
    assert [calls[0]["rate"](step) for step in range(steps)] == [_schedule.cosine(step, steps) for step in range(steps)]
    entering = Walk(Checkpoint(pair[0])).embed(rows)
    wanted = torch.arange(4 * steps).remainder(len(rows) - _schedule.judges(len(rows)))
    assert torch.equal(torch.cat(seen[:steps]), entering[wanted])


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
