"""The metadata of a GGUF file as transformers' config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight import families
from pennyweight.disk.gguf.architectures import ARCHITECTURES
from pennyweight.disk.gguf.file import File
from pennyweight.families import MOST_POSITIONS


def config_of(file: File) -> dict[str, Any]:
    """transformers' config.json of a file. Raises ValueError for an architecture or a setting that is not run, and for
    metadata that contradict themselves."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"{file.path}: architecture {arch!r} is not run; supported are {', '.join(ARCHITECTURES)}")

    def need(key: str, default: int | None = None) -> int:
        value = file.get(f"{arch}.{key}", int, default)
        if value < 1:
            raise ValueError(f"{file.path}: {arch}.{key} is {value}; expected a positive number")
        return value

    def has(tensor: str) -> bool:
        return f"blk.0.{tensor}" in file.tensors

    if file.get(f"{arch}.expert_count", int, 0):
        raise ValueError(f"{file.path}: a mixture of experts; only dense {arch} models are run")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path}: token_embd.weight is missing or no matrix; it is not a whole language model")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads, head_dim = need("attention.head_count_kv", heads), need("attention.key_length", max(1, hidden // heads))
    own = ARCHITECTURES[arch]
    config: dict[str, Any] = {
        "architectures": [f"{families.of(own.model_type).PREFIX}ForCausalLM"],
        "model_type": own.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "rope_parameters": _rope(file, arch),
        "attention_bias": has("attn_q.bias"),
        "mlp_bias": has("ffn_gate.bias"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    turning = need("rope.dimension_count", head_dim)
    if own.partial and turning % 2 == 0 and turning < head_dim:
        config["rope_parameters"]["partial_rotary_factor"] = turning / head_dim
    for holds, what in (
        (heads % kv_heads == 0, f"{heads} heads on {kv_heads} key-value heads"),
        (head_dim % 2 == 0, f"head_dim {head_dim}, which is odd"),
        (need("attention.value_length", head_dim) == head_dim, "values of another width than keys"),
        (turning == head_dim or (own.partial and turning < head_dim), "rotary embedding on a part of each head"),
        (config["num_hidden_layers"] <= len(file.tensors), f"{config['num_hidden_layers']} layers in fewer tensors"),
        (
            config["max_position_embeddings"] <= MOST_POSITIONS,
            f"a context above {MOST_POSITIONS} tokens",
        ),
        (0 < config["rms_norm_eps"] < 1, f"an epsilon of {config['rms_norm_eps']}"),
    ):
        if not holds:
            raise ValueError(f"{file.path}: the metadata ask for {what}; the engine does not run that")
    for key, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.get(f"tokenizer.ggml.{role}_token_id", int, -1)
        config[f"{key}_token_id"] = token if 0 <= token < config["vocab_size"] else None
    return {**config, **own.own(file, config)}


def _rope(file: File, arch: str) -> dict[str, Any]:
    """transformers' rope_parameters. Without a type, a factor scales linearly."""
    base = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    scaling = f"{arch}.rope.scaling"
    kind = file.get(f"{scaling}.type", str, "linear")
    factor = file.get(f"{scaling}.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0)) or 1.0
    if not (0 < base < 1e30 and 0 < factor < 1e6):
        raise ValueError(f"{file.path}: rotary base {base} and factor {factor}; expected positive numbers")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default", "rope_theta": base}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    others = (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0))
    if kind != "yarn" or any(file.get(f"{scaling}.{key}", float, usual) != usual for key, usual in others):
        raise ValueError(f"{file.path}: rotary scaling {kind!r} or its factors are not run; none, linear and yarn are")
    return {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": file.get(
            f"{scaling}.original_context_length", int, file.get(f"{arch}.context_length", int)
        ),
        "beta_fast": file.get(f"{scaling}.yarn_beta_fast", float, 32.0),
        "beta_slow": file.get(f"{scaling}.yarn_beta_slow", float, 1.0),
    }


def warnings(file: File, config: Mapping[str, Any]) -> list[str]:
    """What of the metadata is not applied."""
    window = file.get(f"{file.get('general.architecture', str)}.attention.sliding_window", int, 0)
    if config.get("sliding_window") == window or not 0 < window < config["max_position_embeddings"]:
        return []
    return [f"the file names a sliding window of {window} tokens, which is not applied, as in llama.cpp"]
