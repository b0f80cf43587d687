"""Granite (dense): Llama's layers with four numbers: what multiplies embeddings, scores and what blocks add, and what
logits are divided by."""

from __future__ import annotations

from typing import Any

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("granite",)
MODULE = "transformers.models.granite.modeling_granite"
PREFIX = "Granite"
KEYS = (
    "attention_bias",
    "mlp_bias",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
PICO = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}


def mixer(config: Config, layer: int) -> Attention:
    bias = config["attention_bias"]
    return attention(config, layer, qkv_bias=bias, o_bias=bias, scale=float(config["attention_multiplier"]))


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer, bias=config["mlp_bias"])


def residual(config: Config) -> float:
    return float(config["residual_multiplier"])


def embed(config: Config) -> dict[str, Any]:
    return {"scale": float(config["embedding_multiplier"])}


def head(config: Config) -> dict[str, Any]:
    return {"divisor": float(config["logits_scaling"])}
