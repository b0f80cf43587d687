"""The parent's next-token distributions in short, so that comparing a child takes a thousand logits a token instead of
the vocabulary.

With differences of logits d and their mean m = sum p d, KL(parent || child) = log sum p e^(d - m), and since the terms
p (d - m) add up to zero,

    KL = log(1 + sum_v p_v (e^c_v - 1 - c_v)),  c = d - m.

The last sum has only terms of second order that are never negative, so a few of them speak for the rest: those of the
`TOP` likeliest tokens, as they are, and of `DRAWN` others, each weighted by how often it was to be expected. These are
drawn by systematic sampling over a cumulative sum (Madow & Madow 1944), with probabilities proportional to the root of
p + the mean p of the text, since what a damaged child falls back on, the frequent tokens, p alone would hardly draw.
The mean m needs no sample: d = W (child - parent), so m = (child - parent) . (W^T p), one vector a token. Without that,
and without taking the terms of first order away, the noise of the sample would be larger than the KL of 8-bit weights.
Equal states give exactly 0.

Three things are compared over the whole vocabulary: children that bring their own matrix of logits; those that are more
than `BROKEN` nats a token away, who expect what p almost excludes and no sample of it has; and capped logits (Gemma 2),
which are not linear in the states. docs/log.md has the errors that were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pennyweight.live.walk import Walk, float_logits
from pennyweight.model.shapes import Shape
from pennyweight.runs.scratch import Tensors

TOP, DRAWN = 256, 768
BROKEN = 0.25
TOGETHER = 32  # children in a product: always as many, so that a sum does not depend on who came along
_CONTEXTLESS = 256  # tokens whose mean distribution is that of the text
_LOGITS_AT_ONCE = 2**23
_ROWS_AT_ONCE = 2**14  # of the matrix, in float32
_HUGE = 40.0  # e^40 is far from what float32 holds, and its sum with 1 is itself


@dataclass(frozen=True)
class Short:
    """Of every scored token: `tokens` (n, TOP + DRAWN) int64, ids; `weights` of that shape, float32, what they
    stand for of the distribution; `mean` (n, hidden) float32, W^T p."""

    tokens: torch.Tensor
    weights: torch.Tensor
    mean: torch.Tensor

    def tensors(self) -> Tensors:
        return {"tokens": self.tokens.int(), "weights": self.weights, "mean": self.mean}

    @staticmethod
    def of(tensors: Tensors) -> Short:
        return Short(tensors["tokens"].long(), tensors["weights"], tensors["mean"])


def shortens(head: Shape, logits: Shape) -> bool:
    """Whether distributions of a model are shortened. `head`: the slot of the last products; `logits`: the one that
    holds their matrix."""
    (matrix,) = logits.weights()
    return getattr(head, "cap", None) is None and matrix.shape[0] > 2 * (TOP + DRAWN)


def shorten(walk: Walk, states: torch.Tensor, *, seed: int) -> Short:
    """The distributions that normed states (n, hidden) of a parent give. The draws are those of `seed`."""
    matrix, draws = walk.matrix(walk.logits_slot), torch.Generator().manual_seed(seed)
    at_once = max(16, min(_CONTEXTLESS, _LOGITS_AT_ONCE // len(matrix)))
    some = states[:: -(-len(states) // _CONTEXTLESS)]
    usual = torch.stack([_distribution(walk, part, matrix).mean(dim=0) for part in some.split(at_once)]).mean(dim=0)
    found = []
    for part in states.split(at_once):
        p = _distribution(walk, part, matrix)
        top, likeliest = p.topk(TOP, dim=-1)
        chance = (p + usual).sqrt_().scatter_(-1, likeliest, 0.0)
        up_to = chance.double().cumsum(dim=-1)
        begin = torch.rand(len(part), 1, generator=draws, dtype=torch.float64)
        places = (torch.arange(DRAWN) + begin) / DRAWN * up_to[:, -1:]
        drawn = torch.searchsorted(up_to, places, right=True).clamp_(max=len(matrix) - 1)
        expected = DRAWN * chance.gather(-1, drawn) / up_to[:, -1:]
        weights = torch.cat([top, (p.gather(-1, drawn) / expected).float()], dim=-1)
        found.append((torch.cat([likeliest, drawn], dim=-1), weights, _times(p, matrix)))
    return Short(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _distribution(walk: Walk, states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return walk.finished(float_logits(states, matrix)).softmax(dim=-1)


def _times(p: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """p (n, vocabulary) times the matrix, in float32, which is converted a part at a time."""
    with torch.autocast("cpu", enabled=False):
        parts = zip(p.split(_ROWS_AT_ONCE, dim=-1), matrix.split(_ROWS_AT_ONCE), strict=True)
        return torch.stack([share @ rows.float() for share, rows in parts]).sum(dim=0)


def divergences(
    short: Short, rows: torch.Tensor, targets: torch.Tensor, change: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and log p(target) - log q(target), (children, tokens), of children against their parent.

    short: of these tokens; rows (tokens, TOP + DRAWN, hidden) float32, the matrix' rows of its ids, and targets
    (tokens, hidden) those of the tokens that came; change (children, tokens, hidden) float32: a child's states less the
    parent's, divided as logits are.
    """
    kl, lm = [], []
    with torch.autocast("cpu", enabled=False):
        for part in change.split(TOGETHER):
            states = torch.zeros(len(short.tokens), TOGETHER, change.shape[-1])
            states[:, : len(part)] = part.transpose(0, 1)
            mean = (states @ short.mean[:, :, None]).squeeze(-1)
            target = (states @ targets[:, :, None]).squeeze(-1) - mean
            centred = torch.bmm(states, rows.transpose(1, 2)).sub_(mean[:, :, None])
            second = torch.expm1(centred).sub_(centred)
            one = torch.log1p(torch.bmm(second, short.weights[:, :, None]).squeeze(-1))
            huge = centred.amax(dim=-1) > _HUGE
            if bool(huge.any()):
                of = huge.nonzero()[:, 0]
                one[huge] = torch.logsumexp(short.weights[of].clamp_min(1e-38).log() + centred[huge], dim=-1)
            kl.append(one.T[: len(part)])
            lm.append((one - target).T[: len(part)])
    return torch.cat(kl), torch.cat(lm)
