"""What decoders share: layers of attention and an MLP under `model.layers`, named as Llama's are.

A family file says only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head, Noop, Norm, Norms, Shape, Sparsity
from pennyweight.model.slots import Kind, Slot

Config = Mapping[str, Any]

PATHS: dict[Kind, str] = {"mixer": "self_attn", "ffn": "mlp"}
WORDS: dict[str, str] = {"mixer": "attention", "ffn": "mlp"}
"""What per_layer_config calls the blocks in `skip`, `replace_with_linear` and `sparsity`."""

_ATTENTION = {
    **{f"{matrix}_proj": f"self_attn.{matrix}_proj.weight" for matrix in "qkvo"},
    **{f"{matrix}_bias": f"self_attn.{matrix}_proj.bias" for matrix in "qkvo"},
    "norm": "input_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "linear": "self_attn.linear_attn.weight",
    "magnitudes": "self_attn.magnitudes",
    "importance": "self_attn.importance",
    "inner_magnitudes": "self_attn.o_proj.magnitudes",
    "inner_importance": "self_attn.o_proj.importance",
}
_MLP = {
    **{f"{matrix}_proj": f"mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")},
    **{f"{matrix}_bias": f"mlp.{matrix}_proj.bias" for matrix in ("gate", "up", "down")},
    "norm": "post_attention_layernorm.weight",
    "linear": "mlp.linear_mlp.weight",
    "magnitudes": "mlp.magnitudes",
    "importance": "mlp.importance",
    "inner_magnitudes": "mlp.down_proj.magnitudes",
    "inner_importance": "mlp.down_proj.importance",
}
_NAMES: dict[Kind, Mapping[str, str]] = {"mixer": _ATTENTION, "ffn": _MLP}


def blocks(family: ModuleType, config: Config) -> dict[Slot, Block]:
    """Embedding, the layers' blocks, last norm and head. Raises ValueError for a config that lacks what it needs."""
    hidden, vocab = need(config, "hidden_size"), need(config, "vocab_size")
    tied = bool(config.get("tie_word_embeddings", False))
    found: list[Block] = [
        Block(
            Slot("embed"),
            Embedding(vocab_size=vocab, hidden_size=hidden, tied=tied),
            "model.embed_tokens.",
            "",
            {"embedding": "weight"},
        )
    ]
    norms: Norms = getattr(family, "NORMS", "before")
    for layer in range(need(config, "num_hidden_layers")):
        own = layer_config(config, layer)
        unknown = {*own.get("skip", ()), *own.get("replace_with_linear", ())} - set(WORDS.values())
        if unknown:
            raise ValueError(
                f"layer {layer}: per_layer_config names {sorted(unknown)}; known are {sorted(WORDS.values())}"
            )
        for kind, path in PATHS.items():
            shape: Any
            if WORDS[kind] in own.get("skip", ()):
                shape = Noop(hidden_size=hidden)
            elif WORDS[kind] in own.get("replace_with_linear", ()):
                shape = Dense(hidden_size=hidden, norms=norms)
            else:
                shape = replace(getattr(family, kind)(config, layer), norms=norms)
            names = {**_NAMES[kind], **getattr(family, "NAMES", {}).get(kind, {})}
            names.pop({"before": "post_norm", "after": "norm"}.get(norms, ""), None)  # what a live layer has not
            found.append(Block(Slot(kind, layer), shape, f"model.layers.{layer}.", path, names))
    found.append(Block(Slot("norm"), Norm(hidden_size=hidden), "model.norm.", "", {"norm": "weight"}))
    head = Head(vocab_size=vocab, hidden_size=hidden, tied=tied)
    found.append(Block(Slot("head"), head, "lm_head.", "", {"head": "weight"}))
    return {block.slot: block for block in found}


def layer_config(config: Config, layer: int) -> dict[str, Any]:
    """The config of one layer: the global keys, overridden by its entry of `per_layer_config`."""
    return {**config, **_overrides(config, layer)}


