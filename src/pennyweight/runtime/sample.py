"""Pick the next token from logits: greedy, or drawn after repetition penalty, temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from pennyweight.disk.tokenizer import GenerationConfig

_NEGLIGIBLE = 30.0
"""Tokens this many nats below the best share less than 1e-8 of the mass in any vocabulary; they are not looked at."""


@dataclass(frozen=True)
class Sampling:
    """How to pick. The order is that of transformers: penalty, temperature, top-k, top-p, min-p.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in. min_p is a share of the best token's
    probability. repetition_penalty divides positive and multiplies negative logits of tokens that occurred.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_k", 0, float("inf")),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it has to lie between {low} and {high}")


GREEDY = Sampling()


def sampling_of(defaults: GenerationConfig, *, draws: bool, seed: int = 0, **given: Any) -> Sampling:
    """What is given, and where that is None what the model's makers say. `draws`: whether an answer is drawn, and not
    the likeliest, where they do not say that either. Raises ValueError for values outside their range."""
    draws = draws if defaults.do_sample is None else defaults.do_sample
    said: dict[str, Any] = {name: getattr(defaults, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    said["temperature"] = (1.0 if defaults.temperature is None else defaults.temperature) if draws else 0.0
    known = {name: value for name, value in (*said.items(), *given.items()) if value is not None}
    return Sampling(**known, seed=seed)


def pick(
    logits: np.ndarray,
    sampling: Sampling,
    seen: Collection[int],
    rng: np.random.Generator,
    never: Collection[int] = (),
) -> int:
    """The next token, none of `never`. `logits` (vocab_size) float32 is not changed; `seen` are the tokens so far.

    Raises FloatingPointError if a logit is NaN: the model or the text has broken the arithmetic.
    """
    if never:
        logits = logits.copy()
        logits[[token for token in never if 0 <= token < len(logits)]] = -np.inf
    if sampling.repetition_penalty != 1.0 and seen:
        logits = logits.copy()
        ids = np.fromiter(set(seen), np.int64)
        chosen = logits[ids]
        logits[ids] = np.where(chosen > 0, chosen / sampling.repetition_penalty, chosen * sampling.repetition_penalty)
    best = int(logits.argmax())  # argmax finds a NaN if there is one
    if not np.isfinite(logits[best]):
        raise FloatingPointError(f"the logit of token {best} is {logits[best]}; the model computed no number")
    if sampling.temperature == 0:
        return best
    tokens, probabilities = candidates(logits, sampling)
    return int(tokens[min(np.searchsorted(probabilities.cumsum(), rng.random()), len(tokens) - 1)])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn and their probabilities (float64, sum 1). temperature above 0.

    Sorting a vocabulary of 128,000 takes longer than some models take for a token, so it is only done where top_p asks
    for an order, and then of the likeliest few thousand as long as these hold enough.
    """
    tokens = np.flatnonzero(logits >= logits.max() - _NEGLIGIBLE * sampling.temperature)
    if sampling.top_k and len(tokens) > sampling.top_k:
        tokens = _largest(tokens, logits, sampling.top_k)
    likely = logits[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # next to a tiny temperature any difference is infinite, and its weight 0
        weights = np.exp((likely - likely.max()) / sampling.temperature)
    total = weights.sum()
    keep = weights >= sampling.min_p  # the likeliest token's weight is 1
    tokens, weights = tokens[keep], weights[keep]
    if sampling.top_p < 1:
        few = np.arange(len(tokens))
        if len(tokens) > _FEW:
            few = _largest(few, weights, _FEW)
            if weights[few].sum() < sampling.top_p * total:
                few = np.arange(len(tokens))
        order = few[np.argsort(-weights[few], kind="stable")]
        # The token that carries the sum over top_p still belongs; the first always does.
        keep = weights[order].cumsum() - weights[order] < sampling.top_p * total
        keep[0] = True
        order = order[keep]
        tokens, weights = tokens[order], weights[order]
    return tokens, weights / weights.sum()


_FEW = 4096


def _largest(items: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The `count` items of largest values[item]; of equal ones those that come first."""
    own = values[items]
    bound = np.partition(own, len(own) - count)[len(own) - count]
    above = own > bound
    equal = np.flatnonzero(own == bound)[: count - int(above.sum())]
    above[equal] = True
    return items[above]
