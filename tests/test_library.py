"""Variants that learn before they are judged: what they learn, what it changes, and that it is done once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pennyweight.config import FitConfig, merged
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.heal import library, schedule
from pennyweight.job.gather import gather_stats, score_choices, scores, singles
from pennyweight.job.job import open_job
from pennyweight.job.library import learns, train_library
from pennyweight.job.run import run_job
from pennyweight.judge.stats import SlotStats, variant_path
from pennyweight.live.walk import Walk
from pennyweight.model.choices import Choice
from pennyweight.model.shapes import Attention, GatedMLP
from pennyweight.model.slots import Slot
from pennyweight.runs import executor, scratch
from pennyweight.runs.events import Silent
from pennyweight.variants import apply, bits, ffn_width, kv_heads, noop
from tests.live import after

FFN, MIXER = Slot("ffn", 1), Slot("mixer", 1)
HALF = Choice((("ffn_width", ffn_width.Spec(64)),))
TOKENS = 2048


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    words = [f"word{i % 37} follows word{i % 11} in line {i}" for i in range(3000)]
    path.write_text("\n".join(words))
    return path


def config(text, **changes) -> FitConfig:
    data = {"text": str(text), "context": 32, "calibration_rows": 8, "score_rows": 4, "held_out_rows": 4}
    heal = {"library_tokens": TOKENS, "local_tokens": 0, "whole_tokens": 0, "batch_rows": 4}
    base = {"machine": "m2-max", "axes": ("noop", "ffn_width", "kv_heads"), "budget": {"weights": "70%"}}
    return merged(merged(FitConfig(), {**base, "data": data, "heal": heal}), changes)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "phi3"])
def scored(request, pico, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("library") / "out"
    with open_job(pico(request.param), out, config(text)) as job:
        gather_stats(job)
        train_library(job)
        score_choices(job)
        yield job


def test_what_learned_is_nearer_to_the_parent(scored, pico, text, tmp_path):
    """By each one's own loss, never worse; and the model with such a block, as a whole and on other text."""
    every = [(slot, choice) for slot, own in singles(scored).items() for choice in own if learns(choice)]
    told = [library.losses(scored.library, slot, choice) for slot, choice in every]
    assert len(every) > 12 and all(own and len(own) in (2, 3) for own in told)
    assert all(own[-1] <= 1.01 * own[0] for own in told)  # weights are kept in 16 bits
    assert sum(own[-1] for own in told) < 0.9 * sum(own[0] for own in told)
    with open_job(scored.model, tmp_path / "out", config(text, heal={"library_tokens": 0})) as job:
        gather_stats(job)
        score_choices(job)
        raw, learned = scores(job), scores(scored)
    lost = [(raw[s][c.key()]["kl"], learned[s][c.key()]["kl"]) for s, c in every]
    assert sum(after for _, after in lost) < 0.9 * sum(before for before, _ in lost)
    gone = [(raw[s][c.key()], learned[s][c.key()]) for s, own in singles(job).items() for c in own if "noop" in c]
    assert all(before == after for before, after in gone), "what has no weights cannot learn"


def test_a_learned_variant_is_what_is_applied(scored):
    learned = Choice((("kv_heads", kv_heads.Spec(1, "mean")),))  # which least squares do not begin near the parent
    walk = Walk(Checkpoint(scored.model))
    stats = SlotStats(_own(scored, MIXER), owner=str(MIXER), library=scored.library)
    parts = apply(walk.layer(1).parts[MIXER], learned, stats)
    kept = scratch.needed(variant_path(scored.library, MIXER, learned))
    assert all(torch.equal(parameter.bfloat16(), kept[name]) for name, parameter in parts.parameters())
    raw = apply(walk.layer(1).parts[MIXER], learned, SlotStats(_own(scored, MIXER)))
    assert not all(torch.equal(p.bfloat16(), kept[name]) for name, p in raw.parameters())
    narrow = Choice((*HALF.specs, ("bits", bits.Spec(8, 64))))
    assert learns(narrow) == HALF and learns(Choice((("noop", noop.Spec()),))) is None


def _own(job, slot: Slot) -> dict[str, torch.Tensor]:
    prefix = f"{slot.kind}."
    return {
        n.removeprefix(prefix): t for n, t in job.store.tensors(f"stats/{slot.layer}").items() if n.startswith(prefix)
    }


def test_what_learned_does_not_learn_again_and_what_is_damaged_does(pico, text, tmp_path, monkeypatch):
    trained: list[tuple] = []
    train = library.local.train
    monkeypatch.setattr(library.local, "train", lambda *a, **more: trained.append(a[1]) or train(*a, **more))
    with open_job(pico("llama"), tmp_path / "out", config(text, axes=("ffn_width",))) as job:
        gather_stats(job)
        train_library(job)
        count, path = len(trained), variant_path(job.library, FFN, HALF)
        before = path.read_bytes()
        train_library(job)
        assert len(trained) == count
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        train_library(job)
        assert count < len(trained) <= count + 2 and set(trained[count:]) == {FFN}
        assert path.read_bytes() == before, "the same bytes as the first time"


