"""Blocks of the native engine beyond what the families so far need, against the same model written down in numpy."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

_native = pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
from pennyweight.runtime.engine import Engine, Row, shared_threads  # noqa: E402  (needs the native module)

HIDDEN, VOCABULARY, HEADS, KV_HEADS, DIM, WIDTH, EPSILON, CONTEXT = 48, 61, 6, 2, 10, 75, 1e-3, 700
EXACT = 1e-5  # relative: float32 sums in another order
IDS = [int(i) for i in np.arange(40) * 7919 % VOCABULARY]


class Twin(NamedTuple):
    """A native block, and what it computes: (tokens, hidden) -> (tokens, hidden) in float64."""

    native: Any
    plain: Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)


def linear(*parts: np.ndarray) -> Any:
    made = _native.Linear()
    for part in parts:
        made.add(_native.Matrix.wide(part.view(np.uint8), _native.Float.float32))
    return made


def normed(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    return x if weight is None else x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def norms(rng: np.random.Generator, where: str) -> dict[str, np.ndarray]:
    names = {"before": ["norm"], "after": ["norm_after"], "both": ["norm", "norm_after"], "none": []}[where]
    return {name: rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32) for name in names}


def within(own: dict[str, np.ndarray], body: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: normed(body(normed(x, own.get("norm"))), own.get("norm_after"))


def dense(rng: np.random.Generator, where: str = "before") -> Twin:
    own, w = norms(rng, where), matrix(rng, HIDDEN, HIDDEN)
    return Twin(_native.Dense(linear(w), **own, epsilon=EPSILON), within(own, lambda x: x @ w.T))


ACTIVATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu_tanh": lambda g, u: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u,
    "relu2": lambda g, u: np.maximum(g, 0) ** 2 * u,
    "clamped": lambda g, u: np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))) * (np.clip(u, -7, 7) + 1),
}


def gated(rng: np.random.Generator, where: str = "before", activation: str = "silu") -> Twin:
    own, gate, up = norms(rng, where), 4 * matrix(rng, WIDTH, HIDDEN), 4 * matrix(rng, WIDTH, HIDDEN)
    down = matrix(rng, HIDDEN, WIDTH)
    block = _native.Gated(
        linear(gate, up), linear(down), activation=_native.Activation[activation], **own, epsilon=EPSILON
    )
    return Twin(block, within(own, lambda x: ACTIVATIONS[activation](x @ gate.T, x @ up.T) @ down.T))


def tables(base: float, half: int = DIM // 2) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(CONTEXT)[:, None] * base ** -(np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotated(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """(tokens, heads, dim); what lies behind the two halves stays."""
    half, cosine, sine = cosine.shape[1], cosine[: len(x), None], sine[: len(x), None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cosine - b * sine, a * sine + b * cosine, rest], axis=-1)


def attention(
    rng: np.random.Generator,
    where: str = "before",
    *,
    value_dim: int = DIM,
    rotary: tuple[np.ndarray, np.ndarray] | None = None,
    qk_norm: tuple[int, int] | None = None,
    window: int = 0,
    scale: float = 0.4,
    kv_heads: int = KV_HEADS,
) -> Twin:
    """`qk_norm`: heads that the norm of queries and that of keys are as long as."""
    own = norms(rng, where)
    q, k = 3 * matrix(rng, HEADS * DIM, HIDDEN), 3 * matrix(rng, kv_heads * DIM, HIDDEN)
    v, o = matrix(rng, kv_heads * value_dim, HIDDEN), matrix(rng, HIDDEN, HEADS * value_dim)
    of_q, of_k = (rng.uniform(0.5, 1.5, n * DIM).astype(np.float32) for n in qk_norm) if qk_norm else (None, None)
    block = _native.Attention(
        linear(q, k, v),
        linear(o),
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=DIM,
        value_dim=value_dim,
        window=window,
        scale=scale,
        cache=_native.Cache.float32,
        rotary=_native.Rotary(*rotary) if rotary else None,
        q_norm=of_q,
        k_norm=of_k,
        **own,
        epsilon=EPSILON,
    )

    def heads_of(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """Normed in stretches as long as the norm, turned, (tokens, heads, dim)."""
        stretches = x.reshape(len(x), -1, DIM if weight is None else len(weight))
        split = normed(stretches, weight).reshape(len(x), -1, DIM)
        return rotated(split, *rotary) if rotary else split

    def plain(x: np.ndarray) -> np.ndarray:
        queries, keys = heads_of(x @ q.T, of_q), heads_of(x @ k.T, of_k).repeat(HEADS // kv_heads, axis=1)
        values = (x @ v.T).reshape(len(x), kv_heads, value_dim).repeat(HEADS // kv_heads, axis=1)
        scores = np.einsum("phd,qhd->hpq", queries, keys) * scale
        ago = np.arange(len(x))[:, None] - np.arange(len(x))
        scores[:, (ago < 0) | (ago >= (window or len(x)))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hpq,qhd->phd", weights, values).reshape(len(x), -1) @ o.T

    return Twin(block, within(own, plain))


class Pair:
    """The same model twice: native, and in numpy."""

    def __init__(self, rng: np.random.Generator, *blocks: Twin, scale: float = 1.0, context: int = CONTEXT) -> None:
        self._table, self._head = matrix(rng, VOCABULARY, HIDDEN), matrix(rng, VOCABULARY, HIDDEN)
        self._blocks, self._scale = blocks, scale
        table = _native.Matrix.wide(self._table.view(np.uint8), _native.Float.float32)
        self.native = _native.Model(_native.Embedding(table, scale), linear(self._head), context)
        for block in blocks:
            self.native.add(block.native)

    def plain(self, ids: list[int]) -> np.ndarray:
        hidden = self._table[ids].astype(np.float64) * self._scale
        for block in self._blocks:
            hidden = hidden + block.plain(hidden)
        return hidden @ self._head.T

    def engine(self, threads: int) -> Any:
        return _native.Engine(self.native, _native.Threads(threads))


def step(engine: Any, sequence: int, ids: list[int], position: int = 0) -> np.ndarray:
    rows = np.array([Row(sequence, position + i, token) for i, token in enumerate(ids)], np.int32)
    logits = np.full((len(ids), VOCABULARY), np.nan, np.float32)
    engine.step(rows, logits)
    return logits


def check(pair: Pair, ids: list[int] = IDS) -> None:
    """Native equals plain, and tokens one by one are to the bit what they are together, however many threads."""
    expected, one = pair.plain(ids), None
    for threads in (1, 2, 3):
        engine = pair.engine(threads)
        together, alone = step(engine, engine.open(len(ids)), ids), engine.open(len(ids))
        one = together if one is None else one
        assert np.linalg.norm(together - expected) < EXACT * np.linalg.norm(expected)
        np.testing.assert_array_equal(together, one)
        single = np.concatenate([step(engine, alone, [token], i) for i, token in enumerate(ids)])
        np.testing.assert_array_equal(single, together)


@pytest.mark.parametrize("where", ["before", "after", "both", "none"])
@pytest.mark.parametrize("make", [attention, gated, dense])
def test_norms_before_and_behind(rng, make, where):
    check(Pair(rng, make(rng, where), make(rng, where)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(rng, activation):
    check(Pair(rng, gated(rng, activation=activation), gated(rng, activation=activation)))


@pytest.mark.parametrize("qk_norm", [(1, 1), (HEADS, KV_HEADS), (1, KV_HEADS), (HEADS, 1)])
def test_norms_of_queries_and_keys_by_head_and_over_all(rng, qk_norm):
    check(Pair(rng, attention(rng, qk_norm=qk_norm, rotary=tables(100.0)), gated(rng)))


@pytest.mark.parametrize("value_dim", [3, 16, 33])
@pytest.mark.parametrize("window", [0, 7])
def test_values_of_another_width_than_keys(rng, value_dim, window):
    check(Pair(rng, attention(rng, value_dim=value_dim, window=window, rotary=tables(100.0)), gated(rng)))


def test_threads_that_share_a_head_with_narrow_values(rng):
    """Two segments, and fewer heads than threads would need for one each."""
    pair = Pair(rng, attention(rng, value_dim=3, kv_heads=1))
    ids = (IDS * 15)[:513]
    expected = pair.plain(ids)[-1]
    for threads in (1, 2):
        engine = pair.engine(threads)
        sequence = engine.open(len(ids))
        step(engine, sequence, ids[:-1])
        last = step(engine, sequence, ids[-1:], len(ids) - 1)[0]
        assert np.linalg.norm(last - expected) < EXACT * np.linalg.norm(expected)


def test_blocks_have_rotary_tables_of_their_own_or_none(rng):
    fast, slow, few = tables(10.0), tables(10000.0), tables(100.0, half=2)
    check(Pair(rng, *(attention(rng, rotary=rotary) for rotary in (fast, None, slow, few))))


def test_a_scaled_embedding(rng):
    check(Pair(rng, gated(rng, "after"), scale=math.sqrt(HIDDEN)))


def test_copies_and_going_back_with_narrow_values_and_a_window(rng):
    pair = Pair(rng, attention(rng, value_dim=3, window=7), attention(rng, value_dim=17))
    engine, other = pair.engine(2), [5] * 9
    source, target = engine.open(60), engine.open(50)
    step(engine, source, IDS)
    engine.copy(source, target, 21)
    expected = pair.plain(IDS[:21] + other)[21:]
    for sequence in (target, source):
        found = step(engine, sequence, other, 21)
        assert np.linalg.norm(found - expected) < EXACT * np.linalg.norm(expected)


def test_two_models_share_threads_from_two_python_threads(rng):
    pairs = [Pair(rng, attention(rng), gated(rng), dense(rng)) for _ in range(2)]
    threads, texts = _native.Threads(2), (IDS, IDS[::-1])
    expected = [step(engine := pair.engine(2), engine.open(40), ids) for pair, ids in zip(pairs, texts, strict=True)]
    engines = [_native.Engine(pair.native, threads) for pair in pairs]
    wrong: list[str] = []

    def work(which: int) -> None:
        engine, ids = engines[which], texts[which]
        sequence = engine.open(40)
        for _ in range(20):
            for i, token in enumerate(ids):
                if not np.array_equal(step(engine, sequence, [token], i)[0], expected[which][i]):
                    wrong.append(f"engine {which}, token {i}")

    workers = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_engines_of_a_process_share_threads_for_as_long_as_they_live(pico):
    one, two = Engine(pico("llama"), threads=2), Engine(pico("qwen3"), threads=2)
    pool = shared_threads(2)
    assert shared_threads(2) is pool and shared_threads(1) is not pool
    kept = weakref.ref(pool)
    del pool, one
    gc.collect()
    assert kept() is shared_threads(2)
    del two
    gc.collect()
    assert kept() is None


def test_parts_that_do_not_fit_are_refused(rng):
    """Before anything runs: a kernel would read past the end."""
    square, wide = linear(matrix(rng, HIDDEN, HIDDEN)), linear(matrix(rng, 2 * WIDTH, HIDDEN))
    down, vector = linear(matrix(rng, HIDDEN, WIDTH)), np.ones(HIDDEN - 1, np.float32)
    heads = {"heads": 3, "kv_heads": 3, "head_dim": 16}
    triple, rotary = linear(matrix(rng, 3 * HIDDEN, HIDDEN)), _native.Rotary(*tables(10.0, half=9))
    stacked = linear(matrix(rng, 40, HIDDEN), matrix(rng, 8, HIDDEN))
    pair = Pair(rng, context=CONTEXT)
    turned = Pair(rng)
    short = _native.Rotary(*(table[:100] for table in tables(10.0)))
    turned.native.add(_native.Attention(triple, square, **heads, rotary=short))
    engine = turned.engine(1)
    for said, make in (
        ("the norm has 47 values, expected 48", lambda: _native.Dense(square, norm=vector)),
        ("the norm behind has 47 values", lambda: _native.Gated(wide, down, norm_after=vector)),
        ("the matrix is 48 x 75, expected 48 x 48", lambda: _native.Dense(down)),
        ("from one matrix, not 2", lambda: _native.Dense(stacked)),
        ("from one matrix, not 0", lambda: _native.Gated(wide, _native.Linear())),
        ("gate and up is missing", lambda: _native.Gated(_native.Linear(), down)),
        ("gate and up is 48 x 48, expected 150 x 48", lambda: _native.Gated(square, down)),
        ("q, k and v is 48 x 48, expected 144 x 48", lambda: _native.Attention(square, square, **heads)),
        ("expected 192 x 48", lambda: _native.Attention(triple, square, **heads, value_dim=32)),
        ("o is 48 x 75, expected 48 x 48", lambda: _native.Attention(triple, down, **heads)),
        ("3 heads on 2", lambda: _native.Attention(triple, square, heads=3, kv_heads=2, head_dim=16)),
        ("tables of 700 x 9 for heads of 16", lambda: _native.Attention(triple, square, **heads, rotary=rotary)),
        ("queries has 47 values, expected 48", lambda: _native.Attention(triple, square, **heads, q_norm=vector)),
        ("keys has 47 values, expected 48", lambda: _native.Attention(triple, square, **heads, k_norm=vector)),
        ("sinks has 47 values, expected 3", lambda: _native.Attention(triple, square, **heads, sinks=vector)),
        ("a window of -1", lambda: _native.Attention(triple, square, **heads, window=-1)),
        ("heads of 16 and values of 0", lambda: _native.Attention(triple, square, **heads, value_dim=0)),
        (
            "block of width 40 in a model of width 48",
            lambda: pair.native.add(_native.Dense(linear(matrix(rng, 40, 40)))),
        ),
        ("100 positions for a sequence of 101 tokens", lambda: engine.open(101)),
    ):
        with pytest.raises(ValueError, match=said):
            make()
