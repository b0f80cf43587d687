"""What decoders share: layers of attention and an MLP under `model.layers`, named as Llama's are.

A family file says only what differs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Attention, Dense, Embedding, GatedMLP, Head, Noop, Norm, Norms, Shape, Sparsity
from pennyweight.model.slots import Kind, Slot

Config = Mapping[str, Any]

KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)
"""What every family's config has; each names more in its own KEYS."""

BESIDE = frozenset(
    {
        "head_dim",
        "layer_types",
        "sliding_window",
        "per_layer_config",
        "replace_with_linear",
        "sparsity",
        "quantization_config",
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
)
"""Keys that mean something to transformers, or to layers that differ, though a family's config class has no such field:
older names among them."""

MOST_POSITIONS = 2**24
"""Of a context. No sequence is longer, so a window that is not shorter is none."""

BY_LAYER = ("layer_types", "no_rope_layers", "per_layer_config")
"""Keys that say something of every layer by its number."""

KINDS_OF_LAYER = {"full_attention", "sliding_attention"}

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
    hidden = need(config, "hidden_size")
    embedding, norm, head = ends(family, config)
    _check_rotary(family, config)
    found = [embedding]
    norms: Norms = getattr(family, "NORMS", "before")
    facts = {
        "norm_offset": getattr(family, "NORM_OFFSET", 0.0),
        "residual": getattr(family, "residual", lambda config: 1.0)(config),
    }
    for layer in range(need(config, "num_hidden_layers")):
        gone, linear = (set(at(config, layer, key) or ()) for key in ("skip", "replace_with_linear"))
        unknown = (gone | linear) - set(WORDS.values())
        if unknown:
            raise ValueError(
                f"{where(config)}: layer {layer}: per_layer_config names {sorted(unknown)}; known are "
                f"{sorted(WORDS.values())}"
            )
        for kind, path in PATHS.items():
            shape: Any
            if WORDS[kind] in gone:
                shape = Noop(hidden_size=hidden)
            elif WORDS[kind] in linear:
                shape = Dense(hidden_size=hidden, norms=norms)
            else:
                shape = replace(getattr(family, kind)(config, layer), norms=norms)
            names = {**_NAMES[kind], **getattr(family, "NAMES", {}).get(kind, {})}
            joins = getattr(family, "JOINS", {}).get(kind, {})
            names |= {part: f"{module}.{part}.weight" for module, parts in joins.items() for part in parts}
            names.pop({"before": "post_norm", "after": "norm"}.get(norms, ""), None)  # what a live layer has not
            found.append(Block(Slot(kind, layer), shape, f"model.layers.{layer}.", path, names, **facts, joins=joins))
    found += [norm, head]
    return {block.slot: block for block in found}


def ends(family: ModuleType, config: Config) -> tuple[Block, Block, Block]:
    """Embedding, last norm and head."""
    hidden, vocab, tied = need(config, "hidden_size"), need(config, "vocab_size"), bool(config["tie_word_embeddings"])
    own = {kind: getattr(family, kind, lambda config: {})(config) for kind in ("embed", "head")}
    embedding = Embedding(vocab_size=vocab, hidden_size=hidden, tied=tied, **own["embed"])
    head = Head(vocab_size=vocab, hidden_size=hidden, tied=tied, **own["head"])
    norm, offset = Norm(hidden_size=hidden), getattr(family, "NORM_OFFSET", 0.0)
    return (
        Block(Slot("embed"), embedding, "model.embed_tokens.", "", {"embedding": "weight"}),
        Block(Slot("norm"), norm, "model.norm.", "", {"norm": "weight"}, norm_offset=offset),
        Block(Slot("head"), head, "lm_head.", "", {"head": "weight"}),
    )


def joined(family: ModuleType, config: Config) -> dict[str, tuple[str, ...]]:
    """Modules that hold several matrices on disk, and how these are called everywhere else, in order."""
    return {
        f"model.layers.{layer}.{module}": tuple(f"model.layers.{layer}.{module}.{part}" for part in parts)
        for layer in range(need(config, "num_hidden_layers"))
        for joins in getattr(family, "JOINS", {}).values()
        for module, parts in joins.items()
    }


def _check_rotary(family: ModuleType, config: Config) -> None:
    """Raises ValueError for a share of channels to turn that transformers' layers of the family would not look at."""
    said = [config, *(config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))]
    shares = {part.get("partial_rotary_factor") for part in said} - {None, 1}
    if shares and not getattr(family, "PARTIAL", False):
        raise ValueError(
            f"{where(config)}: a partial_rotary_factor of {shares.pop()}; all channels of a "
            f"{config.get('model_type')} model turn with the position"
        )


