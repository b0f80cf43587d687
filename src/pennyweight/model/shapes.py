"""What stands in the slots of a model, as data.

A *shape* says what stands in a slot: every weight it holds and how each is stored. Costs, parameter counts, file
sizes and the per-layer config all follow from shapes, so a spec only has to say how it changes a shape. Nothing here
knows torch; a 120 B model is planned in milliseconds from its config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16, Stored

QUANTILES = 257
"""Points of the tables that say how large a matrix's inputs are."""


@dataclass(frozen=True)
class Sparsity:
    """Shares of its input channels that a block's matrices leave out while a model writes, token by token: `entering`
    of the block's normed input, `inner` of what o_proj or down_proj reads. `weighted`: channels are compared by |x|
    times the norm of their column (WINA, arXiv:2505.19427) instead of |x| (TEAL, arXiv:2408.14690)."""

    entering: float = 0.0
    inner: float = 0.0
    weighted: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.entering < 1 and 0 <= self.inner < 1):
            raise ValueError(f"{self}: shares are at least 0 and below 1")


@dataclass(frozen=True)
class Weight:
    """One tensor of a slot, `stored` as its columns allow. `active` is the share of it that one token reads (below 1
    for experts); `kept` the share of its columns that a token being written reads (below 1 where it is sparse)."""

    name: str
    shape: tuple[int, ...]
    stored: Stored = BFLOAT16
    active: float = 1.0
    kept: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shape) > 1:
            object.__setattr__(self, "stored", self.stored.over(self.shape[-1]))

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if len(self.shape) < 2:
            return 2 * self.parameters
        *stack, rows, columns = self.shape
        return math.prod(stack) * self.stored.nbytes(rows, columns)


def _kept(sparsity: Sparsity | None) -> tuple[float, float]:
    return (1.0, 1.0) if sparsity is None else (1 - sparsity.entering, 1 - sparsity.inner)


def _magnitudes(sparsity: Sparsity | None, entering: int, inner: int) -> Iterator[Weight]:
    """What the runtime needs to find a threshold for any share: quantiles of the magnitudes of both inputs."""
    if sparsity is not None:
        yield from (Weight("magnitudes", (QUANTILES,)), Weight("inner_magnitudes", (QUANTILES,)))
        if sparsity.weighted:
            yield from (Weight("importance", (entering,)), Weight("inner_importance", (inner,)))


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal self-attention with its norm. Query head h reads KV head h // (num_heads / num_kv_heads).

    `window` W lets a query at position i see keys j with 0 <= i - j < W; None sees all. `sinks` adds one learned
    logit per query head. head_dim need not be hidden_size / num_heads.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    window: int | None = None
    stored: Stored = BFLOAT16
    sparsity: Sparsity | None = None

    def weights(self) -> Iterator[Weight]:
        hidden, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        entering, inner = _kept(self.sparsity)
        yield Weight("norm", (hidden,))
        yield Weight("q_proj", (q, hidden), self.stored, kept=entering)
        yield Weight("k_proj", (kv, hidden), self.stored, kept=entering)
        yield Weight("v_proj", (kv, hidden), self.stored, kept=entering)
        yield Weight("o_proj", (hidden, q), self.stored, kept=inner)
        yield from _magnitudes(self.sparsity, hidden, q)
        if self.qkv_bias:
            yield from (Weight("q_bias", (q,)), Weight("k_bias", (kv,)), Weight("v_bias", (kv,)))
        if self.o_bias:
            yield Weight("o_bias", (hidden,))
        if self.qk_norm:
            yield from (Weight("q_norm", (self.head_dim,)), Weight("k_norm", (self.head_dim,)))
        if self.sinks:
            yield Weight("sinks", (self.num_heads,))


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)) with its norm."""

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    stored: Stored = BFLOAT16
    sparsity: Sparsity | None = None

    def weights(self) -> Iterator[Weight]:
        hidden, inner = self.hidden_size, self.intermediate_size
        kept, kept_inner = _kept(self.sparsity)
        yield Weight("norm", (hidden,))
        yield Weight("gate_proj", (inner, hidden), self.stored, kept=kept)
        yield Weight("up_proj", (inner, hidden), self.stored, kept=kept)
        yield Weight("down_proj", (hidden, inner), self.stored, kept=kept_inner)
        yield from _magnitudes(self.sparsity, hidden, inner)
        if self.bias:
            yield from (Weight("gate_bias", (inner,)), Weight("up_bias", (inner,)), Weight("down_bias", (hidden,)))


@dataclass(frozen=True, kw_only=True)
class MoE:
    """`num_experts` gated MLPs of which a router picks `top_k` for each token. Planned from config, not yet built."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    bias: bool = False
    router_bias: bool = False
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        active = self.top_k / experts
        yield Weight("norm", (hidden,))
        yield Weight("router", (experts, hidden))
        if self.router_bias:
            yield Weight("router_bias", (experts,))
        yield Weight("gate_up_proj", (experts, 2 * inner, hidden), self.stored, active)
        yield Weight("down_proj", (experts, hidden, inner), self.stored, active)
        if self.bias:
            yield Weight("gate_up_bias", (experts * 2 * inner,), active=active)
            yield Weight("down_bias", (experts * hidden,), active=active)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A block replaced by one matrix on its normed input."""

    hidden_size: int
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        yield Weight("norm", (self.hidden_size,))
        yield Weight("linear", (self.hidden_size, self.hidden_size), self.stored)


@dataclass(frozen=True, kw_only=True)
class Noop:
    """A block taken out: the residual stream passes through."""

    hidden_size: int

    def weights(self) -> Iterator[Weight]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Token embedding. `tied`: the same matrix is the output head, whose slot then holds no weights."""

    vocab_size: int
    hidden_size: int
    tied: bool = False
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        yield Weight("embedding", (self.vocab_size, self.hidden_size), self.stored)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The norm before the output head."""

    hidden_size: int

    def weights(self) -> Iterator[Weight]:
        yield Weight("norm", (self.hidden_size,))


@dataclass(frozen=True, kw_only=True)
class Head:
    """Output projection to the vocabulary; if `tied` its matrix is the embedding's and is counted there."""

    vocab_size: int
    hidden_size: int
    tied: bool = False
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        if not self.tied:
            yield Weight("head", (self.vocab_size, self.hidden_size), self.stored)


Shape = Attention | GatedMLP | MoE | Dense | Noop | Embedding | Norm | Head
Shapes = Mapping[Slot, Shape]


def parameters(shapes: Shapes) -> int:
    """Number of weights of a whole model."""
    return sum(weight.parameters for shape in shapes.values() for weight in shape.weights())
