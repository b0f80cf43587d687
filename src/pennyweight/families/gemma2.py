"""Gemma 2: what Gemmas share, and a cap on scores; every other layer slides."""

from __future__ import annotations

from pennyweight.families import _gemma
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention

MODEL_TYPES = ("gemma2",)
MODULE = "transformers.models.gemma2.modeling_gemma2"
PREFIX = "Gemma2"
KEYS = _gemma.KEYS
PICO = {**_gemma.PICO, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
NORMS, NORM_OFFSET, NAMES = _gemma.NORMS, _gemma.NORM_OFFSET, _gemma.NAMES
ffn, embed, head = _gemma.ffn, _gemma.embed, _gemma.head


def mixer(config: Config, layer: int) -> Attention:
    return _gemma.mixer(config, layer, cap=config["attn_logit_softcapping"])
