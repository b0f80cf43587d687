"""Qwen2 and Qwen2.5: biases on q, k and v; some releases slide a window over the later layers."""

from __future__ import annotations

from pennyweight.families import _decoder
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.slots import Slot

MODEL_TYPES = ("qwen2",)
MODULE = "transformers.models.qwen2.modeling_qwen2"
PREFIX = "Qwen2"  # of the class names in MODULE


def slots(config: Config) -> dict[Slot, Shape]:
    """Shapes of every slot, from config.json alone."""
    return _decoder.decoder(config, _mixer, _ffn)


def _mixer(config: Config, layer: int) -> Attention:
    return _decoder.attention(config, layer, qkv_bias=True)


def _ffn(config: Config, layer: int) -> GatedMLP:
    return _decoder.gated_mlp(config, layer)
