"""Lower a model to what the native engine runs: a flat list of layers, every matrix in the layout of its kernel.

Matrices come from the source in the bytes they have (runtime/source.py, native/matrices.h). The rotary tables are
transformers' own, so every scaling of it (Llama 3, YaRN, linear) is the one the model was trained with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pennyweight.families._decoder import tensor_names
from pennyweight.live.magnitudes import threshold
from pennyweight.live.walk import rotary_embedding
from pennyweight.model.shapes import Attention, GatedMLP, Noop
from pennyweight.model.shapes import Dense as Linear
from pennyweight.model.slots import Slot
from pennyweight.sources.source import Source

CACHES = ("float16", "fp8", "float32")
_QKV = ("q_proj", "k_proj", "v_proj")
_MOST_QUERIES = 128  # that share a key-value head: native/engine.h
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
    if gate not in ("silu", "swish"):
        raise NotRun(f"hidden_act {gate!r}: the engine's FFN has silu gates alone")
    context = min(context or 2**62, config.get("max_position_embeddings", 2**62))
    model = _native.Model()
    model.hidden_size, model.vocab_size = config["hidden_size"], config["vocab_size"]
    model.epsilon, model.cache, model.attention_scale = config["rms_norm_eps"], _native.Cache[cache], 0.0
    model.set_rotary(*_rotary(source, context))
    model.embedding = source.matrix("model.embed_tokens.weight")
    if sparsity is not None:
        _check_sparsity(source, sparsity)
    for index in range(config["num_hidden_layers"]):
        model.add_layer(_layer(source, index, sparsity))
    model.set_final_norm(source.vector("model.norm.weight"))
    head = _native.Linear()
    head.add(model.embedding if config.get("tie_word_embeddings") else source.matrix("lm_head.weight"))
    model.head = head
    return model


def _check_sparsity(source: Source, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"a sparsity of {share}; it is the share left out, at least 0 and below 1")
    if not any(getattr(shape, "sparsity", None) is not None for shape in source.shapes.values()):
        raise ValueError(
            f"no block of {source.name} can leave input channels out: that takes matrices stored column by column and "
            "tables of their inputs' magnitudes. Make such a model with penny fit --axes sparsity"
        )


def _layer(source: Source, index: int, sparsity: float | None) -> Any:
    from pennyweight import _native

    layer = _native.Layer()
    for slot in (Slot("mixer", index), Slot("ffn", index)):
        shape = source.shapes[slot]
        names = tensor_names(slot, shape)
        if isinstance(shape, Noop):
            continue
        (layer.set_mixer_norm if slot.kind == "mixer" else layer.set_ffn_norm)(source.vector(names["norm"]))
        if isinstance(shape, Linear):
            setattr(layer, "o" if slot.kind == "mixer" else "down", _stack(source, names, ("linear",)))
        elif isinstance(shape, Attention):
            entering, inner = _shares(shape, sparsity)
            layer.qkv = _stack(source, names, _QKV, share=entering)
            layer.o = _stack(source, names, ("o_proj",), share=inner, which="inner_")
            layer.heads, layer.kv_heads, layer.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
            layer.window = shape.window or 0
            if shape.num_heads > _MOST_QUERIES * shape.num_kv_heads:
                raise NotRun(
                    f"{slot}: {shape.num_heads} heads on {shape.num_kv_heads} key-value heads; in the engine up to "
                    f"{_MOST_QUERIES} share one"
                )
            if shape.qk_norm:
                layer.set_q_norm(source.vector(names["q_norm"]))
                layer.set_k_norm(source.vector(names["k_norm"]))
            if shape.sinks:
                layer.set_sinks(source.vector(names["sinks"]))
        elif isinstance(shape, GatedMLP):
            entering, inner = _shares(shape, sparsity)
            layer.gate_up = _stack(source, names, _GATE_UP, share=entering)
            layer.down = _stack(source, names, ("down_proj",), share=inner, which="inner_")
        else:
            raise NotRun(f"{slot}: the engine has no {type(shape).__name__} yet")
    return layer


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
            matrix.threshold = float(threshold(magnitudes, share))
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