def left_open(said: Config, keys: Collection[str]) -> set[str]:
    """Of these keys those that a file does not say, or not in the words in which transformers would leave them."""
    found = {key for key in keys if said.get(key) is None and (key != "sliding_window" or key not in said)}
    if "use_sliding_window" in keys and said.get("sliding_window") is not None and not said.get("use_sliding_window"):
        found.add("sliding_window")
    kinds = said.get("layer_types") or ()
    if "layer_types" in keys and (len(kinds) != said.get("num_hidden_layers") or not KINDS_OF_LAYER.issuperset(kinds)):
        found.add("layer_types")
    return found


def where(config: Config) -> str:
    """What errors call it."""
    return getattr(config, "where", "config.json")


def own(config: Config, layer: int) -> dict[str, Any]:
    """What `per_layer_config` says of one layer; its keys are numbers, as text."""
    return (config.get("per_layer_config") or {}).get(str(layer), {})


def at(config: Config, layer: int, key: str) -> Any:
    """A key as it is for one layer."""
    said = own(config, layer)
    return said[key] if key in said else config.get(key)


def need(config: Config, key: str, layer: int | None = None) -> int:
    """An integer of a model's or a layer's config. Raises ValueError if it is missing or not positive."""
    value = config.get(key) if layer is None else at(config, layer, key)
    if not isinstance(value, int) or value < 1:
        whose = "" if layer is None else f" of layer {layer}"
        raise ValueError(
            f"{where(config)}: {key}{whose} is {value!r}; a {config.get('model_type')} model needs a positive integer"
        )
    return value


def sliding(config: Config, layer: int) -> int | None:
    """The window of a family whose layers slide where layer_types says so. Raises ValueError for other kinds."""
    if config["sliding_window"] is None and "layer_types" not in config:
        return None
    kind = config["layer_types"][layer]
    if kind == "sliding_attention" and config["sliding_window"] is None:
        raise ValueError(f"{where(config)}: layer_types lets layer {layer} slide, but there is no window for it")
    if kind not in KINDS_OF_LAYER:
        raise ValueError(
            f"{where(config)}: layer_types says {kind!r} of layer {layer}; "
            f"{' and '.join(sorted(KINDS_OF_LAYER))} are run"
        )
    return config["sliding_window"] if kind == "sliding_attention" else None


def refuse_both_ways(config: Config) -> None:
    """Raises ValueError for attention that also looks at what comes after a token: nothing could be written with it."""
    if config["use_bidirectional_attention"]:
        raise ValueError(
            f"{where(config)}: use_bidirectional_attention is on; attention to earlier tokens alone is run"
        )


def attention(config: Config, layer: int, *, window: int | None = None, **differs: Any) -> Attention:
    """`window`: the family's own, which an override replaces. Raises ValueError for heads that do not fit."""
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    kv_heads = need(config, "num_key_value_heads", layer)
    width = config.get("head_dim") or hidden // heads  # as transformers' layers have it
    if heads % kv_heads or width % 2 or not width:
        raise ValueError(
            f"{where(config)}: layer {layer} has {heads} heads of {width} channels on {kv_heads} key-value heads; "
            "these divide the heads, and channels are even"
        )
    window = own(config, layer).get("sliding_window", window)
    return Attention(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        window=None if window is None or window >= MOST_POSITIONS else window,
        sparsity=_sparsity(config, layer, "mixer"),
        **differs,
    )


