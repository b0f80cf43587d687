"""Many texts at once, guessed ahead and begun from what is known, say what each would say alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pennyweight.disk.tokenizer import GenerationConfig
from pennyweight.live.load import load_model
from pennyweight.runtime.sample import GREEDY, Sampling, candidates, pick, sampling_of
from tests.test_heterogeneous import LAYOUT, build

pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.engine import Engine
from pennyweight.runtime.generate import Batch, Request, TooLong
from pennyweight.runtime.speculate import DraftModel, PromptLookup, common_prefix

PROMPTS = [[7, 250, 3, 99], [5], [11] * 30, [7, 250, 3, 98, 1], list(range(40, 100)), [7, 250]]


@pytest.fixture(scope="module")
def child(pico, tmp_path_factory):
    return build(pico("qwen3"), tmp_path_factory.mktemp("child") / "child", LAYOUT)


@pytest.fixture(scope="module")
def engine(child):
    return Engine(child, threads=2, force_threads=True)


def finish(batch: Batch) -> None:
    while batch.busy:
        batch.step()


def answers(engine, prompts=PROMPTS, tokens=24, sampling=GREEDY, **settings) -> list[list[int]]:
    batch = Batch(engine, **settings)
    texts = [batch.submit(Request(prompt, tokens, sampling)) for prompt in prompts]
    finish(batch)
    assert all(text.finish == "length" for text in texts)
    return [text.answer for text in texts]


@pytest.fixture(scope="module")
def alone(engine):
    return [answers(engine, [prompt], places=1)[0] for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_transformers(child, alone):
    model = load_model(child, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert found[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("places", [1, 2, 8])
@pytest.mark.parametrize("chunk", [3, 256])
def test_company_changes_nothing(engine, alone, places, chunk):
    assert answers(engine, places=places, chunk=chunk) == alone


def test_drawn_tokens_do_not_depend_on_company(engine):
    drawn = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=5)
    one_by_one = [answers(engine, [prompt], places=1, sampling=drawn)[0] for prompt in PROMPTS]
    assert answers(engine, sampling=drawn, places=3) == one_by_one
    assert one_by_one != [answers(engine, [prompt], places=1)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, seed=3)])
def test_guesses_change_no_token(engine, pico, sampling):
    """Prompt lookup, the model as its own draft (always right when greedy) and another model as draft."""
    expected = answers(engine, sampling=sampling)
    other = Engine(pico("qwen3"), threads=1)
    for guesser in (PromptLookup, lambda: DraftModel(engine, 256), lambda: DraftModel(other, 256)):
        assert answers(engine, sampling=sampling, guesser=guesser, places=2) == expected


def test_right_guesses_save_steps(engine):
    steps = 0
    batch = Batch(engine, guesser=lambda: DraftModel(engine, 256), guesses=4)
    batch.submit(Request(PROMPTS[0], 20))
    while batch.busy:
        batch.step()
        steps += 1
    assert steps <= 5


def test_prompt_lookup_finds_the_latest_and_longest():
    guess = PromptLookup().guess
    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3], 2) == [5, 6]
    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 9) == [4, 9, 2, 3, 5, 1, 2, 3]
    assert guess([1, 2, 3], 5) == []
    assert guess([], 5) == guess([1], 5) == []


def test_shared_beginnings_are_not_run_again(engine, alone):
    batch = Batch(engine, places=3)
    first = batch.submit(Request(PROMPTS[4], 24))
    finish(batch)
    again = batch.submit(Request(PROMPTS[4], 24))
    beside = batch.submit(Request([*PROMPTS[4][:50], 1, 2], 24))
    finish(batch)
    assert first.answer == again.answer == alone[4]
    assert first.shared == 0 and again.shared == len(PROMPTS[4]) - 1 and beside.shared == 50
    assert beside.answer == answers(engine, [[*PROMPTS[4][:50], 1, 2]])[0]


def test_stops_and_ends(engine, alone):
    batch = Batch(engine, capacity=40)
    stopped = batch.submit(Request(PROMPTS[0], 24, stop=frozenset([alone[0][5]])))
    full = batch.submit(Request(PROMPTS[2], 24))
    gone = batch.submit(Request(PROMPTS[1], 24))
    batch.step()
    batch.cancel(gone)
    finish(batch)
    assert stopped.finish == "stop" and stopped.answer == alone[0][: alone[0].index(alone[0][5])]
    assert full.finish == "length" and len(full.tokens) == 40
    assert gone.finish == "cancelled"
    with pytest.raises(ValueError, match="no tokens"):
        batch.submit(Request([], 5))
    with pytest.raises(TooLong, match="39 fit"):
        batch.submit(Request([1] * 40, 5))
    for token in (-1, -(2**40), 300, 2**40):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary of 300") as err:
            batch.submit(Request([5, token, 6], 5))
        assert not isinstance(err.value, TooLong)


@pytest.mark.parametrize("guesser", [None, PromptLookup])
def test_nothing_ends_before_as_many_tokens_as_are_asked_for(engine, alone, guesser):
    """The definition, step by step: until then the tokens that end are out of the question."""
    stop = frozenset(token for answer in alone[:2] for token in (answer[0], *answer[4:9]))
    batch = Batch(engine, places=2, guesser=guesser)
    texts = [batch.submit(Request(prompt, 24, stop=stop, min_tokens=7)) for prompt in PROMPTS[:2]]
    finish(batch)
    for text, prompt in zip(texts, PROMPTS, strict=False):
        expected: list[int] = []
        while len(expected) < 24:
            logits = engine.logits([*prompt, *expected])[-1]
            if len(expected) < 7:
                logits[list(stop)] = -np.inf
            if (token := int(logits.argmax())) in stop:
                break
            expected.append(token)
        assert text.answer == expected and len(expected) >= 7
        assert text.finish == ("length" if len(expected) == 24 else "stop")


def test_one_text_that_fails_leaves_the_others_alone(engine, alone, monkeypatch):
    """Numbers that are none end the text they belong to, and what its cache holds begins no other."""
    batch = Batch(engine, places=3)
    good, bad = batch.submit(Request(PROMPTS[0], 24)), batch.submit(Request(PROMPTS[4], 24))
    step = engine.step

    def broken(rows):
        logits = step(rows)
        logits[[row.sequence == bad.sequence for row in rows if row.wants_logits]] = np.nan
        return logits

    monkeypatch.setattr(engine, "step", broken)
    finish(batch)
    monkeypatch.undo()
    assert bad.finish == "failed" and "no number" in str(bad.error) and not bad.answer
    assert good.finish == "length" and good.answer == alone[0]
    again = batch.submit(Request(PROMPTS[4], 24))
    finish(batch)
    assert again.shared == 0 and again.answer == alone[4]


def test_texts_being_written_do_not_wait_for_prompts(engine):
    """However long the prompts beside it are, a text gets its token in every step."""
    batch = Batch(engine, places=4, chunk=256, capacity=250)
    writer = batch.submit(Request([5], 30))
    batch.step()
    for i in range(3):
        batch.submit(Request([i + 10] * 240, 2))
    batch.waiting.reverse()
    written = len(writer.answer)
    while batch.busy and writer.finish is None:
        batch.step()
        written += 1
        assert len(writer.answer) == written


def test_a_draft_model_that_forgets_reads_again(pico, tmp_path, engine):
    """A draft with a window, whose ring went round further than the text goes back."""
    folder = build(pico("qwen3", max_position_embeddings=2048), tmp_path / "child", LAYOUT)
    forgetful = Engine(folder, threads=1)
    draft = DraftModel(forgetful, 2000)
    long = [int(i) for i in np.arange(1500) * 7919 % 300]
    draft.guess(long, 4)
    assert draft.guess([*long[:300], 5], 4) == DraftModel(forgetful, 2000).guess([*long[:300], 5], 4)
    assert draft.guess(long[:100], 0) == []
    assert draft.guess([*long[:200], 5], 4) == DraftModel(forgetful, 2000).guess([*long[:200], 5], 4)


def test_drawing_follows_the_probabilities():
    logits = np.log(np.asarray([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = Counter(pick(logits, Sampling(temperature=1.0), (), rng) for _ in range(20_000))
    for token, share in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert abs(counts[token] / 20_000 - share) < 0.015


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(temperature=1, top_k=2), [0, 1]),
        (Sampling(temperature=1, top_p=0.45), [0]),
        (Sampling(temperature=1, top_p=0.55), [0, 1]),
        (Sampling(temperature=1, min_p=0.2), [0, 1, 2]),
        (Sampling(temperature=0.1), [0, 1, 2, 3]),
        (Sampling(temperature=1e-300), [0]),
        (Sampling(temperature=5e-324, top_p=0.9), [0]),
        (Sampling(temperature=1, top_p=0.0), [0]),
    ],
)
def test_what_may_be_drawn(sampling, left):
    tokens, probabilities = candidates(np.log(np.asarray([0.5, 0.3, 0.15, 0.05], np.float32)), sampling)
    assert tokens.tolist() == left
    assert abs(probabilities.sum() - 1) < 1e-9


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"top_p is 1\.5"):
        Sampling(top_p=1.5)
    with pytest.raises(FloatingPointError, match="no number"):
        pick(np.asarray([0, np.nan], np.float32), Sampling(), (), np.random.default_rng())
    penalised = pick(np.asarray([2.0, 1.5], np.float32), Sampling(repetition_penalty=2.0), [0], np.random.default_rng())
    assert penalised == 1


def test_what_is_not_given_is_as_the_models_makers_say():
    said = GenerationConfig(temperature=0.6, top_k=20, repetition_penalty=1.2)
    assert sampling_of(said, draws=True) == Sampling(temperature=0.6, top_k=20, repetition_penalty=1.2)
    assert sampling_of(said, draws=False) == Sampling(temperature=0, top_k=20, repetition_penalty=1.2)
    assert sampling_of(said, draws=False, temperature=0.3, top_k=0, top_p=None, seed=4) == Sampling(
        temperature=0.3, repetition_penalty=1.2, seed=4
    )
    drawn, greedy = (said.model_copy(update={"do_sample": draws}) for draws in (True, False))
    for draws in (True, False):
        assert sampling_of(drawn, draws=draws).temperature == 0.6
        assert sampling_of(greedy, draws=draws).temperature == 0
    assert sampling_of(GenerationConfig(do_sample=True), draws=False).temperature == 1
    assert sampling_of(GenerationConfig(), draws=True).temperature == 1
    assert sampling_of(GenerationConfig(), draws=False) == GREEDY


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 4, 3]) == 1
