"""Replace-1-block scores: the parent scores exactly zero, and starting from cached states is running it all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pennyweight import kinds, variants
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.judge import codes, score, shortened, stats
from pennyweight.judge.stats import SlotStats, of_slot
from pennyweight.live.walk import Layer, Walk
from pennyweight.model.choices import PARENT, Choice
from pennyweight.model.shapes import Attention, Embedding, GatedMLP, Head
from pennyweight.model.slots import Slot
from pennyweight.prices.offers import single_choices
from pennyweight.runs import executor
from pennyweight.variants import apply
from tests.conftest import DISTINCT

ROWS, TOKENS = 3, 32


def ids() -> np.ndarray:
    return (np.arange(ROWS * (TOKENS + 1)) * 7919 % 300).reshape(ROWS, TOKENS + 1)


def scored() -> np.ndarray:
    mask = np.ones((ROWS, TOKENS), bool)
    mask[0, 5] = False
    return mask


class Scored:
    """A pico model, its statistics, and the scores of every single choice."""

    def __init__(self, folder, work, dtype=torch.float32, max_pending=2**30) -> None:
        self.folder, self.work, self.dtype = folder, work, dtype
        self.walk = Walk(Checkpoint(folder), dtype=dtype)
        wanted = {slot: variants.wanted(shape, variants.order()) for slot, shape in self.walk.shapes.items()}
        stats.embed(folder, {0: ids()[:, :-1]}, work, dtype)
        self.files = {}
        for layer in range(self.walk.layers):
            here = {slot: names for slot, names in wanted.items() if slot.layer == layer}
            stats.calibrate(folder, layer, [0], here, work, dtype)
            self.files[layer] = stats.sums_path(work, 0, layer)
        axes = kinds.names("variants")
        self.choices = {}
        for slot, shape in self.walk.shapes.items():
            found = single_choices(shape, axes, scored_tokens=TOKENS)
            if found:
                self.choices[slot] = [PARENT, *found]
        score.parent_chunk(folder, ids(), scored(), work, 0, dtype)
        hidden_bytes = ROWS * TOKENS * 64 * 4
        self.groups = score.groups(self.choices, hidden_bytes, max_pending)
        self.out: dict = {}
        for group in self.groups:
            self.out |= self.score(group)

    def score(self, group: score.Group) -> dict:
        codes = self.work / "codes"
        return score.score_chunk(self.folder, ids(), scored(), self.work, 0, group, self.files, codes, self.dtype)


@pytest.fixture(scope="module", params=DISTINCT)
def run(request, pico, tmp_path_factory):
    return Scored(pico(request.param), tmp_path_factory.mktemp("work"))


def test_the_parents_choice_scores_exactly_zero(run):
    for slot in run.choices:
        assert score.mean(run.out[str(slot)][PARENT.key()]) == dict.fromkeys(score.METRICS, 0.0), slot


def test_in_bfloat16_too(pico, tmp_path):
    found = Scored(pico("qwen3"), tmp_path, dtype=torch.bfloat16)
    for slot in found.choices:
        assert score.mean(found.out[str(slot)][PARENT.key()]) == dict.fromkeys(score.METRICS, 0.0), slot


@torch.no_grad()
def test_cached_states_give_what_a_full_forward_gives(run):
    """Each metric of every choice, against the whole model run from the tokens on with that one slot changed."""
    walk = run.walk
    mask = torch.from_numpy(scored())
    targets = torch.from_numpy(ids()[:, 1:])

    def whole(slot, choice):
        embedding = walk.embedding()
        head = walk.head()
        if slot == Slot("embed"):
            apply(embedding, choice, SlotStats({}))
            if walk.logits_slot == slot:
                head.root.weight = embedding.root.weight
        hidden = embedding.root(torch.from_numpy(ids()[:, :-1]))
        for layer in walk.each():
            if slot.layer == layer.index:
                tensors = stats.read(run.files[layer.index])
                apply(layer.parts[slot], choice, of_slot(tensors, slot.kind))
            hidden = layer.run(hidden)
        final = walk.norm()(hidden)
        if slot == Slot("head"):
            apply(head, choice, SlotStats({}))
        return final, walk.finished(head.root(final))[mask].double().log_softmax(dim=-1)

    parent_state, parent = whole(Slot("embed"), PARENT)
    for slot in map(Slot.parse, ("embed", "0.mixer", "1.ffn", "head")):
        for choice in run.choices.get(slot, (PARENT,))[1:]:
            state, child = whole(slot, choice)
            kl = (parent.exp() * (parent - child)).sum(dim=-1).mean()
            lm = (parent - child).gather(1, targets[mask][:, None]).mean()
            nmse = ((state - parent_state).square().mean((1, 2)) / (parent_state.square().mean((1, 2)) + 1e-6)).mean()
            cosine = 1 - torch.nn.functional.cosine_similarity(state.flatten(1), parent_state.flatten(1)).mean()
            found = score.mean(run.out[str(slot)][choice.key()])
            name = f"{slot} {choice}"
            assert found["kl"] == pytest.approx(float(kl), rel=2e-3, abs=2e-6), name
            assert found["lm"] == pytest.approx(float(lm), rel=2e-3, abs=2e-5), name
            assert found["nmse"] == pytest.approx(float(nmse), rel=1e-3, abs=1e-7), name
            assert found["cosine"] == pytest.approx(float(cosine), rel=1e-2, abs=1e-6), name


def test_groups_of_layers_give_the_same_scores(run, tmp_path):
    if run.folder.name != "llama":
        pytest.skip("one family is enough: how choices are grouped does not depend on it")
    apart = Scored(run.folder, tmp_path, max_pending=1)
    assert len(apart.groups) == len(apart.choices) > len(run.groups) == 4  # quarters, whatever fits
    assert apart.out == run.out


class Counted:
    """A task's steps, heard; at the `stop`th it is interrupted."""

    def __init__(self, run: Scored, group: score.Group, stop: float | None = None) -> None:
        self.steps, self._stop = 0.0, stop
        self.found = next(executor.run(lambda: run.score(group), [()], on_tick=self._hear))

    def _hear(self, steps: float) -> None:
        self.steps += steps
        if self._stop is not None and self.steps >= self._stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tied(pico, tmp_path_factory):
    """One family, with choices for a matrix that is embedding and head in one."""
    return Scored(pico("llama", tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


def test_work_is_counted_in_passes_so_that_a_choice_counts_for_as_long_as_it_takes(tied):
    shapes = tied.walk.shapes
    logits = score.passes(Slot("head"), shapes)
    assert [score.passes(Slot("mixer", i), shapes) - logits for i in range(3)] == pytest.approx([3, 2, 1])
    assert score.passes(Slot("embed"), shapes) - logits == pytest.approx(3)
    assert logits > 0
    for group in tied.groups:
        wanted = sum(score.passes(slot, shapes) * len(offered) for slot, offered in group.slots)
        assert Counted(tied, group).steps == pytest.approx(wanted)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("number", [0, 3])
def test_a_task_that_was_killed_goes_on_where_it_was_to_the_same_sums(tied, number, share, monkeypatch):
    monkeypatch.setattr(score, "_KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(score, "_KEEP_SHARE", float("inf"))
    group, shapes = tied.groups[number], tied.walk.shapes
    total = sum(score.passes(slot, shapes) * len(offered) for slot, offered in group.slots)
    most = max(score.passes(Slot("head"), shapes), 1)
    with pytest.raises(KeyboardInterrupt):
        Counted(tied, group, stop=share * total)
    done = score.passes_done(tied.work, 0, group, shapes)
    assert share * total - 1 - most <= done <= share * total + most
    again = Counted(tied, group)
    assert again.steps == pytest.approx(total - done)
    assert again.found == {str(slot): tied.out[str(slot)] for slot, _ in group.slots}
    score.forget(tied.work, 0, group)
    assert not [path.name for path in tied.work.iterdir() if path.name.startswith(("state", "compared"))]


def test_a_damaged_state_begins_again_and_the_others_do_not(tied, monkeypatch):
    monkeypatch.setattr(score, "_KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(score, "_KEEP_SHARE", float("inf"))
    group, shapes = tied.groups[1], tied.walk.shapes
    total = sum(score.passes(slot, shapes) * len(offered) for slot, offered in group.slots)
    whole = total - sum(score.passes(Slot("head"), shapes) * len(offered) for _, offered in group.slots)
    with pytest.raises(KeyboardInterrupt):
        Counted(tied, group, stop=whole - 1e-6)
    state = next(path for path in tied.work.iterdir() if path.name.startswith("state"))
    state.write_bytes(state.read_bytes()[:-1])
    again = Counted(tied, group)
    assert 0 < again.steps - (total - whole) <= 3 + 1e-6
    assert again.found == {str(slot): tied.out[str(slot)] for slot, _ in group.slots}
    score.forget(tied.work, 0, group)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_parent_s_states_are_made_again_where_they_are_gone(tied, layer, monkeypatch):
    path = score.hidden_path(tied.work, 0, layer)
    before, ran, run = path.read_bytes(), [], Layer.run
    path.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
    monkeypatch.setattr(Layer, "run", lambda self, *args, **more: ran.append(self.index) or run(self, *args, **more))
    score.parent_chunk(tied.folder, ids(), scored(), tied.work, 0, tied.dtype)
    assert path.read_bytes() == before
    assert ran == list(range(max(0, layer - 1), 3))


def test_what_only_quantisers_read_is_known():
    ffn = GatedMLP(hidden_size=64, intermediate_size=128)
    mixer = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    both = {"input_moment", "inner_moment"}
    assert codes.spent(ffn, ("bits",)) == codes.spent(mixer, ("bits", "mixed_bits")) == both
    assert codes.spent(ffn, ("bits", "linear")) == {"inner_moment"}, "what is linear has no inner activation"
    assert codes.spent(ffn, ("bits", "noop")) == both, "what is gone reads nothing"
    assert codes.spent(mixer, ("bits", "window")) == codes.spent(mixer, variants.default()) == set()
    assert codes.spent(ffn, ("bits", "ffn_width")) == set(), "narrower ones are fitted by it"


def test_more_is_cut_the_worse_it_gets(run):
    for layer in range(3):
        found = run.out[f"{layer}.ffn"]
        widths = [c for c in run.choices[Slot("ffn", layer)] if "ffn_width" in c]
        scores = [found[c.key()]["kl"] for c in sorted(widths, key=lambda c: -c["ffn_width"].width)]
        assert scores[0] < scores[-1]
        assert scores[0] > 0
    assert run.out["0.mixer"][Choice((("noop", kinds.load("variants", "noop").Spec()),)).key()]["kl"] > 0


def test_divergence_keeps_its_digits():
    """Differences of 1e-4 in logits give a KL of 1e-9 nats; two float32 softmaxes could not even give its sign."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 1000, generator=generator)
    difference = 1e-4 * torch.randn(64, 1000, generator=generator)
    targets = torch.randint(1000, (64, 1), generator=generator)
    p = logits.double().log_softmax(-1)
    q = (logits.double() + difference.double()).log_softmax(-1)
    kl, lm = score.divergence(logits.softmax(-1), difference, targets)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=2e-2, atol=1e-10)
    torch.testing.assert_close(lm.double(), (p - q).gather(1, targets).squeeze(1), rtol=1e-2, atol=1e-9)


def test_divergence_survives_huge_differences():
    p = torch.tensor([[0.5, 0.5, 0.0]])
    kl, lm = score.divergence(p, torch.tensor([[0.0, 0.0, 200.0]]), torch.tensor([[0]]))
    assert torch.isfinite(kl).all()
    assert float(kl) > 50
    assert torch.isfinite(lm).all()


def test_divergence_of_small_differences_is_not_what_rounding_of_their_mean_makes_of_it():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(64, 50_000, generator=generator)
    difference = 3.0 + 1e-3 * torch.randn(64, 50_000, generator=generator)
    p = logits.double().log_softmax(-1)
    q = (logits.double() + difference.double()).log_softmax(-1)
    kl, _ = score.divergence(logits.softmax(-1), difference, torch.zeros(64, 1, dtype=torch.int64))
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=2e-3, atol=0)


class Wide:
    """A parent's states that make distributions over 4000 tokens, and what `walk` is asked of it."""

    divisor, logits_slot, dtype = 2.0, Slot("head"), torch.float32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(4000, 48, generator=generator)
        self.states = 1.5 * torch.randn(256, 48, generator=generator)
        self.noise = torch.randn(3, 256, 48, generator=generator)
        self.targets = torch.randint(4000, (256,), generator=generator)

    def matrix(self, slot):
        return self.rows

    def finished(self, products):
        return products / self.divisor

    def change_of_logits(self, products, change):
        return change / self.divisor

    @property
    def shapes(self):
        return SHAPES

    def sums(self, scale: float, short: bool) -> list[score.Sums]:
        head = torch.nn.Linear(48, 4000, bias=False)
        head.weight = torch.nn.Parameter(self.rows, requires_grad=False)
        parent = score._Parent(self, head, self.states, self.targets)  # pyright: ignore[reportArgumentType]
        children = [
            score._Compared((Slot("ffn", 0), f"{number}"), dict(EMPTY), self.states + scale * noise)  # pyright: ignore
            for number, noise in enumerate(self.noise)
        ]
        if short:
            found = shortened.shorten(self, self.states, seed=0)  # pyright: ignore[reportArgumentType]
            score._short_sums(parent, found, children, None)
        else:
            score._whole_sums(parent, children, None)
        return [child.sums for child in children]


EMPTY = {"kl": 0.0, "lm": 0.0, "kl_by_stretch": []}
SHAPES = {
    Slot("ffn", 0): GatedMLP(hidden_size=48, intermediate_size=128),
    Slot("head"): Head(hidden_size=48, vocab_size=4000),
}


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.2, 2.0])
@torch.no_grad()
def test_short_distributions_give_the_kl_of_whole_ones(scale):
    """Small damage and large; at 2.0 children are far away and are compared whole."""
    wide = Wide()
    assert shortened.shortens(SHAPES[Slot("head")], SHAPES[Slot("head")])
    for short, whole in zip(wide.sums(scale, True), wide.sums(scale, False), strict=True):
        assert short["kl"] == pytest.approx(whole["kl"], rel=3e-3)
        assert short["lm"] == pytest.approx(whole["lm"], rel=3e-3, abs=3e-3 * whole["kl"])
        assert sum(short["kl_by_stretch"]) == pytest.approx(short["kl"], rel=1e-6)
        assert len(short["kl_by_stretch"]) == 256 / score.STRETCH
    assert all(each["kl"] == each["lm"] == 0 for each in wide.sums(0.0, True))


@torch.no_grad()
def test_a_child_s_sums_do_not_depend_on_who_is_compared_with_it():
    wide = Wide()
    together = wide.sums(0.1, True)
    for number in range(3):
        alone = Wide()
        alone.noise = wide.noise[number : number + 1]
        assert alone.sums(0.1, True) == together[number : number + 1]


def test_capped_logits_and_small_vocabularies_are_not_shortened():
    wide, small = Head(hidden_size=48, vocab_size=4000), Head(hidden_size=48, vocab_size=1000)
    assert shortened.shortens(wide, wide)
    assert not shortened.shortens(small, small)
    assert not shortened.shortens(replace(wide, cap=30.0), wide)


def test_comparing_short_distributions_counts_for_less():
    """The passes of a choice, in a model whose vocabulary is most of it."""
    large = {"hidden_size": 48, "vocab_size": 40_000}
    shapes = {**SHAPES, Slot("embed"): Embedding(**large), Slot("head"): Head(**large)}
    of_head, of_ffn = (score.passes(slot, shapes) for slot in (Slot("head"), Slot("ffn", 0)))
    assert of_ffn - 1 < of_head / 2


@pytest.fixture(scope="module")
def wide_vocabulary(pico, tmp_path_factory):
    return Scored(pico("llama", vocab_size=2200), tmp_path_factory.mktemp("wide"))


def test_scores_by_short_distributions(wide_vocabulary, monkeypatch, tmp_path):
    """Through the files of a run: near those of the whole vocabulary, exactly zero for the parent's choice, and the
    same when a task was killed in the middle of comparing."""
    run = wide_vocabulary
    assert score._short_path(run.work, 0).exists()
    monkeypatch.setattr(shortened, "shortens", lambda head, logits: False)
    whole = Scored(run.folder, tmp_path)
    monkeypatch.undo()
    assert not score._short_path(tmp_path, 0).exists()
    differ = 0
    for slot, offered in run.choices.items():
        assert score.mean(run.out[str(slot)][PARENT.key()]) == dict.fromkeys(score.METRICS, 0.0)
        for choice in offered:
            short, other = (each.out[str(slot)][choice.key()] for each in (run, whole))
            assert short["kl"] == pytest.approx(other["kl"], rel=0.02), f"{slot} {choice}"
            differ += short["kl"] != other["kl"]
    assert differ > 10
    monkeypatch.setattr(score, "_KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(score, "_KEEP_SHARE", float("inf"))
    group, shapes = run.groups[1], run.walk.shapes
    total = sum(score.passes(slot, shapes) * len(offered) for slot, offered in group.slots)
    with pytest.raises(KeyboardInterrupt):
        Counted(run, group, stop=total - 1)
    done = score.passes_done(run.work, 0, group, shapes)
    assert 0 < done < total
    again = Counted(run, group)
    assert again.steps == pytest.approx(total - done)
    assert again.found == {str(slot): run.out[str(slot)] for slot, _ in group.slots}
