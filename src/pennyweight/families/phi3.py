"""Phi-3 and what copies it: q, k and v are one matrix on disk, and gate and up another; not all channels need turn."""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, gated_mlp
from pennyweight.model.shapes import Attention, GatedMLP

MODEL_TYPES = ("phi3",)
MODULE = "transformers.models.phi3.modeling_phi3"
PREFIX = "Phi3"
KEYS = ("sliding_window", "original_max_position_embeddings")
PICO = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
}
PARTIAL = True
JOINS = {
    "mixer": {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")},
    "ffn": {"mlp.gate_up_proj": ("gate_proj", "up_proj")},
}


def mixer(config: Config, layer: int) -> Attention:
    return attention(config, layer, window=config["sliding_window"])


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer)
