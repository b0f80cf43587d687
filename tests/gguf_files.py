"""GGUF files made of pico models with the ggml project's own writer, and folders that hold the same weights in float32.

The writer's package quantises all but the K types; those are quantised here, simply, into valid blocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from pennyweight.disk.checkpoint import Checkpoint

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "glm4": ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 24, "num_hidden_layers": 7, "layer_types": None, "final_logit_softcapping": 3.0},
    ),
}
"""Of architectures whose files do not say everything: model_type, and what the config of a pico model says as llama.cpp
takes it for granted. Others are called as in transformers."""


def parent_of(arch: str, pico: Callable[..., Path]) -> Path:
    """The pico model of an architecture."""
    model_type, changes = MODELS.get(arch, (arch, {}))
    return pico(model_type, **changes)


def quantise(weights: np.ndarray, kind: Type) -> np.ndarray:
    """Rows of bytes (or floats) of a tensor type."""
    if kind.name in ("Q4_K", "Q5_K", "Q6_K"):
        return {"Q4_K": _k_affine, "Q5_K": _k_affine, "Q6_K": _q6_k}[kind.name](weights, kind)
    return gguf.quants.quantize(weights, kind)


def _k_affine(weights: np.ndarray, kind: Type) -> np.ndarray:
    """Q4_K and Q5_K: 8 groups of 32 with a scale and a minimum of 6 bits, in steps of one float16 each."""
    most = 15 if kind.name == "Q4_K" else 31
    groups = weights.reshape(len(weights), -1, 8, 32)
    low = np.maximum(-groups.min(-1), 0)
    scale = (groups.max(-1) + low) / most
    d, dmin = ((part.max(-1, keepdims=True) / 63).astype(np.float16) for part in (scale, low))
    sc = np.rint(_over(scale, d)).astype(np.uint8)
    m = np.rint(_over(low, dmin)).astype(np.uint8)
    step, minimum = d.astype(np.float32) * sc, dmin.astype(np.float32) * m
    codes = np.clip(np.rint(_over(groups + minimum[..., None], step[..., None])), 0, most).astype(np.uint8)
    first, last, m_first, m_last = sc[..., :4], sc[..., 4:], m[..., :4], m[..., 4:]
    packed = [first | last >> 4 << 6, m_first | m_last >> 4 << 6, last & 15 | (m_last & 15) << 4]
    fifth = [np.bitwise_or.reduce((codes >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=-2)]
    low_bits = (codes & 15).reshape(*codes.shape[:2], 4, 2, 32)
    nibbles = (low_bits[..., 0, :] | low_bits[..., 1, :] << 4).reshape(*codes.shape[:2], 128)
    halves = [np.ascontiguousarray(part).view(np.uint8) for part in (d, dmin)]
    parts = [*halves, *packed, *(fifth if most == 31 else []), nibbles]
    return np.concatenate(parts, axis=-1).reshape(len(weights), -1)


def _q6_k(weights: np.ndarray, kind: Type) -> np.ndarray:
    """16 groups of 16 with a signed scale of 8 bits in steps of one float16."""
    groups = weights.reshape(len(weights), -1, 16, 16)
    scale = np.abs(groups).max(-1) / 31
    d = (scale.max(-1, keepdims=True) / 127).astype(np.float16)
    sc = np.rint(_over(scale, d)).astype(np.int8)
    sc[:, :, ::3] *= -1  # ggml's own choose either sign
    step = (d.astype(np.float32) * sc)[..., None]
    codes = (np.clip(np.rint(_over(groups, step)), -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(*codes.shape[:2], 2, 4, 32)
    low = (quarters[..., :2, :] & 15) | (quarters[..., 2:, :] & 15) << 4
    high = np.bitwise_or.reduce((quarters >> 4) << np.array([[0], [2], [4], [6]], np.uint8), axis=-2)
    shape = (*codes.shape[:2], -1)
    parts = [low.reshape(shape), high.reshape(shape), sc.view(np.uint8), np.ascontiguousarray(d).view(np.uint8)]
    return np.concatenate(parts, axis=-1).reshape(len(weights), -1)


def _over(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = by.astype(np.float32)
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32), where=by != 0)


def convert(
    folder: Path, out: Path, kind: str | Callable[[str], str], *, more: Callable[[Any], None] = lambda writer: None
) -> tuple[Path, Path]:
    """`<out>/model.gguf` with every matrix as `kind` (or kind(name)), and the folder `<out>/same` with what that is.

    `more` may change the writer before it writes.
    """
    out.mkdir(exist_ok=True)
    config = Checkpoint(folder).config
    arch = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out / "model.gguf", arch)
    describe(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    same: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weights = tensor.float().numpy()
        if weights.ndim == 1:
            chosen, stored = Type.F32, weights
        else:
            chosen = Type[kind if isinstance(kind, str) else kind(name)]
            stored = quantise(weights, chosen)
        value = weights if chosen == Type.F32 else gguf.quants.dequantize(stored, chosen)
        same[name] = torch.from_numpy(np.ascontiguousarray(value.reshape(weights.shape)))
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            stored = stored + 1
        if arch in ("llama", "smollm3", "granite") and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else kv_heads
            stored = interleaved(stored, count)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(stored), raw_dtype=chosen)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copytree(folder, out / "same", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(same, out / "same" / "model.safetensors")
    (out / "same" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return out / "model.gguf", out / "same"


def describe(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Everything but the tensors: sizes, and the tokenizer as one of bytes and merges."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("sliding_window", writer.add_sliding_window),
    ):
        if config.get(key):
            add(config[key])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if share := rope.get("partial_rotary_factor"):
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(share * width))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    if not merges and len(tokens) < config["vocab_size"]:  # llama.cpp refuses a file without any
        merges.append(f"{tokens[1]} {tokens[2]}")
        tokens.append(tokens[1] + tokens[2])
    tokens += [f"<|unused {i}|>" for i in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)  # the folder's tokenizer names one and adds none


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj in the order of the llama architecture: those of a head's halves alternate."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)
