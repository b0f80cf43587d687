"""Gemma 3 (text): what Gemmas share, and an RMSNorm on every query and key head; five layers in six slide, and turn
queries and keys by tables of their own."""

from __future__ import annotations

from pennyweight.families import _gemma
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention, Rotary

MODEL_TYPES = ("gemma3_text",)
MODULE = "transformers.models.gemma3.modeling_gemma3"
PREFIX = "Gemma3"
KEYS = (*_gemma.KEYS, "sliding_window_pattern", "rope_local_base_freq")
PICO = {**_gemma.PICO, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NORMS, NORM_OFFSET, NAMES = _gemma.NORMS, _gemma.NORM_OFFSET, _gemma.NAMES
ffn, embed, head = _gemma.ffn, _gemma.embed, _gemma.head


def mixer(config: Config, layer: int) -> Attention:
    """transformers does not look at attn_logit_softcapping here."""
    return _gemma.mixer(config, layer, qk_norm="each head", rotary=Rotary(config["layer_types"][layer]))
