"""Mistral: Llama's layers without biases; where the config names a window, all layers slide."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("mistral",)
MODULE = "transformers.models.mistral.modeling_mistral"
PREFIX = "Mistral"
KEYS = ("head_dim", "sliding_window")
PICO = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "sliding_window": 20}


def mixer(config: Config, layer: int) -> Attention:
    return attention(config, layer, window=config["sliding_window"])


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