def test_tokens_go_where_they_can_matter(pico, text, tmp_path, monkeypatch):
    """A variant that a cheaper one beats by far after a quarter of the tokens gets no more."""
    lost, steps = {112: 0.10, 96: 0.20, 80: 0.18, 64: 0.17}, {}

    def told(layer, slot, hidden, target, count, *rest, **more):
        width = layer.parts[slot].shape.intermediate_size
        steps.setdefault(width, []).append(count)
        return [1.0, lost.get(width, 0.5)]

    monkeypatch.setattr(library.local, "train", told)
    with open_job(pico("llama"), tmp_path / "out", config(text, axes=("ffn_width",))) as job:
        gather_stats(job)
        offered = [Choice((("ffn_width", ffn_width.Spec(width)),)) for width in (112, 96, 80, 64, 48)]
        train_library(job, {FFN: offered})
        course = TOKENS // (4 * 32)
        whole = [course // 4, 3 * course // 4]
        # 96 costs more than 64 and is worse, but 1.18 times worse is within what training may turn.
        assert steps == {112: whole, 96: whole, 80: whole, 64: whole, 48: whole}
        lost[96] = 0.30
        steps.clear()
        monkeypatch.setattr(library, "STRETCHES", (0.5, 0.5))
        job.store.drop("library/")
        for path in job.library.iterdir():
            path.unlink()
        train_library(job, {FFN: offered})
        assert steps[96] == [course // 2] and steps[64] == [course // 2] * 2 == steps[112]
        assert library.losses(job.library, FFN, offered[1]) == [1.0, pytest.approx(0.30)]


def test_another_course_is_another_library(pico, text, tmp_path):
    model, out = pico("llama"), tmp_path / "out"
    with open_job(model, out, config(text, axes=("ffn_width",))) as job:
        gather_stats(job)
        train_library(job)
        score_choices(job)
        first, path = scores(job), variant_path(job.library, FFN, HALF)
        before = path.read_bytes()
    longer = config(text, axes=("ffn_width",), heal={"library_tokens": 2 * TOKENS})
    with open_job(model, out, longer) as job:
        train_library(job)
        score_choices(job)
        assert scores(job) != first and path.read_bytes() != before
    with open_job(model, out, config(text, axes=("ffn_width",), heal={"library_tokens": 0})) as job:
        train_library(job)
        score_choices(job)
        raw = scores(job)
        assert raw != first and not path.exists()
    with open_job(model, tmp_path / "raw", config(text, axes=("ffn_width",), heal={"library_tokens": 0})) as job:
        gather_stats(job)
        score_choices(job)
        train_library(job)  # asked for afterwards, and for nothing: scores stay
        assert scores(job) == raw


def test_the_child_starts_from_what_learned(pico, text, tmp_path):
    model, out = pico("llama"), tmp_path / "out"
    with open_job(model, out, config(text, axes=("ffn_width",)), listen=Silent()) as job:
        report = run_job(job)
        chosen = {Slot.parse(s): c for s, c in report["chosen"]["solutions"][0]["layout"].items()}
        assert chosen
        child = Checkpoint(out)
        for slot, told in chosen.items():
            kept = scratch.needed(
                variant_path(job.library, slot, Choice((("ffn_width", ffn_width.Spec(**told["ffn_width"])),)))
            )
            kept.pop("losses")
            assert kept and all(torch.equal(child.read(name), tensor) for name, tensor in kept.items())


def test_what_is_cheaper_in_everything_and_better_by_far_beats():
    shapes = [GatedMLP(hidden_size=64, intermediate_size=width) for width in (64, 96)]
    assert library._beats(shapes, [1.0, 1.3], 0, 1) and not library._beats(shapes, [1.0, 1.25], 0, 1)
    assert not library._beats(shapes, [1.3, 1.0], 1, 0), "what costs more beats nothing"
    assert not library._beats(shapes, [0.0, 0.0], 0, 0), "nor itself"
    mixers = [Attention(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, window=w) for w in (None, 8)]
    same = [dataclasses.replace(mixers[0]), mixers[0]]
    assert library._beats(same, [1.0, 2.0], 0, 1), "at equal cost the better one does"


@pytest.mark.parametrize(("kind", "tokens"), [("mixer", 48), ("ffn", 48), ("ffn", 96), ("ffn", 70)])
def test_a_slot_is_trained_alone_on_what_enters_it_in_the_parent(pico, kind, tokens):
    """An FFN gets what its mixer left, in rows of at most 64 tokens; its loss is that of the layer's output."""
    layer, slot = Walk(Checkpoint(pico("qwen3"))).layer(1), Slot(kind, 1)
    entering = torch.randn(6, tokens, 64, generator=torch.Generator().manual_seed(0))
    alone, hidden, target = library._alone(layer, slot, entering, 2, torch.float32)
    with torch.no_grad():
        x = entering if kind == "mixer" else after(layer, Slot("mixer", 1), entering)
        y = layer.run(entering)
    rows = {48: 48, 96: 48, 70: 35}[tokens] if kind == "ffn" else tokens
    assert hidden.shape == target.shape == (6 * tokens // rows, rows, 64)
    torch.testing.assert_close(hidden.reshape(x.shape), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.reshape(y.shape), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.run(hidden), target, rtol=1e-4, atol=1e-4)
    pupil = alone.fork(slot)
    apply(pupil.parts[slot], Choice((("noop", noop.Spec()),)), SlotStats({}))
    left = y - x if kind == "ffn" else None
    if left is not None:  # without its FFN, what is missing is what the FFN adds
        torch.testing.assert_close((target - pupil.run(hidden)).reshape(left.shape), left, rtol=1e-4, atol=1e-4)


def test_how_a_variant_is_trained(pico, tmp_path, monkeypatch):
    """Steps by tokens and rows, each stretch from where the last one ended, at half the rate of healing."""
    walk, calls = Walk(Checkpoint(pico("llama"))), []

    def told(layer, slot, hidden, target, steps, lr, batch_rows, dtype, **more):
        calls.append({"steps": steps, "lr": lr, "rows": batch_rows, **more, "shape": tuple(hidden.shape)})
        for parameter in dict(layer.parts[slot].parameters()).values():
            parameter.data.add_(1.0)
        return [0.5, 0.25 / len(calls)]

    monkeypatch.setattr(library.local, "train", told)
    entering = tmp_path / "entering.safetensors"
    scratch.keep(entering, {"hidden": torch.randn(20, 96, 64)})
    slice_ = Choice((("ffn_width", ffn_width.Spec(64, "slice")),))
    stats = tmp_path / "stats.safetensors"
    scratch.keep(stats, {"ffn.activation_mean_abs": torch.arange(128.0)})
    ticks = []
    task = (
        walk.checkpoint.path,
        FFN,
        [slice_],
        entering,
        stats,
        tmp_path,
        library.Course(8 * 4 * 48, None, 4),
        torch.float32,
    )
    list(executor.run(library.train, [task], on_tick=ticks.append))
    judges = schedule.judges(20) * 96 // 48
    common = {"lr": 0.5 * schedule.local_lr(64), "rows": 4, "judges": judges, "shape": (40, 48, 64)}
    assert calls == [{"steps": 2, "first": 0, **common}, {"steps": 6, "first": 2, **common}]
    assert library.losses(tmp_path, FFN, slice_) == [0.5, 0.25, 0.125] and ticks == [0.25, 0, 0.75, 0]
    kept = scratch.needed(variant_path(tmp_path, FFN, slice_))
    raw = dict(apply(walk.layer(1).parts[FFN], slice_, SlotStats(stats_of(stats))).parameters())
    for name, parameter in raw.items():  # the second stretch goes on from what the first one kept in 16 bits
        assert torch.equal(kept[name], ((parameter.data + 1).bfloat16().float() + 1).bfloat16())
    calls.clear()
    other = Choice((("ffn_width", ffn_width.Spec(48, "slice")),))
    task = (walk.checkpoint.path, FFN, [other], entering, stats, tmp_path, library.Course(1, 3e-4, 4), torch.float32)
    list(executor.run(library.train, [task]))
    assert [(call["steps"], call["first"], call["lr"]) for call in calls] == [(1, 0, 3e-4), (2, 1, 3e-4)]


def stats_of(path):
    return {"activation_mean_abs": scratch.needed(path)["ffn.activation_mean_abs"]}


def test_what_leaves_a_layer_is_passed_on_once(pico, tmp_path):
    walk, entering, leaving = Walk(Checkpoint(pico("llama"))), tmp_path / "in", tmp_path / "out"
    hidden = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    scratch.keep(entering, {"hidden": hidden})
    library.pass_on(walk.checkpoint.path, 1, entering, leaving, 2, torch.float32)
    with torch.no_grad():
        wanted = walk.layer(1).run(hidden)
    torch.testing.assert_close(scratch.needed(leaving)["hidden"], wanted, rtol=1e-5, atol=1e-6)
    scratch.keep(leaving, {"hidden": hidden})
    library.pass_on(walk.checkpoint.path, 1, entering, leaving, 2, torch.float32)
    assert torch.equal(scratch.needed(leaving)["hidden"], hidden)
