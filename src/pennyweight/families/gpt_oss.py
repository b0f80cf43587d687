"""gpt-oss: mixture of experts, learned attention sinks, every other layer with a 128-token window.

Planned from its config (parameters, KV cache, prices); building children of it needs the experts axis.
"""

from __future__ import annotations

from pennyweight.families import _decoder
from pennyweight.families._decoder import Config
from pennyweight.model.shapes import Attention, MoE, Shape
from pennyweight.model.slots import Slot

MODEL_TYPES = ("gpt_oss",)
MODULE = None  # no live modules yet: plan only
PREFIX = "GptOss"


def slots(config: Config) -> dict[Slot, Shape]:
    """Shapes of every slot, from config.json alone; `per_layer_config` may change experts and windows by layer."""
    return _decoder.decoder(config, _mixer, _ffn)


def _mixer(config: Config, layer: int) -> Attention:
    return _decoder.attention(config, layer, qkv_bias=True, o_bias=True, sinks=True)


def _ffn(config: Config, layer: int) -> MoE:
    own = _decoder.layer_config(config, layer)
    return MoE(
        hidden_size=_decoder.need(config, "hidden_size"),
        intermediate_size=_decoder.need(own, "intermediate_size"),
        num_experts=_decoder.need(own, "num_local_experts"),
        top_k=_decoder.need(own, "num_experts_per_tok"),
        bias=True,
        router_bias=True,
    )
