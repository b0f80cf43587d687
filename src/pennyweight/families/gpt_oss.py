"""gpt-oss: mixture of experts, learned attention sinks, every other layer with a 128-token window.

Planned from its config (parameters, KV cache, prices); building children of it needs the experts axis.
"""

from __future__ import annotations

from pennyweight.families._decoder import Config, attention, need, sliding
from pennyweight.model.shapes import Attention, MoE

MODEL_TYPES = ("gpt_oss",)
MODULE = None  # no live modules yet: plan only
PREFIX = "GptOss"
KEYS = ("head_dim", "sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok")
NAMES = {
    "ffn": {
        "router": "mlp.router.weight",
        "router_bias": "mlp.router.bias",
        "gate_up_proj": "mlp.experts.gate_up_proj",
        "gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "down_proj": "mlp.experts.down_proj",
        "down_bias": "mlp.experts.down_proj_bias",
    }
}


def mixer(config: Config, layer: int) -> Attention:
    return attention(config, layer, window=sliding(config, layer), qkv_bias=True, o_bias=True, sinks=True)


def ffn(config: Config, layer: int) -> MoE:
    """`per_layer_config` may change experts by layer."""
    return MoE(
        hidden_size=need(config, "hidden_size"),
        intermediate_size=need(config, "intermediate_size", layer),
        num_experts=need(config, "num_local_experts", layer),
        top_k=need(config, "num_experts_per_tok", layer),
        bias=True,
        router_bias=True,
    )
