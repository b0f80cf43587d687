"""Lower a model to what the native engine runs: a flat list of blocks, every matrix in the layout of its kernel.

Matrices come from the source in the bytes they have (runtime/sources/, native/matrices.h). The rotary tables are
transformers' own, so every scaling of it (Llama 3, YaRN, linear) is the one the model was trained with. They are made
as far as texts go: a model may name millions of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pennyweight.live.magnitudes import threshold
from pennyweight.live.walk import RotaryEmbedding
from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head
from pennyweight.model.slots import Slot
from pennyweight.runtime.sources.source import Source

CACHES = ("float16", "int8", "float32")
_OLDER_NAMES = {"fp8": "int8"}
_MOST_POSITIONS = 2**30  # native/model.h
_TABLE_ROWS = 1024
_LARGE_BIAS = 16.0
"""Root mean square, over the channels of a head, of biases of keys that leave the rest too little of 8 bits: codes are
half of 1 apart then. Qwen2.5-Coder-1.5B has 80 in its first layer and at most 14 in all others; with that layer in
float16 its KL to a float16 cache falls from 0.003 to what float16 has to float32."""
_MOST_QUERIES = 128  # that share a key-value head: native/blocks/attention.h
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}


class NotRun(ValueError):
    """A sound model that asks for something the engine does not do."""


class Lowered(NamedTuple):
    """The native model, its rotary tables, and what users should know."""

    model: Any
    rotary: tuple[RotaryTables, ...]
    notes: tuple[str, ...]


class RotaryTables:
    """transformers' cosines and sines (positions, head_dim / 2), scaled as attention wants them, in native memory that
    blocks share; `of` one kind of layer, where a model has several tables. Raises NotRun for a scaling that depends on
    the length of the text."""

    def __init__(self, source: Source, of: str | None = None) -> None:
        from pennyweight import _native

        self._embedding = RotaryEmbedding(source.config, of)  # which knows the older names of the keys too
        if self._embedding.rope_type in ("dynamic", "longrope"):
            kind = self._embedding.rope_type
            raise NotRun(f"rope_type {kind!r} changes with the length of the text; the engine does not run it")
        if source.rotary_divisors is not None:
            self._embedding.divide(torch.from_numpy(source.rotary_divisors))
        self.native = _native.Rotary(*self._rows(0))

    def cover(self, positions: int) -> None:
        """Make them at least so long."""
        while self.native.positions < positions:
            self.native.extend(*self._rows(self.native.positions))

    def _rows(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        cosine, sine = self._embedding(torch.zeros(1), torch.arange(first, first + _TABLE_ROWS).unsqueeze(0))
        half = cosine.shape[-1] // 2
        return tuple(np.ascontiguousarray(table[0, :, :half].float().numpy()) for table in (cosine, sine))  # type: ignore[return-value]


def lower(
    source: Source, *, context: int | None = None, cache: str = "float16", sparsity: float | None = None
) -> Lowered:
    """The native model of a source, for sequences of up to `context` tokens (default: what the config allows), keys and
    values kept in `cache`: float16, int8 (which was once called fp8) or float32. Blocks with large biases on their keys
    keep float16 instead of int8. `sparsity`: the share of their input channels that blocks which can leave some out do
    leave out, instead of what the config says of each.

    Raises NotRun for a rotary scaling, a gate or a shape the engine does not run, ValueError for damaged weights and
    for a `sparsity` that no block of the model can follow.
    """
    from pennyweight import _native

    cache = _OLDER_NAMES.get(cache, cache)
    if cache not in CACHES:
        raise ValueError(f"keys and values cannot be kept in {cache!r}; float16, int8 or float32")
    if sparsity is not None:
        _check_sparsity(source, sparsity)
    config = source.config
    context = min(context or _MOST_POSITIONS, config.get("max_position_embeddings", _MOST_POSITIONS), _MOST_POSITIONS)
    turning = [getattr(block.shape, "rotary", None) for block in source.blocks.values()]
    rotary = {of: RotaryTables(source, of) for of in dict.fromkeys(one.of for one in turning if one is not None)}
    top = {slot: _only(block) for slot, block in source.blocks.items() if slot.layer is None}
    embedding, norm = source.matrix(top[Slot("embed")]), source.vector(top[Slot("norm")])
    first, last = source.blocks[Slot("embed")].shape, source.blocks[Slot("head")].shape
    assert isinstance(first, Embedding) and isinstance(last, Head)
    head = _native.Linear()
    head.add(embedding if first.makes_logits else source.matrix(top[Slot("head")]))
    epsilon = config["rms_norm_eps"]
    model = _native.Model(
        _native.Embedding(embedding, first.scale),
        head,
        context,
        norm=norm + np.float32(source.blocks[Slot("norm")].norm_offset),
        epsilon=epsilon,
        divisor=last.divisor,
        cap=last.cap or 0.0,
    )
    wide = 0
    for slot, block in source.blocks.items():
        if slot.layer is None or not list(block.shape.weights()):
            continue
        own_rotary = getattr(block.shape, "rotary", None)
        tables = None if own_rotary is None else rotary[own_rotary.of].native
        attention = {"cache": _native.Cache[cache], "rotary": tables}
        kind, matrices, own = _Lowered(source, block, context, sparsity).made(attention)
        wide += own.get("cache", _native.Cache[cache]) != _native.Cache[cache]
        try:
            model.add(kind(*matrices, **own, epsilon=epsilon))
        except ValueError as err:
            raise ValueError(f"{slot}: {err}") from err
    said = f"keys and values of {wide} of the layers stay in float16: their keys have biases that 8 bits do not hold"
    return Lowered(model, tuple(rotary.values()), (said,) if wide else ())


def _only(block: Block) -> str:
    """The name of a slot's single tensor, "" if it has none."""
    return next(iter(block.tensors()), "")


