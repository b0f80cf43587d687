"""The n-gram baseline of benchmarks/language_model.py, against sums done by hand and against its definition."""

import importlib.util
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

A, B, C, D = range(4)


@pytest.fixture(scope="module")
def kneser_ney():
    path = Path(__file__).parents[1] / "benchmarks" / "_kneser_ney.py"
    spec = importlib.util.spec_from_file_location("_kneser_ney", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def text():
    """Words near the last one, and now and then a rare one: enough repeats for estimated discounts at every order."""
    random = np.random.default_rng(0)
    common = np.cumsum(random.zipf(1.8, 8000).clip(max=200)) % 101
    rare = 101 + random.geometric(0.06, 8000).clip(max=149)
    return np.where(random.random(8000) < 0.02, rare, common).astype(np.uint16)


def test_a_continuation_count_is_the_number_of_different_words_before(kneser_ney):
    tokens = np.array([A, B, A, C, A, B], np.uint16)
    bigrams, occurrences = kneser_ney.adjusted_counts(tokens, 2, order=2)
    words, continuations = kneser_ney.adjusted_counts(tokens, 1, order=2)
    named = {(int(g) >> 16, int(g) & 0xFFFF): int(n) for g, n in zip(bigrams, occurrences, strict=True)}
    assert named == {(A, B): 2, (A, C): 1, (B, A): 1, (C, A): 1}
    assert dict(zip(words.tolist(), continuations.tolist(), strict=True)) == {A: 2, B: 1, C: 1}


def test_probabilities_done_by_hand(kneser_ney):
    model = kneser_ney.fit(np.array([A, B, A, C, A, B], np.uint16), 4, order=2)
    # So few words get the fallback discounts. p(B) = (1 - 0.5)/4 + (1 + 0.5 + 0.5)/4 * 1/4 = 1/4, p(D) = 1/8,
    # p(B | A) = (2 - 1)/3 + (1 + 0.5)/3 * p(B), p(D | A) = (1 + 0.5)/3 * p(D), and D is no history: p(B | D) = p(B).
    asked = np.array([[A, B], [A, D], [D, B]])
    assert kneser_ney.probabilities(model, asked) == pytest.approx([1 / 3 + 1 / 8, 1 / 16, 1 / 4], abs=1e-15)


def test_discounts_done_by_hand(kneser_ney):
    counts = np.repeat([1, 2, 3, 4, 9], [20, 10, 6, 3, 50])  # Y = 20 / (20 + 2 * 10) = 1/2
    expected = [0, 1 - 2 / 2 * 10 / 20, 2 - 3 / 2 * 6 / 10, 3 - 4 / 2 * 3 / 6]
    assert kneser_ney.discounts(counts) == pytest.approx(expected, abs=1e-15)


def test_every_context_sums_to_one(kneser_ney, text):
    model = kneser_ney.fit(text, 256)
    seen = np.lib.stride_tricks.sliding_window_view(text, 3)[:: len(text) // 20]
    half_seen = np.where(np.arange(3) == 0, 255, seen)  # word 255 does not occur
    unseen = np.full((1, 3), 255)
    histories = np.concatenate([seen, half_seen, unseen])
    windows = np.empty((len(histories), 256, 4), np.int64)
    windows[:, :, :3], windows[:, :, 3] = histories[:, None], np.arange(256)
    p = kneser_ney.probabilities(model, windows)
    assert p.min() > 0
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-9


def test_sorted_tables_equal_the_definition(kneser_ney, text):
    model = kneser_ney.fit(text, 256)
    p = slow_kneser_ney(text.tolist(), 256, 4, kneser_ney.discounts)
    windows = np.random.default_rng(1).permutation(np.lib.stride_tricks.sliding_window_view(text, 4))[:100]
    windows[50:, 3] = windows[:50, 3]  # histories that were seen, words that need not follow them
    windows[90:, 1] = 255
    expected = [p(tuple(window[:-1]), window[-1]) for window in windows.tolist()]
    assert kneser_ney.probabilities(model, windows) == pytest.approx(expected, rel=1e-12)


def test_the_test_text_has_estimated_discounts_at_every_order(kneser_ney, text):
    counts = [kneser_ney.adjusted_counts(text, n, order=4)[1] for n in range(1, 5)]
    assert [0, 0.5, 1, 1.5] not in [kneser_ney.discounts(of_order).tolist() for of_order in counts]


def slow_kneser_ney(tokens, vocab_size, order, discounts):
    """The equations of benchmarks/_kneser_ney.py, one n-gram at a time: the definition of the fast tables."""
    occurs = {n: Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, order + 1)}
    adjusted = {n: Counter(gram[1:] for gram in occurs[n + 1]) for n in range(1, order)} | {order: occurs[order]}
    discount = {n: discounts(np.array(list(counts.values()))) for n, counts in adjusted.items()}
    following = defaultdict(list)
    for counts in adjusted.values():
        for gram, count in counts.items():
            following[gram[:-1]].append(count)

    def p(history, word):
        n = len(history) + 1
        lower = p(history[1:], word) if history else 1 / vocab_size
        total = sum(following[history])
        if total == 0:
            return lower
        count = adjusted[n][(*history, word)]
        freed = sum(discount[n][min(c, 3)] for c in following[history])
        return (count - discount[n][min(count, 3)] + freed * lower) / total

    return p
