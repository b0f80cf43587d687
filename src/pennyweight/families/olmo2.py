"""OLMo 2: norms behind the blocks instead of before them; queries and keys are normed over all heads together."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("olmo2",)
MODULE = "transformers.models.olmo2.modeling_olmo2"
PREFIX = "Olmo2"
KEYS = ("attention_bias",)
PICO = {"num_attention_heads": 4, "num_key_value_heads": 2}
NORMS = "after"
NAMES = {
    "mixer": {"post_norm": "post_attention_layernorm.weight"},
    "ffn": {"post_norm": "post_feedforward_layernorm.weight"},
}


def mixer(config: Config, layer: int) -> Attention:
    bias = config["attention_bias"]
    return attention(config, layer, qkv_bias=bias, o_bias=bias, qk_norm="all heads")


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