def _check_sparsity(source: Source, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"a sparsity of {share}; it is the share left out, at least 0 and below 1")
    if all(block.shape.sparsity is None for block in source.blocks.values()):
        raise ValueError(
            f"no block of {source.name} can leave input channels out: that takes matrices stored column by column and "
            "tables of their inputs' magnitudes. Make such a model with penny fit --axes sparsity"
        )


@dataclass(frozen=True)
class _Lowered:
    """A block on its way to the engine."""

    source: Source
    block: Block
    context: int
    sparsity: float | None

    def made(self, attention: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The native class, its matrices and its settings; `attention`: its cache and rotary tables. Raises NotRun."""
        from pennyweight import _native

        shape = self.block.shape
        own: dict[str, Any] = {"norm": self._vector("norm"), "norm_after": self._vector("post_norm")}
        own["residual"] = self.block.residual
        matrices = tuple(self._stack(activation) for activation in ("input", "inner") if shape.readers(activation))
        if isinstance(shape, Dense):
            return _native.Dense, matrices, own
        if isinstance(shape, Attention):
            if shape.num_heads > _MOST_QUERIES * shape.num_kv_heads:
                raise NotRun(
                    f"{self.block.slot}: {shape.num_heads} heads on {shape.num_kv_heads} key-value heads; in the "
                    f"engine up to {_MOST_QUERIES} share one"
                )
            own |= {name: self._vector(name) for name in ("q_norm", "k_norm", "sinks")}
            own |= {"heads": shape.num_heads, "kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
            window = shape.window if shape.window and shape.window < self.context else 0  # else it sees all
            own |= {"window": window, "scale": shape.scale, "cap": shape.cap or 0.0, **attention}
            own["neighbours"] = shape.rotary is not None and shape.rotary.pairs == "neighbours"
            if own["cache"] == _native.Cache.int8 and self._has_large_biases(shape.num_kv_heads):
                own["cache"] = _native.Cache.float16
            return _native.Attention, matrices, own
        if isinstance(shape, GatedMLP):
            if shape.activation not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise NotRun(f"hidden_act {shape.activation!r}: the gates of the engine's FFN are {known}")
            return _native.Gated, matrices, {**own, "activation": _native.Activation[_ACTIVATIONS[shape.activation]]}
        raise NotRun(f"{self.block.slot}: the engine has no {type(shape).__name__} yet")

    def _has(self, weight: str) -> bool:
        return any(own.name == weight for own in self.block.shape.weights())

    def _has_large_biases(self, heads: int) -> bool:
        bias = None if self._has("k_norm") else self._vector("k_bias")
        return bias is not None and bool((np.square(bias.reshape(heads, -1)).mean(1) > _LARGE_BIAS**2).any())

    def _vector(self, weight: str) -> np.ndarray | None:
        if not self._has(weight):
            return None
        values = self.source.vector(self.block.tensor(weight))
        return values + np.float32(self.block.norm_offset) if weight.endswith("norm") else values

    def _share(self, activation: str) -> float:
        """The share of an activation's channels that is left out."""
        own = self.block.shape.sparsity
        if own is None:
            return 0.0
        if self.sparsity is not None:
            return self.sparsity
        return own.entering if activation == "input" else own.inner

    def _stack(self, activation: str) -> Any:
        """The matrices that multiply an activation, one under the other, with their biases. They leave out a share of
        its channels by the tables of its magnitudes."""
        from pennyweight import _native

        made, share = _native.Linear(), self._share(activation)
        names, which = self.block.shape.readers(activation), "inner_" if activation == "inner" else ""
        for matrix in self.source.matrices([self.block.tensor(name) for name in names]):
            if share:
                magnitudes = self._vector(f"{which}magnitudes")
                matrix.threshold = float(threshold(torch.from_numpy(magnitudes), share))
                if (importance := self._vector(f"{which}importance")) is not None:
                    matrix.set_importance(importance)
            made.add(matrix)
        biases = [self._vector(f"{name.removesuffix('_proj')}_bias") for name in names]
        if found := [bias for bias in biases if bias is not None]:
            made.set_bias(np.concatenate(found))
        return made
