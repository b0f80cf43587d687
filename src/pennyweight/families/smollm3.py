"""SmolLM3: in every fourth layer, or where `no_rope_layers` says 0, positions turn nothing."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp, sliding, where
from pennyweight.model.shapes import Attention, GatedMLP, Rotary

MODEL_TYPES = ("smollm3",)
MODULE = "transformers.models.smollm3.modeling_smollm3"
PREFIX = "SmolLM3"
KEYS = (
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
)
PICO = {"num_attention_heads": 4, "num_key_value_heads": 2, "no_rope_layer_interval": 2}


def mixer(config: Config, layer: int) -> Attention:
    turns, bias = config["no_rope_layers"], config["attention_bias"]
    if layer >= len(turns):
        raise ValueError(f"{where(config)}: no_rope_layers has {len(turns)} entries and none for layer {layer}")
    rotary, window = Rotary() if turns[layer] else None, sliding(config, layer)
    return attention(config, layer, window=window, rotary=rotary, qkv_bias=bias, o_bias=bias)


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer, bias=config["mlp_bias"])
