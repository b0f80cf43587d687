"""What llama.cpp's architectures are called in transformers, and what their files say beside what all files say.

Where llama.cpp has a number in its code and no key for it, it stands here: a file means what llama.cpp computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.disk.gguf.file import File

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """model_type: transformers'. interleaved: rows of q_proj and k_proj lie with rotary pairs as neighbours, where
    transformers has halves. partial: a share of a head's channels may turn. own: keys of the config that only such
    models have, from the file and the keys of all."""

    model_type: str
    interleaved: bool = False
    partial: bool = False
    own: Callable[[File, Config], Mapping[str, Any]] = lambda file, config: {}


def _number(file: File, key: str, usual: float) -> float:
    """A positive number under the architecture. Raises ValueError for another."""
    name = f"{file.get('general.architecture', str)}.{key}"
    value = file.get(name, float, usual)
    if not 1e-30 < value < 1e30:
        raise ValueError(f"{file.path}: {name} is {value}; expected a positive number")
    return value


def _smollm3(file: File, config: Config) -> Config:
    return {"no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None}


def _granite(file: File, config: Config) -> Config:
    return {
        "attention_multiplier": _number(file, "attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": _number(file, "embedding_scale", 1.0),
        "residual_multiplier": _number(file, "residual_scale", 1.0),
        "logits_scaling": _number(file, "logit_scale", 1.0),
    }


def _gemma(file: File, config: Config, *, pattern: int, largest: int) -> Config:
    """`pattern`: of so many layers the last does not slide; `largest`: layers of the one model whose scores are scaled
    by its width for each head instead of the width of heads."""
    layers = config["num_hidden_layers"]
    scaled_by = config["hidden_size"] // config["num_attention_heads"] if layers == largest else config["head_dim"]
    window = file.get(f"{file.get('general.architecture', str)}.attention.sliding_window", int)
    if window < 1:
        raise ValueError(f"{file.path}: a sliding window of {window} tokens; expected a positive number")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled_by,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "use_bidirectional_attention": False,
    }


def _gemma2(file: File, config: Config) -> Config:
    return {
        **_gemma(file, config, pattern=2, largest=46),
        "attn_logit_softcapping": _number(file, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _number(file, "final_logit_softcapping", 30.0),
    }


def _gemma3(file: File, config: Config) -> Config:
    """Scaling is of the tables of layers that see all; those that slide have tables of their own."""
    local = {"rope_type": "default", "rope_theta": _number(file, "rope.freq_base_swa", 10000.0)}
    cap = file.get("gemma3.final_logit_softcapping", float, 0.0)
    return {
        **_gemma(file, config, pattern=6, largest=62),
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": _number(file, "final_logit_softcapping", 1.0) if cap else None,
    }


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", partial=True, own=lambda file, config: {"sliding_window": None}),
    "glm4": Architecture("glm4", partial=True),
    "smollm3": Architecture("smollm3", interleaved=True, own=_smollm3),
    "granite": Architecture("granite", interleaved=True, own=_granite),
    "gemma2": Architecture("gemma2", own=_gemma2),
    "gemma3": Architecture("gemma3_text", own=_gemma3),
}
"""By the name that files give."""
