"""What the pre-norm decoders share: reading shapes from a config and finding the live modules of a layer.

A family file says only what differs. Layers are `model.layers.<i>` with `self_attn`, `mlp` and the two norms, which
holds for every family that transformers derives from Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pennyweight.model.shapes import Attention, Embedding, GatedMLP, Head, MoE, Noop, Norm, Shape, Sparsity
from pennyweight.model.shapes import Dense as Linear
from pennyweight.model.slots import Kind, Slot

Config = Mapping[str, Any]

NORM = {"mixer": "input_layernorm", "ffn": "post_attention_layernorm"}
BLOCK = {"mixer": "self_attn", "ffn": "mlp"}
SKIPPED = {"mixer": "attention", "ffn": "mlp"}  # words of per_layer_config's `skip` and `replace_with_linear`
INNER = {"mixer": "o_proj", "ffn": "down_proj"}  # the matrix that reads what the block has computed


def layer_config(config: Config, layer: int) -> dict[str, Any]:
    """The config of one layer: the global keys, overridden by its entry of `per_layer_config`."""
    overrides = {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}
    return {**config, **overrides.get(layer, {})}


def need(config: Config, key: str) -> int:
    """An integer key of config.json that has no default. Raises ValueError if it is missing or not positive."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"config.json: {key} is {value!r}; a {config.get('model_type')} model needs a positive integer"
        )
    return value


def head_dim(config: Config) -> int:
    """head_dim where the config names it, else hidden_size / num_attention_heads."""
    return config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")


def window(config: Config, layer: int) -> int | None:
    """The layer's sliding window: an override, or sliding_window where layer_types says the layer slides."""
    overridden = {int(k): v for k, v in (config.get("per_layer_config") or {}).items()}.get(layer, {})
    if "sliding_window" in overridden:
        return overridden["sliding_window"]
    if config.get("use_sliding_window") is False:
        return None
    types = config.get("layer_types")
    if types is not None:
        return config.get("sliding_window") if types[layer] == "sliding_attention" else None
    if config.get("use_sliding_window"):  # Qwen2: the layers from max_window_layers on
        return config.get("sliding_window") if layer >= config.get("max_window_layers", 0) else None
    return None


def attention(config: Config, layer: int, **differs: Any) -> Attention:
    own = layer_config(config, layer)
    heads = need(own, "num_attention_heads")
    return Attention(
        hidden_size=need(config, "hidden_size"),
        num_heads=heads,
        num_kv_heads=own.get("num_key_value_heads") or heads,
        head_dim=head_dim(own),
        window=window(config, layer),
        sparsity=sparsity(own, "mixer"),
        **differs,
    )


def sparsity(own: Config, kind: str) -> Sparsity | None:
    """What a layer's config says of the channels that its block leaves out."""
    said = (own.get("sparsity") or {}).get(SKIPPED[kind])
    return None if said is None else Sparsity(**said)


def decoder(config: Config, mixer: Any, ffn: Any) -> dict[Slot, Shape]:
    """Slots and shapes of a decoder. `mixer` and `ffn` give a layer's shape from (config, layer)."""
    hidden, vocab = need(config, "hidden_size"), need(config, "vocab_size")
    tied = bool(config.get("tie_word_embeddings", False))
    shapes: dict[Slot, Shape] = {Slot("embed"): Embedding(vocab_size=vocab, hidden_size=hidden, tied=tied)}
    for layer in range(need(config, "num_hidden_layers")):
        own = layer_config(config, layer)
        blocks: tuple[tuple[Kind, Any], ...] = (("mixer", mixer), ("ffn", ffn))
        for kind, make in blocks:
            if SKIPPED[kind] in own.get("skip", ()):
                shapes[Slot(kind, layer)] = Noop(hidden_size=hidden)
            elif SKIPPED[kind] in own.get("replace_with_linear", ()):
                shapes[Slot(kind, layer)] = Linear(hidden_size=hidden)
            else:
                shapes[Slot(kind, layer)] = make(config, layer)
    shapes[Slot("norm")] = Norm(hidden_size=hidden)
    shapes[Slot("head")] = Head(vocab_size=vocab, hidden_size=hidden, tied=tied)
    return shapes


def gated_mlp(config: Config, layer: int, **differs: Any) -> GatedMLP:
    own = layer_config(config, layer)
    return GatedMLP(
        hidden_size=need(config, "hidden_size"),
        intermediate_size=need(own, "intermediate_size"),
        sparsity=sparsity(own, "ffn"),
        **differs,
    )


