"""What stands in the slots of a model, as data.

A *shape* says every weight that a slot holds and how each is stored. Costs, parameter counts, file sizes and the
per-layer config all follow from shapes, so a spec only has to say how it changes a shape. Nothing here knows torch; a
120 B model is planned in milliseconds from its config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pennyweight.model.slots import Slot
from pennyweight.model.stored import BFLOAT16, Stored

QUANTILES = 257
"""Points of the tables that say how large a matrix's inputs are."""

Norms = Literal["before", "after", "both"]
"""Where a block is normed: its input, its output before that joins the residual stream, or both."""


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys: in pairs of channels, the first half with the second or each with its
    neighbour. `of`: the kind of layer whose tables are meant, where a model has several. How many channels turn is up
    to the tables; those behind stay."""

    of: str | None = None
    pairs: Literal["halves", "neighbours"] = "halves"


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
    for experts); `kept` the share of its columns that a token being written reads (below 1 where it is sparse).
    `exact`: it stays in 16 bits whatever the slot is stored in, as a router does."""

    name: str
    shape: tuple[int, ...]
    stored: Stored = BFLOAT16
    active: float = 1.0
    kept: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) > 1:
            object.__setattr__(self, "stored", self.stored.over(self.shape[-1]))

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Or several: what is stored in fewer bits, and multiplied by."""
        return len(self.shape) > 1

    @property
    def nbytes(self) -> int:
        """On disk."""
        return self._bytes(self.stored.nbytes)

    @property
    def resident_bytes(self) -> int:
        """In memory while the model runs, norms and biases in float32."""
        return self._bytes(self.stored.resident_bytes, 4)

    def _bytes(self, of_matrix: Callable[[int, int], int], of_value: int = 2) -> int:
        if not self.is_matrix:
            return of_value * self.parameters
        *stack, rows, columns = self.shape
        return math.prod(stack) * of_matrix(rows, columns)


class Shape:
    """What all shapes answer; a shape that has something to say of a question overrides it.

    `reads`: which activation each matrix multiplies, the block's normed `input` or what it has computed from that, its
    `inner` one. Statistics, thresholds and quantisers go by it.
    """

    hidden_size: int
    stored: Stored = BFLOAT16
    sparsity: Sparsity | None = None
    window: int | None = None
    norms: Norms | None = None
    reads: ClassVar[Mapping[str, str]] = {}

    def weights(self) -> Iterator[Weight]:
        """Every tensor of the slot."""
        return iter(())

    def readers(self, activation: str) -> tuple[str, ...]:
        """The matrices that multiply `input` or `inner`."""
        return tuple(matrix for matrix, read in self.reads.items() if read == activation)

    @property
    def inner_size(self) -> int:
        """Channels of the inner activation."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slot's tensors on disk."""
        return sum(weight.nbytes for weight in self.weights())

    @property
    def resident_bytes(self) -> int:
        """Bytes of them in memory while the model runs."""
        return sum(weight.resident_bytes for weight in self.weights())

    @property
    def cached_values(self) -> int:
        """Numbers that one token leaves behind for later ones: keys and values."""
        return 0

    def state_bytes(self, tokens: int, *, bytes_per_value: float = 2) -> float:
        """What a sequence of `tokens` tokens has to keep."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return self.cached_values * kept * bytes_per_value

    def read(self) -> Iterator[Weight]:
        """Weights that a token's computation reads whole."""
        return self.weights()

    @property
    def flops(self) -> float:
        """Of one token, in its matrices."""
        return sum(2 * weight.parameters * weight.active for weight in self.read() if weight.is_matrix)

    def mixing_flops(self, length: int) -> float:
        """Of one token that looks at `length` tokens, beyond the matrices."""
        return 0.0

    def prompt_mixing_flops(self, tokens: int) -> float:
        """The same of a whole prompt."""
        return 0.0

    @property
    def made_size(self) -> int:
        """Values that the matrices which read the block's input make of one token."""
        return 0

    @property
    def makes_logits(self) -> bool:
        """Whether the slot holds the matrix of the logits: the embedding if it is tied, else the head. It is what their
        time is charged to, since how it is stored is chosen there."""
        return False


