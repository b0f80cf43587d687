"""GLM-4 (0414): norms before and after blocks; half of a head's channels turn, each with its neighbour; gate and up are
one matrix on disk."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP, Rotary

MODEL_TYPES = ("glm4",)
MODULE = "transformers.models.glm4.modeling_glm4"
PREFIX = "Glm4"
KEYS = ("head_dim", "attention_bias")
PICO = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
NORMS = "both"
PARTIAL = True
NAMES = {
    "mixer": {"post_norm": "post_self_attn_layernorm.weight"},
    "ffn": {"post_norm": "post_mlp_layernorm.weight"},
}
JOINS = {"ffn": {"mlp.gate_up_proj": ("gate_proj", "up_proj")}}


def mixer(config: Config, layer: int) -> Attention:
    return attention(config, layer, qkv_bias=config["attention_bias"], rotary=Rotary(pairs="neighbours"))


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
