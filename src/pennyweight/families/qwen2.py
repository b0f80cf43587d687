"""Qwen2 and Qwen2.5: biases on q, k and v; some releases slide a window over the later layers."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp, sliding
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("qwen2",)
MODULE = "transformers.models.qwen2.modeling_qwen2"
PREFIX = "Qwen2"
KEYS = ("use_sliding_window", "sliding_window", "layer_types")
PICO = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}


def mixer(config: Config, layer: int) -> Attention:
    return attention(config, layer, window=sliding(config, layer), qkv_bias=True)


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