def _overrides(config: Config, layer: int) -> dict[str, Any]:
    """What `per_layer_config` says of one layer; its keys are numbers, in JSON as text."""
    said = config.get("per_layer_config") or {}
    return said.get(str(layer)) or said.get(layer) or {}


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
    own = _overrides(config, layer)
    if "sliding_window" in own:
        return own["sliding_window"]
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
        sparsity=_sparsity(own, "mixer"),
        **differs,
    )


def gated_mlp(config: Config, layer: int, **differs: Any) -> GatedMLP:
    own = layer_config(config, layer)
    return GatedMLP(
        hidden_size=need(config, "hidden_size"),
        intermediate_size=need(own, "intermediate_size"),
        activation=config.get("hidden_act", "silu"),
        sparsity=_sparsity(own, "ffn"),
        **differs,
    )


def _sparsity(own: Config, kind: Kind) -> Sparsity | None:
    """What a layer's config says of the channels that its block leaves out."""
    said = (own.get("sparsity") or {}).get(WORDS[kind])
    return None if said is None else Sparsity(**said)


def config_of(config: Config, shapes: Mapping[Slot, Shape]) -> dict[str, Any]:
    """The inverse of reading shapes: the config of a model that has these. Bits are not part of it.

    Layers that agree are written as global keys; what differs goes to transformers' `per_layer_config`. A config that
    needs no per-layer entry loads anywhere. Raises ValueError for shapes these families cannot express.
    """
    layers = range(config["num_hidden_layers"])
    own: list[dict[str, Any]] = []
    for layer in layers:
        here: dict[str, Shape] = {kind: shapes[Slot(kind, layer)] for kind in PATHS}
        entry: dict[str, Any] = {}
        for shape in here.values():
            if isinstance(shape, Attention):
                entry["num_key_value_heads"] = shape.num_kv_heads
                entry["sliding_window"] = shape.window
            if isinstance(shape, GatedMLP):
                entry["intermediate_size"] = shape.intermediate_size
        # A block that is gone has size 0: transformers without our patch, which would ignore `skip` and fill the
        # missing weights with noise, stops at the per-layer size instead.
        for kind, key in (("mixer", "num_key_value_heads"), ("ffn", "intermediate_size")):
            if isinstance(here[kind], Noop | Dense):
                entry[key] = 0
        for key, gone in (("skip", Noop), ("replace_with_linear", Dense)):
            words = [WORDS[kind] for kind, shape in here.items() if isinstance(shape, gone)]
            if words:
                entry[key] = words
        sparse = {WORDS[kind]: asdict(shape.sparsity) for kind, shape in here.items() if shape.sparsity is not None}
        if sparse:
            entry["sparsity"] = sparse
        own.append(entry)
    out = {key: value for key, value in config.items() if key != "per_layer_config"}
    for key in ("num_key_value_heads", "intermediate_size"):
        values = {entry[key] for entry in own if entry.get(key)}
        if len(values) == 1:
            out[key] = values.pop()
    if any(entry.get("sliding_window") is not None for entry in own) or any(window(config, i) for i in layers):
        # Our windows narrow the mask of full attention layers; the parent's own way of sliding is switched off.
        out["layer_types"] = ["full_attention"] * len(own)
        out["sliding_window"] = None
        if "use_sliding_window" in out:
            out["use_sliding_window"] = False
    if any("replace_with_linear" in entry for entry in own):
        out["replace_with_linear"] = []
    if any("sparsity" in entry for entry in own):
        out["sparsity"] = {}
    per_layer = _differing(own, out)
    if any(per_layer) and not any(entry.keys() & {"num_key_value_heads", "intermediate_size"} for entry in per_layer):
        # Nothing that transformers looks at while it builds a layer: it would leave our keys unread and compute
        # something else. A global size that no layer has makes it stop.
        out["intermediate_size"] = 0
        per_layer = _differing(own, out)
    if any(per_layer):
        out["per_layer_config"] = {str(layer): entry for layer, entry in enumerate(per_layer) if entry}
    return out


def _differing(own: list[dict[str, Any]], shared: Config) -> list[dict[str, Any]]:
    """Of every layer's keys those that are not the model's."""
    always = ("skip", "replace_with_linear")
    return [{k: v for k, v in entry.items() if k in always or v != shared.get(k)} for entry in own]
