"""Interpolated modified Kneser-Ney n-grams, the usual strong baseline without a neural network.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (Harvard TR-10-98, 1998),
section 3. For a history h, a word w and h' = h without its oldest word, each order says

    p(w | h) = (a(hw) - D(a(hw))) / A(h) + g(h) p(w | h')          p(w | h) = p(w | h') where A(h) = 0
    A(h)     = sum over w of a(hw)
    g(h)     = sum over w of D(a(hw)) / A(h)                        what the discounts freed, so that p sums to 1

and order 1 is interpolated with 1 / vocabulary in the place of p(w | h'). The adjusted count a(g) is how often g occurs
if g has the highest order; below, it is the continuation count N1+(.g), the number of different words seen before g.
There are three discounts per order, estimated from n_k, the number of its n-grams with a(g) = k:

    Y = n_1 / (n_1 + 2 n_2)      D(0) = 0      D(k) = k - (k + 1) Y n_(k+1) / n_k for k = 1, 2; D(3) also beyond 3

The text is one stream: n-grams go across document boundaries, and a separator is a word like any other.

An n-gram is one uint64 of 16 bits per word, the oldest in front, so that sorting puts the n-grams of a history side by
side, a shift gives the history and a mask gives the n-gram without its oldest word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_WORD_BITS = 16
_FALLBACK = (0.5, 1.0, 1.5)  # where a small text leaves an n_k at 0, as KenLM's --discount_fallback


@dataclass(frozen=True)
class Order:
    """One order. grams (m,) and histories (k,) uint64, ascending; share (m,) and freed (k,) float64.

    share is (a(hw) - D(a(hw))) / A(h) and freed is g(h).
    """

    grams: np.ndarray
    share: np.ndarray
    histories: np.ndarray
    freed: np.ndarray


@dataclass(frozen=True)
class KneserNey:
    """orders[n - 1] holds the n-grams."""

    vocab_size: int
    orders: tuple[Order, ...]


def fit(tokens: np.ndarray, vocab_size: int, *, order: int = 4) -> KneserNey:
    """Count `tokens` (t,), integers below `vocab_size`. Ten million tokens of order 4 take about 1 GB.

    Raises ValueError if an n-gram would not fit into 64 bits or the text is shorter than two n-grams.
    """
    if not (1 <= order <= 4 and vocab_size <= 1 << _WORD_BITS):
        raise ValueError(f"order {order} and vocabulary {vocab_size}: at most order 4 and 65,536 words can be counted")
    if len(tokens) <= order:
        raise ValueError(f"{len(tokens)} tokens are too few for order {order}; give at least {order + 1}")
    counts = (adjusted_counts(tokens, n, order=order) for n in range(1, order + 1))
    return KneserNey(vocab_size, tuple(_interpolated(grams, count) for grams, count in counts))


def probabilities(model: KneserNey, windows: np.ndarray) -> np.ndarray:
    """p(last word | words before it) for windows (..., order) of words; returns (...) float64."""
    p = np.full(windows.shape[:-1], 1 / model.vocab_size)
    for n, order in enumerate(model.orders, 1):
        grams = _packed(windows[..., -n:])
        freed = _look_up(order.histories, order.freed, grams >> _WORD_BITS, absent=1.0)
        p = _look_up(order.grams, order.share, grams, absent=0.0) + freed * p
    return p


def adjusted_counts(tokens: np.ndarray, n: int, *, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams with a(g) > 0, packed and ascending, and a(g): (m,) uint64, (m,) int64."""
    if n == order:
        return np.unique(_grams(tokens, n), return_counts=True)
    # Counts nobody needs: asked for nothing but the values, numpy hashes instead of sorting, ten times slower here.
    longer, _ = np.unique(_grams(tokens, n + 1), return_counts=True)
    return np.unique(longer & ((1 << _WORD_BITS * n) - 1), return_counts=True)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D(1), D(2), D(3) from the adjusted counts of one order; (4,) float64.

    A text that gives no usable estimate (some n_k = 0, or a D(k) outside 0...k) gets 0.5, 1 and 1.5.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        k = np.arange(1, 4)
        estimate = k - (k + 1) * y * n[2:5] / n[1:4]
        if (estimate >= 0).all() and (estimate <= k).all():
            return np.array([0.0, *estimate])
    return np.array([0.0, *_FALLBACK])


def _interpolated(grams: np.ndarray, counts: np.ndarray) -> Order:
    discount = discounts(counts)[np.minimum(counts, 3)]
    histories, first = np.unique(grams >> _WORD_BITS, return_index=True)
    total = np.add.reduceat(counts, first)
    total_of_gram = np.repeat(total, np.diff(first, append=len(grams)))
    return Order(grams, (counts - discount) / total_of_gram, histories, np.add.reduceat(discount, first) / total)


def _grams(tokens: np.ndarray, n: int) -> np.ndarray:
    return _packed(np.lib.stride_tricks.sliding_window_view(tokens, n))


def _packed(windows: np.ndarray) -> np.ndarray:
    packed = np.zeros(windows.shape[:-1], np.uint64)
    for position in range(windows.shape[-1]):
        packed = packed << _WORD_BITS | windows[..., position].astype(np.uint64)
    return packed


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, *, absent: float) -> np.ndarray:
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], absent)
