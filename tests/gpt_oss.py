"""gpt-oss-120B and the 88B child that Puzzle made of it, as configs of their published shapes.

The child's layout is that of the released checkpoint: 8 of the 18 layers with full attention got a window of 8192, 18
of the 36 layers kept 64 of their 128 experts.
"""

from __future__ import annotations

from typing import Any

LAYERS = 36
WINDOWED = (3, 5, 21, 23, 27, 31, 33, 35)
HALVED = (15, 17, 19, *range(21, 36))

PARENT: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "tie_word_embeddings": False,
}


def _changes(layer: int) -> dict[str, int]:
    window = {"sliding_window": 8192} if layer in WINDOWED else {}
    experts = {"num_local_experts": 64} if layer in HALVED else {}
    return window | experts


CHILD: dict[str, Any] = {
    **PARENT,
    "per_layer_config": {str(layer): _changes(layer) for layer in range(LAYERS) if _changes(layer)},
}
