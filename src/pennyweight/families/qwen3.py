"""Qwen3 (dense): an RMSNorm on every query and key head; head_dim is independent of hidden_size."""

from __future__ import annotations

from pennyweight.families import _decoder
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.slots import Slot

MODEL_TYPES = ("qwen3",)
MODULE = "transformers.models.qwen3.modeling_qwen3"
PREFIX = "Qwen3"  # of the class names in MODULE


def slots(config: Config) -> dict[Slot, Shape]:
    """Shapes of every slot, from config.json alone."""
    return _decoder.decoder(config, _mixer, _ffn)


def _mixer(config: Config, layer: int) -> Attention:
    bias = bool(config.get("attention_bias", False))
    return _decoder.attention({"head_dim": 128, **config}, layer, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _ffn(config: Config, layer: int) -> GatedMLP:
    return _decoder.gated_mlp(config, layer)
