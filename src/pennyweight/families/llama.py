"""Llama 2 and 3 and what copies them: optional biases on attention and MLP, no window."""

from __future__ import annotations

from pennyweight.families import _decoder
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.slots import Slot

MODEL_TYPES = ("llama",)
MODULE = "transformers.models.llama.modeling_llama"
PREFIX = "Llama"  # of the class names in MODULE


def slots(config: Config) -> dict[Slot, Shape]:
    """Shapes of every slot, from config.json alone."""
    return _decoder.decoder(config, _mixer, _ffn)


def _mixer(config: Config, layer: int) -> Attention:
    bias = bool(config.get("attention_bias", False))
    return _decoder.attention(config, layer, qkv_bias=bias, o_bias=bias)


def _ffn(config: Config, layer: int) -> GatedMLP:
    return _decoder.gated_mlp(config, layer, bias=bool(config.get("mlp_bias", False)))
