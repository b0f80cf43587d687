"""Llama 2 and 3 and what copies them: optional biases on attention and MLP, no window."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("llama",)
MODULE = "transformers.models.llama.modeling_llama"
PREFIX = "Llama"
KEYS = ("attention_bias", "mlp_bias")
PICO = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "attention_bias": True,
    "mlp_bias": True,
}


def mixer(config: Config, layer: int) -> Attention:
    bias = config["attention_bias"]
    return attention(config, layer, qkv_bias=bias, o_bias=bias)


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer, bias=config["mlp_bias"])