def gated_mlp(config: Config, layer: int, *, act: str = "hidden_act", **differs: Any) -> GatedMLP:
    """`act`: the key that names the gate's function."""
    return GatedMLP(
        hidden_size=need(config, "hidden_size"),
        intermediate_size=need(config, "intermediate_size", layer),
        activation=config[act],
        sparsity=_sparsity(config, layer, "ffn"),
        **differs,
    )


def _sparsity(config: Config, layer: int, kind: Kind) -> Sparsity | None:
    """What a layer's config says of the channels that its block leaves out."""
    said = (at(config, layer, "sparsity") or {}).get(WORDS[kind])
    return None if said is None else Sparsity(**said)


def config_of(family: ModuleType, config: Config, said: Config, shapes: Mapping[Slot, Shape]) -> dict[str, Any]:
    """The inverse of reading shapes: the config of a model that has these, in the words of the parent's file, `said`,
    where nothing changed. Bits are not part of it.

    Layers that agree are written as global keys; what differs goes to transformers' `per_layer_config`. A config that
    needs no per-layer entry loads anywhere. Raises ValueError for shapes these families cannot express.
    """
    layers = range(config["num_hidden_layers"])
    entries: list[dict[str, Any]] = []
    for layer in layers:
        here: dict[str, Shape] = {kind: shapes[Slot(kind, layer)] for kind in PATHS}
        entry: dict[str, Any] = {}
        for shape in here.values():
            if isinstance(shape, Attention):
                entry["num_key_value_heads"] = shape.num_kv_heads
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
        entries.append(entry)
    out = {key: value for key, value in said.items() if key != "per_layer_config"}
    shared = {key: config[key] for key in ("num_key_value_heads", "intermediate_size")}
    for key, before in shared.items():
        values = {entry[key] for entry in entries if entry.get(key)}
        if len(values) == 1 and (value := values.pop()) != before:
            out[key] = value
    mixers = [shapes[Slot("mixer", layer)] for layer in layers]
    usual = _windows(family, config)
    wanted = {i: shape.window for i, shape in enumerate(mixers) if isinstance(shape, Attention)}
    changed = {layer: window for layer, window in wanted.items() if window != usual[layer]}
    if changed and not any(usual):  # our windows narrow the mask of full attention layers
        out["layer_types"] = ["full_attention"] * len(entries)
        out["sliding_window"] = None
        if "use_sliding_window" in out:
            out["use_sliding_window"] = False
    elif config.get("sliding_window") in changed.values():
        # transformers forgets what a layer says in the words of the whole model. So these become words that no layer
        # has, a mask a little wider, which every layer's own window narrows.
        out["sliding_window"], changed = config["sliding_window"] + 1, wanted
    for layer, window in changed.items():
        entries[layer]["sliding_window"] = window
    if any("replace_with_linear" in entry for entry in entries):
        out["replace_with_linear"] = []
    if any("sparsity" in entry for entry in entries):
        out["sparsity"] = {}
    per_layer = _differing(entries, {**shared, **out})
    if any(per_layer) and not any(entry.keys() & {"num_key_value_heads", "intermediate_size"} for entry in per_layer):
        # Nothing that transformers looks at while it builds a layer: it would leave our keys unread and compute
        # something else. A global size that no layer has makes it stop.
        out["intermediate_size"] = 0
        per_layer = _differing(entries, {**shared, **out})
    if any(per_layer):
        out["per_layer_config"] = {str(layer): entry for layer, entry in enumerate(per_layer) if entry}
    return out


def _windows(family: ModuleType, config: Config) -> list[int | None]:
    """The windows of the layers where none has one of its own."""
    plain: Any = copy.copy(config)
    plain.pop("per_layer_config", None)
    return [family.mixer(plain, layer).window for layer in range(config["num_hidden_layers"])]


def _differing(own: list[dict[str, Any]], shared: Config) -> list[dict[str, Any]]:
    """Of every layer's keys those that are not the model's."""
    always = ("skip", "replace_with_linear", "sliding_window")
    return [{k: v for k, v in entry.items() if k in always or v != shared.get(k)} for entry in own]
