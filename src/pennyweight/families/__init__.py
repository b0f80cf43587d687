"""Families of models: what a config.json says of a model's slots, where each is found, and how a child is written down.

A family is one file of facts:

    MODEL_TYPES        values of config.json's `model_type`
    MODULE, PREFIX     transformers' modeling module and the prefix of its classes; MODULE None: planned, not yet built
    KEYS               keys of config.json that it reads beside those of all families (`_decoder.KEYS`)
    PICO               what the config of a small model for tests says beside its sizes
    mixer, ffn         the shape of one layer's block, from (resolved config, layer)
    NORMS              where blocks are normed, if not before (model/shapes.py)
    NORM_OFFSET        what transformers adds to the weights of norms as they are on disk; 0 if it says nothing
    NAMES              names of tensors that are not Llama's, by kind of slot and weight
    JOINS              modules that hold several matrices on disk, by kind of slot: the names of these in order
    PARTIAL            True if a share of a head's channels may turn with the position
    embed, head        what differs of the embedding's and the head's shape, from the resolved config
    residual           what blocks are multiplied by before they join the residual stream, from the resolved config

The rest, which all of them share so far, is in `_decoder`. No key has a default here: what a file leaves open is what
transformers' own config class makes of it (`resolved`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pennyweight import kinds
from pennyweight.families import _decoder
from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot

Config = Mapping[str, Any]
MOST_POSITIONS = _decoder.MOST_POSITIONS
BY_LAYER = _decoder.BY_LAYER


class Resolved(dict[str, Any]):
    """A config.json as families read it: what the file says, and for a key of theirs that it leaves open what
    transformers makes of it, defaults and rules. transformers is asked when somebody looks at such a key: its config
    classes bring torch along, which planning from a file that says everything does without.

    `said`: what the file says, which children keep; `where`: what errors call it. Looking at a key raises ValueError
    for what transformers refuses.
    """

    def __init__(self, said: Config, where: str = "config.json") -> None:
        self.said, self.where = said, where
        self.keys_read = tuple(dict.fromkeys((*_decoder.KEYS, *of(said["model_type"]).KEYS)))
        left_open = _decoder.left_open(said, self.keys_read)
        super().__init__((key, value) for key, value in said.items() if key not in left_open)
        if (layers := said.get("per_layer_config")) is not None:
            # From ten layers on transformers fills their numbers with zeros.
            self["per_layer_config"] = {str(int(layer)): own for layer, own in layers.items()}
            if len(self["per_layer_config"]) != len(layers):
                raise ValueError(f"{where}: per_layer_config names a layer twice")

    def __missing__(self, key: str) -> Any:
        if key not in self.keys_read:
            raise KeyError(key)
        made = transformers_config(self).to_dict()
        # In one order: what is written into a child's config.json has the same bytes every time.
        self.update({each: made.get(each) for each in self.keys_read if each not in self.keys()})
        return self[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys_read else super().get(key, default)


def of(model_type: str) -> ModuleType:
    """The family whose MODEL_TYPES holds `model_type` (the key of config.json). Raises ValueError if none does."""
    known = {kind: name for name in kinds.names("families") for kind in kinds.load("families", name).MODEL_TYPES}
    if model_type not in known:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are: {', '.join(sorted(known))}. "
            "docs/adding.md shows how to add a family in one file"
        )
    return kinds.load("families", known[model_type])


def resolved(config: Config, where: str = "config.json") -> Resolved:
    """A config as families read it. Raises ValueError for a family that is not supported."""
    return config if isinstance(config, Resolved) else Resolved(config, where)


def transformers_config(config: Resolved) -> Any:
    """transformers' config object, as it makes one of a config.json. It is given only the keys that its class, or the
    layers we build, look at: others could replace any of its attributes.

    Raises ValueError for what transformers refuses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    said = config.said
    made = CONFIG_MAPPING[said["model_type"]]
    known = {field.name for field in dataclasses.fields(made)}
    given = {key: value for key, value in said.items() if key in known}
    given |= {key: said[key] for key in _decoder.BESIDE.union(config.keys_read) - known if said.get(key) is not None}
    if "sliding_window" in said.keys() - known:
        given["sliding_window"] = None  # a stray one would still shorten transformers' KV cache
    try:
        return made.from_dict(copy.deepcopy(given))
    except Exception as err:  # whatever other people's validation raises
        why = " ".join(f"{type(err).__name__}: {err}".split())
        raise ValueError(f"{config.where}: transformers makes no config of it: {why[:300]}") from err


def config_of(config: Config, shapes: Mapping[Slot, Shape]) -> dict[str, Any]:
    """The config of a model that has these shapes, made of its parent's: what the parent's file says plus what
    changed. Raises ValueError for shapes that the family cannot express."""
    found = resolved(config)
    return _decoder.config_of(of(found["model_type"]), found, found.said, shapes)


def blocks(config: Config) -> dict[Slot, Block]:
    """Every slot of a model, in order, from its config alone. Raises ValueError for a family that is not supported and
    a config that it cannot read."""
    return _decoder.blocks(of(config["model_type"]), resolved(config))


def tied(config: Config) -> tuple[str, str]:
    """The names of the head and of the embedding that it may be tied to."""
    embedding, _, head = _decoder.ends(of(config["model_type"]), resolved(config))
    return head.tensor("head"), embedding.tensor("embedding")


def joined(config: Config) -> dict[str, tuple[str, ...]]:
    """Modules that hold several matrices on disk, one's rows under another's, and the modules that these are."""
    return _decoder.joined(of(config["model_type"]), resolved(config))


def shapes(config: Config) -> dict[Slot, Shape]:
    """What stands in every slot."""
    return {slot: block.shape for slot, block in blocks(config).items()}
