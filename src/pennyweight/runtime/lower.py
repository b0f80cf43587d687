"""Lower a model to what the native engine runs: a flat list of blocks, every matrix in the layout of its kernel.

Matrices come from the source in the bytes they have (runtime/source.py, native/matrices.h). The rotary tables are
transformers' own, so every scaling of it (Llama 3, YaRN, linear) is the one the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pennyweight import blocks
from pennyweight.families._decoder import tensor_names
from pennyweight.runtime.source import Source
from pennyweight.slots import Attention, GatedMLP, Linear, Noop, Slot
from pennyweight.walk import rotary_embedding

CACHES = ("float16", "fp8", "float32")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class NotRun(ValueError):
    """A sound model that asks for something the engine does not do."""


def lower(source: Source, *, context: int | None = None, cache: str = "float16", sparsity: float | None = None) -> Any:
    """The native model of a source, for sequences of up to `context` tokens (default: what the config allows), keys and
    values kept in `cache`: float16, fp8 (E4M3) or float32. `sparsity`: the share of their input channels that blocks
    which can leave some out do leave out, instead of what the config says of each.

    Raises NotRun for a rotary scaling, a gate or a shape the engine does not run, ValueError for damaged weights and
    for a `sparsity` that no block of the model can follow.
    """
    from pennyweight import _native

    if cache not in CACHES:
        raise ValueError(f"keys and values cannot be kept in {cache!r}; float16, fp8 or float32")
    config = source.config
    gate = config.get("hidden_act", "silu")
    if gate not in _ACTIVATIONS:
        raise NotRun(f"hidden_act {gate!r}: the gates of the engine's FFN are {', '.join(_ACTIVATIONS)}")
    context = min(context or 2**62, config.get("max_position_embeddings", 2**62))
    epsilon = config["rms_norm_eps"]
    attention = {"cache": _native.Cache[cache], "rotary": _native.Rotary(*_rotary(source, context))}
    gated = {"activation": _native.Activation[_ACTIVATIONS[gate]]}
    embedding = source.matrix("model.embed_tokens.weight")
    if sparsity is not None:
        _check_sparsity(source, sparsity)
    head = _native.Linear()
    head.add(embedding if config.get("tie_word_embeddings") else source.matrix("lm_head.weight"))
    norm = source.vector("model.norm.weight")
    model = _native.Model(_native.Embedding(embedding), head, context, norm=norm, epsilon=epsilon)
    for index in range(config["num_hidden_layers"]):
        for slot, block, parts, own in _layer(source, index, sparsity):
            shared = {_native.Attention: attention, _native.Gated: gated}.get(block, {})
            try:
                model.add(block(*parts, **own, **shared, epsilon=epsilon))
            except ValueError as err:
                raise ValueError(f"{slot}: {err}") from err
    return model


def _check_sparsity(source: Source, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"a sparsity of {share}; it is the share left out, at least 0 and below 1")
    if not any(getattr(shape, "sparsity", None) is not None for shape in source.shapes.values()):
        raise ValueError(
            f"no block of {source.name} can leave input channels out: that takes matrices stored column by column and "
            "tables of their inputs' magnitudes. Make such a model with penny fit --axes sparsity"
        )


def _layer(
    source: Source, index: int, sparsity: float | None
) -> Iterator[tuple[Slot, Any, tuple[Any, ...], dict[str, Any]]]:
    """Slot, class, matrices and settings of each native block of a layer."""
    from pennyweight import _native

    for slot in (Slot("mixer", index), Slot("ffn", index)):
        shape = source.shapes[slot]
        names = tensor_names(slot, shape)
        if isinstance(shape, Noop):
            continue
        own: dict[str, Any] = {"norm": source.vector(names["norm"])}
        if isinstance(shape, Linear):
            yield slot, _native.Dense, (_stack(source, names, ("linear",)),), own
        elif isinstance(shape, Attention):
            entering, inner = _shares(shape, sparsity)
            qkv = _stack(source, names, _QKV, share=entering)
            o = _stack(source, names, ("o_proj",), share=inner, which="inner_")
            own |= {"heads": shape.num_heads, "kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
            own |= {"window": shape.window or 0}
            own |= {name: source.vector(names[name]) for name in ("q_norm", "k_norm", "sinks") if name in names}
            yield slot, _native.Attention, (qkv, o), own
        elif isinstance(shape, GatedMLP):
            entering, inner = _shares(shape, sparsity)
            gate_up = _stack(source, names, _GATE_UP, share=entering)
            down = _stack(source, names, ("down_proj",), share=inner, which="inner_")
            yield slot, _native.Gated, (gate_up, down), own
        else:
            raise NotRun(f"{slot}: the engine has no {type(shape).__name__} yet")


def _stack(
    source: Source, names: dict[str, str], parts: tuple[str, ...], *, share: float = 0.0, which: str = ""
) -> Any:
    """Matrices that share an input, one under the other, with their biases. They leave out a `share` of its channels,
    by the tables of the block's input or, `which` being "inner_", of what the block has computed."""
    from pennyweight import _native

    made = _native.Linear()
    for matrix in source.matrices([names[part] for part in parts]):
        if share:
            magnitudes = torch.from_numpy(source.vector(names[f"{which}magnitudes"]))
            matrix.threshold = float(blocks.threshold(magnitudes, share))
            if f"{which}importance" in names:
                matrix.set_importance(source.vector(names[f"{which}importance"]))
        made.add(matrix)
    biases = [names.get(f"{part.removesuffix('_proj')}_bias") for part in parts]
    found = [bias for bias in biases if bias is not None]
    if found:
        made.set_bias(np.concatenate([source.vector(bias) for bias in found]))
    return made


def _shares(shape: Attention | GatedMLP, sparsity: float | None) -> tuple[float, float]:
    if shape.sparsity is None:
        return 0.0, 0.0
    return (shape.sparsity.entering, shape.sparsity.inner) if sparsity is None else (sparsity, sparsity)


def _rotary(source: Source, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (context, head_dim / 2), scaled as attention wants them."""
    rotary = rotary_embedding(source.config)  # which knows the older names of the keys too
    if rotary.rope_type in ("dynamic", "longrope"):
        raise NotRun(f"rope_type {rotary.rope_type!r} changes with the length of the text; the engine does not run it")
    if source.rotary_divisors is not None:
        rotary.inv_freq = rotary.inv_freq / torch.from_numpy(source.rotary_divisors)
    cosine, sine = rotary(torch.zeros(1), torch.arange(context).unsqueeze(0))
    half = cosine.shape[-1] // 2
    return tuple(np.ascontiguousarray(table[0, :, :half].float().numpy()) for table in (cosine, sine))  # type: ignore[return-value]
