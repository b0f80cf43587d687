"""Qwen3 (dense): an RMSNorm on every query and key head; head_dim is independent of hidden_size."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp, sliding
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("qwen3",)
MODULE = "transformers.models.qwen3.modeling_qwen3"
PREFIX = "Qwen3"
KEYS = ("head_dim", "attention_bias", "use_sliding_window", "sliding_window", "layer_types")
PICO = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}


def mixer(config: Config, layer: int) -> Attention:
    bias = config["attention_bias"]
    return attention(config, layer, window=sliding(config, layer), qkv_bias=bias, o_bias=bias, qk_norm="each head")


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
