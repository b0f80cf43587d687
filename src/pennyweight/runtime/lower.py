"""Lower a model folder to what the native engine runs: a flat list of layers, every matrix in the layout of its kernel.

Nothing is rounded on the way. bfloat16 stays bfloat16; packed integers keep their codes and scales, only their order
changes (native/matrices.h). The rotary tables are transformers' own, so every scaling of it (Llama 3, YaRN, linear) is
the one the model was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pennyweight.checkpoint import Checkpoint
from pennyweight.families._decoder import tensor_names
from pennyweight.formats import packed_int
from pennyweight.slots import Attention, GatedMLP, Linear, Noop, Slot
from pennyweight.walk import Walk

CACHES = ("float16", "fp8", "float32")
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


def lower(folder: Path, *, context: int | None = None, cache: str = "float16") -> Any:
    """The native model of a folder, for sequences of up to `context` tokens (default: what the config allows), keys and
    values kept in `cache`: float16, fp8 (E4M3) or float32.

    Raises ValueError for a family, a rotary scaling or a shape the engine does not run, and for damaged weights.
    """
    from pennyweight import _native

    if cache not in CACHES:
        raise ValueError(f"keys and values cannot be kept in {cache!r}; float16, fp8 or float32")
    walk = Walk(Checkpoint(folder))
    config = walk.checkpoint.config
    context = min(context or 2**62, config.get("max_position_embeddings", 2**62))
    model = _native.Model()
    model.hidden_size, model.vocab_size = config["hidden_size"], config["vocab_size"]
    model.epsilon, model.cache, model.attention_scale = config["rms_norm_eps"], _native.Cache[cache], 0.0
    model.set_rotary(*_rotary(walk, context))
    model.embedding = _matrix(walk, "model.embed_tokens.weight")
    for index in range(walk.layers):
        model.add_layer(_layer(walk, index))
    model.set_final_norm(_vector(walk, "model.norm.weight"))
    head = _native.Linear()
    head.add(model.embedding if walk.tied else _matrix(walk, "lm_head.weight"))
    model.head = head
    return model


def _layer(walk: Walk, index: int) -> Any:
    from pennyweight import _native

    layer = _native.Layer()
    for slot in (Slot("mixer", index), Slot("ffn", index)):
        shape = walk.shapes[slot]
        names = tensor_names(slot, shape)
        if isinstance(shape, Noop):
            continue
        (layer.set_mixer_norm if slot.kind == "mixer" else layer.set_ffn_norm)(_vector(walk, names["norm"]))
        if isinstance(shape, Linear):
            setattr(layer, "o" if slot.kind == "mixer" else "down", _stack(walk, names, ("linear",)))
        elif isinstance(shape, Attention):
            layer.qkv, layer.o = _stack(walk, names, _QKV), _stack(walk, names, ("o_proj",))
            layer.heads, layer.kv_heads, layer.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
            layer.window = shape.window or 0
            if shape.qk_norm:
                layer.set_q_norm(_vector(walk, names["q_norm"]))
                layer.set_k_norm(_vector(walk, names["k_norm"]))
            if shape.sinks:
                layer.set_sinks(_vector(walk, names["sinks"]))
        elif isinstance(shape, GatedMLP):
            layer.gate_up, layer.down = _stack(walk, names, _GATE_UP), _stack(walk, names, ("down_proj",))
        else:
            raise ValueError(f"{slot}: the engine has no {type(shape).__name__} yet")
    return layer


def _stack(walk: Walk, names: dict[str, str], parts: tuple[str, ...]) -> Any:
    """Matrices that share an input, one under the other, with their biases."""
    from pennyweight import _native

    made = _native.Linear()
    for part in parts:
        made.add(_matrix(walk, names[part]))
    biases = [names.get(f"{part.removesuffix('_proj')}_bias") for part in parts]
    found = [bias for bias in biases if bias is not None]
    if found:
        made.set_bias(np.concatenate([_vector(walk, bias) for bias in found]))
    return made


def _vector(walk: Walk, name: str) -> np.ndarray:
    tensor = walk.checkpoint.read(name).float()
    _refuse_damage(name, tensor)
    return tensor.numpy()


def _matrix(walk: Walk, name: str) -> Any:
    from pennyweight import _native

    checkpoint = walk.checkpoint
    if name in checkpoint.entries:
        tensor = checkpoint.read(name)
        _refuse_damage(name, tensor)
        stored = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}.get(tensor.dtype)
        if stored is None:
            raise ValueError(f"{name} is stored as {tensor.dtype}; the engine reads float16, bfloat16 and float32")
        return _native.Matrix.wide(tensor.view(torch.uint8).numpy(), _native.Float[stored])
    parts = {f"weight_{part}": checkpoint.read(f"{name}_{part}") for part in ("packed", "scale", "shape")}
    spec, columns = packed_int.spec_of(parts), int(parts["weight_shape"][1])
    _refuse_damage(f"{name}_scale", parts["weight_scale"])
    codes = parts["weight_packed"].numpy().view(np.uint8)
    scales = parts["weight_scale"].bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)
    return _native.Matrix.rows(codes, scales, None, columns, spec.bits, spec.group, True)


def _refuse_damage(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch it again")


def _rotary(walk: Walk, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (context, head_dim / 2), scaled as attention wants them."""
    kind = (walk.checkpoint.config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"rope_type {kind!r} changes with the length of the text; the engine does not run it")
    cosine, sine = walk.positions(context)["position_embeddings"]
    half = cosine.shape[-1] // 2
    return tuple(np.ascontiguousarray(table[0, :, :half].float().numpy()) for table in (cosine, sine))  # type: ignore[return-value]
