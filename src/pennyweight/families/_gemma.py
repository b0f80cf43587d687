"""What Gemma 2 and 3 share: norms before and after blocks, their weights less 1 on disk; gated GELU; embeddings times
the root of their width; scores divided by a root that the config names; capped logits."""

from __future__ import annotations

from typing import Any

from pennyweight.families._decoder import Config, attention, gated_mlp, need, refuse_both_ways, sliding
from pennyweight.model.shapes import Attention, GatedMLP

KEYS = (
    "head_dim",
    "attention_bias",
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)
PICO = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 16,
    "sliding_window": 20,
}
NORMS = "both"
NORM_OFFSET = 1.0
NAMES = {
    "mixer": {"post_norm": "post_attention_layernorm.weight"},
    "ffn": {"norm": "pre_feedforward_layernorm.weight", "post_norm": "post_feedforward_layernorm.weight"},
}


def mixer(config: Config, layer: int, **differs: Any) -> Attention:
    refuse_both_ways(config)
    return attention(
        config,
        layer,
        window=sliding(config, layer),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        **differs,
    )


def ffn(config: Config, layer: int) -> GatedMLP:
    return gated_mlp(config, layer, act="hidden_activation")


def embed(config: Config) -> dict[str, Any]:
    return {"scale": need(config, "hidden_size") ** 0.5}


def head(config: Config) -> dict[str, Any]:
    return {"cap": config["final_logit_softcapping"]}