def tensor_names(slot: Slot, shape: Shape) -> dict[str, str]:
    """Checkpoint name of each of the shape's weights, e.g. q_proj -> model.layers.3.self_attn.q_proj.weight."""
    if slot.kind == "embed":
        return {"embedding": "model.embed_tokens.weight"}
    if slot.kind == "norm":
        return {"norm": "model.norm.weight"}
    if slot.kind == "head":
        return {weight.name: "lm_head.weight" for weight in shape.weights()}  # none if tied
    layer = f"model.layers.{slot.layer}"
    block = f"{layer}.{BLOCK[slot.kind]}"
    if isinstance(shape, MoE):
        raise ValueError(f"{slot}: mixture-of-experts layers can be planned, not yet built")
    names = {}
    for weight in shape.weights():
        if weight.name == "norm":
            names["norm"] = f"{layer}.{NORM[slot.kind]}.weight"
        elif weight.name == "linear":
            names["linear"] = f"{block}.linear_attn.weight" if slot.kind == "mixer" else f"{block}.linear_mlp.weight"
        elif weight.name.endswith("_bias"):
            names[weight.name] = f"{block}.{weight.name.removesuffix('_bias')}_proj.bias"
        elif weight.name in ("magnitudes", "importance"):
            names[weight.name] = f"{block}.{weight.name}"
        elif weight.name in ("inner_magnitudes", "inner_importance"):
            names[weight.name] = f"{block}.{INNER[slot.kind]}.{weight.name.removeprefix('inner_')}"
        else:
            names[weight.name] = f"{block}.{weight.name}.weight"
    return names


def with_shapes(config: Config, shapes: Mapping[Slot, Shape]) -> dict[str, Any]:
    """The inverse of reading shapes: the config of a model that has these. Bits are not part of it.

    Layers that agree are written as global keys; what differs goes to transformers' `per_layer_config`. A config that
    needs no per-layer entry loads anywhere. Raises ValueError for shapes these families cannot express.
    """
    layers = range(config["num_hidden_layers"])
    own: list[dict[str, Any]] = []
    for layer in layers:
        mixer, ffn = shapes[Slot("mixer", layer)], shapes[Slot("ffn", layer)]
        entry: dict[str, Any] = {}
        if isinstance(mixer, Attention):
            entry["num_key_value_heads"] = mixer.num_kv_heads
            entry["sliding_window"] = mixer.window
        if isinstance(ffn, GatedMLP):
            entry["intermediate_size"] = ffn.intermediate_size
        # A block that is gone has size 0: transformers without our patch, which would ignore `skip` and fill the
        # missing weights with noise, stops at the per-layer size instead.
        if isinstance(mixer, Noop | Linear):
            entry["num_key_value_heads"] = 0
        if isinstance(ffn, Noop | Linear):
            entry["intermediate_size"] = 0
        sparse = {
            SKIPPED[kind]: asdict(shape.sparsity)
            for kind, shape in (("mixer", mixer), ("ffn", ffn))
            if isinstance(shape, Attention | GatedMLP) and shape.sparsity is not None
        }
        if sparse:
            entry["sparsity"] = sparse
        for key, kind in (("skip", Noop), ("replace_with_linear", Linear)):
            words = [SKIPPED[name] for name, shape in (("mixer", mixer), ("ffn", ffn)) if isinstance(shape, kind)]
            if words:
                entry[key] = words
        own.append(entry)
    out = {key: value for key, value in config.items() if key != "per_layer_config"}
    parent_windows = [window(config, layer) for layer in layers]
    windows = [entry.get("sliding_window") for entry in own if "sliding_window" in entry]
    for key in ("num_key_value_heads", "intermediate_size"):
        values = {entry[key] for entry in own if entry.get(key)}
        if len(values) == 1:
            out[key] = values.pop()
    if any(w is not None for w in windows) or any(w is not None for w in parent_windows):
        # Our windows narrow the mask of full attention layers; the parent's own way of sliding is switched off.
        out["layer_types"] = ["full_attention"] * len(own)
        out["sliding_window"] = None
        if "use_sliding_window" in out:
            out["use_sliding_window"] = False
    if any("replace_with_linear" in entry for entry in own):
        out["replace_with_linear"] = []
    if any("sparsity" in entry for entry in own):
        out["sparsity"] = {}
    per_layer: dict[str, dict[str, Any]] = {}
    for layer, entry in enumerate(own):
        differs = {
            key: value
            for key, value in entry.items()
            if key in ("skip", "replace_with_linear") or value != out.get(key)
        }
        if differs:
            per_layer[str(layer)] = differs
    if per_layer:
        out["per_layer_config"] = per_layer
    return out
