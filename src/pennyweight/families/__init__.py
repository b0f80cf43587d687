"""Families of models: what a config.json says of a model's slots, where each is found, and how a child is written down.

A family is one file of facts:

    MODEL_TYPES        values of config.json's `model_type`
    MODULE, PREFIX     transformers' modeling module and the prefix of its classes; MODULE None: planned, not yet built
    PICO               what the config of a small model for tests says beside its sizes
    mixer, ffn         the shape of one layer's block, from (config, layer)
    NORMS              where blocks are normed, if not before (model/shapes.py)
    NAMES              names of tensors that are not Llama's, by kind of slot and weight

The rest, which all of them share so far, is in `_decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pennyweight import kinds
from pennyweight.families import _decoder
from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot

Config = Mapping[str, Any]
config_of = _decoder.config_of


def of(model_type: str) -> ModuleType:
    """The family whose MODEL_TYPES holds `model_type` (the key of config.json). Raises ValueError if none does."""
    known = {kind: name for name in kinds.names("families") for kind in kinds.load("families", name).MODEL_TYPES}
    if model_type not in known:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are: {', '.join(sorted(known))}. "
            "docs/adding.md shows how to add a family in one file"
        )
    return kinds.load("families", known[model_type])


def blocks(config: Config) -> dict[Slot, Block]:
    """Every slot of a model, in order, from its config alone. Raises ValueError for a family that is not supported and
    a config that it cannot read."""
    return _decoder.blocks(of(config["model_type"]), config)


def shapes(config: Config) -> dict[Slot, Shape]:
    """What stands in every slot."""
    return {slot: block.shape for slot, block in blocks(config).items()}