def _norms(norms: Norms | None, hidden_size: int) -> Iterator[Weight]:
    if norms in ("before", "both"):
        yield Weight("norm", (hidden_size,))
    if norms in ("after", "both"):
        yield Weight("post_norm", (hidden_size,))


class _Block(Shape):
    """Attention or an MLP: matrices that read the block's input, and one that reads what they have made of it."""

    apart: tuple[tuple[str, Stored], ...] = ()

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        """A matrix of the block, as it is stored, `apart` from the others or as they are, and read."""
        share = 0.0
        if self.sparsity is not None:
            share = self.sparsity.entering if self.reads[name] == "input" else self.sparsity.inner
        return Weight(name, (rows, columns), dict(self.apart).get(name, self.stored), kept=1 - share)

    def tables(self) -> Iterator[Weight]:
        """What the runtime needs to find a threshold for any share: quantiles of the magnitudes of both inputs."""
        if self.sparsity is not None:
            yield from (Weight("magnitudes", (QUANTILES,)), Weight("inner_magnitudes", (QUANTILES,)))
            if self.sparsity.weighted:
                yield Weight("importance", (self.hidden_size,))
                yield Weight("inner_importance", (self.inner_size,))


@dataclass(frozen=True, kw_only=True)
class Attention(_Block):
    """Causal self-attention with its norms. Query head h reads KV head h // (num_heads / num_kv_heads).

    `window` W lets a query at position i see keys j with 0 <= i - j < W; None sees all. `sinks` adds one learned
    logit per query head. `qk_norm`: RMSNorm of queries and keys, each head by itself or all heads together. head_dim
    need not be hidden_size / num_heads. Scores are q k `scale`, None being head_dim^-1/2; with a `cap` they become cap
    tanh(score / cap). `rotary` None: positions turn nothing.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["each head", "all heads"] | None = None
    sinks: bool = False
    window: int | None = None
    rotary: Rotary | None = Rotary()
    scale: float | None = None
    cap: float | None = None
    norms: Norms | None = "before"
    stored: Stored = BFLOAT16
    apart: tuple[tuple[str, Stored], ...] = ()
    sparsity: Sparsity | None = None

    reads: ClassVar[Mapping[str, str]] = {"q_proj": "input", "k_proj": "input", "v_proj": "input", "o_proj": "inner"}

    def weights(self) -> Iterator[Weight]:
        hidden, q, kv = self.hidden_size, self.inner_size, self.num_kv_heads * self.head_dim
        yield from _norms(self.norms, hidden)
        yield from (self.matrix("q_proj", q, hidden), self.matrix("k_proj", kv, hidden))
        yield from (self.matrix("v_proj", kv, hidden), self.matrix("o_proj", hidden, q))
        yield from self.tables()
        if self.qkv_bias:
            yield from (Weight("q_bias", (q,)), Weight("k_bias", (kv,)), Weight("v_bias", (kv,)))
        if self.o_bias:
            yield Weight("o_bias", (hidden,))
        if self.qk_norm == "each head":
            yield from (Weight("q_norm", (self.head_dim,)), Weight("k_norm", (self.head_dim,)))
        if self.qk_norm == "all heads":
            yield from (Weight("q_norm", (q,)), Weight("k_norm", (kv,)))
        if self.sinks:
            yield Weight("sinks", (self.num_heads,))

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def made_size(self) -> int:
        return self.inner_size + self.cached_values

    @property
    def cached_values(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def mixing_flops(self, length: int) -> float:
        seen = length if self.window is None else min(length, self.window)
        return 4.0 * self.num_heads * self.head_dim * seen

    def prompt_mixing_flops(self, tokens: int) -> float:
        window = tokens if self.window is None else min(tokens, self.window)
        pairs = window * (window + 1) / 2 + (tokens - window) * window
        return 4.0 * self.num_heads * self.head_dim * pairs


@dataclass(frozen=True, kw_only=True)
class GatedMLP(_Block):
    """down(activation(gate(x)) * up(x)) with its norms. `activation` in transformers' words."""

    hidden_size: int
    intermediate_size: int
    bias: bool = False
    activation: str = "silu"
    norms: Norms | None = "before"
    stored: Stored = BFLOAT16
    apart: tuple[tuple[str, Stored], ...] = ()
    sparsity: Sparsity | None = None

    reads: ClassVar[Mapping[str, str]] = {"gate_proj": "input", "up_proj": "input", "down_proj": "inner"}

    def weights(self) -> Iterator[Weight]:
        hidden, inner = self.hidden_size, self.intermediate_size
        yield from _norms(self.norms, hidden)
        yield from (self.matrix("gate_proj", inner, hidden), self.matrix("up_proj", inner, hidden))
        yield self.matrix("down_proj", hidden, inner)
        yield from self.tables()
        if self.bias:
            yield from (Weight("gate_bias", (inner,)), Weight("up_bias", (inner,)), Weight("down_bias", (hidden,)))

    @property
    def inner_size(self) -> int:
        return self.intermediate_size

    @property
    def made_size(self) -> int:
        return 2 * self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class MoE(Shape):
    """`num_experts` gated MLPs of which a router picks `top_k` for each token. Planned from config, not yet built."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    bias: bool = False
    router_bias: bool = False
    norms: Norms | None = "before"
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        active = self.top_k / experts
        yield from _norms(self.norms, hidden)
        yield Weight("router", (experts, hidden), exact=True)
        if self.router_bias:
            yield Weight("router_bias", (experts,))
        yield Weight("gate_up_proj", (experts, 2 * inner, hidden), self.stored, active)
        yield Weight("down_proj", (experts, hidden, inner), self.stored, active)
        if self.bias:
            yield Weight("gate_up_bias", (experts * 2 * inner,), active=active)
            yield Weight("down_bias", (experts * hidden,), active=active)

    @property
    def inner_size(self) -> int:
        """A token is in `top_k` experts at once, never in all."""
        return self.top_k * self.intermediate_size

    @property
    def made_size(self) -> int:
        return 2 * self.inner_size


@dataclass(frozen=True, kw_only=True)
class Dense(Shape):
    """A block replaced by one matrix on its normed input."""

    hidden_size: int
    norms: Norms | None = "before"
    stored: Stored = BFLOAT16

    reads: ClassVar[Mapping[str, str]] = {"linear": "input"}

    def weights(self) -> Iterator[Weight]:
        yield from _norms(self.norms, self.hidden_size)
        yield Weight("linear", (self.hidden_size, self.hidden_size), self.stored)


@dataclass(frozen=True, kw_only=True)
class Noop(Shape):
    """A block taken out: the residual stream passes through."""

    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Embedding(Shape):
    """Token embedding, its rows times `scale`. `tied`: the same matrix is the output head, whose slot then holds no
    weights."""

    vocab_size: int
    hidden_size: int
    tied: bool = False
    scale: float = 1.0
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        yield Weight("embedding", (self.vocab_size, self.hidden_size), self.stored)

    def read(self) -> Iterator[Weight]:
        """Nothing, unless it is the head as well: of an embedding alone a token reads one row."""
        return self.weights() if self.tied else iter(())

    @property
    def makes_logits(self) -> bool:
        return self.tied


@dataclass(frozen=True, kw_only=True)
class Norm(Shape):
    """The norm before the output head."""

    hidden_size: int

    def weights(self) -> Iterator[Weight]:
        yield Weight("norm", (self.hidden_size,))

    def read(self) -> Iterator[Weight]:
        """Too little to be priced."""
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Head(Shape):
    """Output projection to the vocabulary; if `tied` its matrix is the embedding's and is counted there. Logits are its
    products over `divisor`; with a `cap` they become cap tanh(logit / cap)."""

    vocab_size: int
    hidden_size: int
    tied: bool = False
    divisor: float = 1.0
    cap: float | None = None
    stored: Stored = BFLOAT16

    def weights(self) -> Iterator[Weight]:
        if not self.tied:
            yield Weight("head", (self.vocab_size, self.hidden_size), self.stored)

    @property
    def makes_logits(self) -> bool:
        return not self.tied


Shapes = Mapping[Slot, Shape]


def parameters(shapes: Shapes) -> int:
    """Number of weights of a whole model."""
    return sum(weight.parameters for shape in shapes.values() for weight in shape.weights())
