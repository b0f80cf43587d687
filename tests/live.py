"""What single slots of a live layer do: for tests that hold one slot against another."""

from __future__ import annotations

from typing import Any

import torch

from pennyweight.live.walk import Layer
from pennyweight.model.slots import Slot


def entering(layer: Layer, slot: Slot, hidden: torch.Tensor) -> torch.Tensor:
    """What a slot's block is given: the hidden states (rows, tokens, hidden_size), normed where the block is."""
    norm = layer.parts[slot].norm("norm")
    return hidden if norm is None else norm(hidden)


def computed(layer: Layer, slot: Slot, hidden: torch.Tensor) -> torch.Tensor:
    """What the block makes of it."""
    block: Any = layer.parts[slot].block
    x = entering(layer, slot, hidden)
    if slot.kind != "mixer":
        return block(x)
    return block(hidden_states=x, past_key_values=None, **layer.places(hidden.shape[1]))[0]


def gate(mlp: Any) -> Any:
    """The function of an MLP's gate, whatever transformers calls it there."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def after(layer: Layer, slot: Slot, hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream behind the slot."""
    post_norm, out = layer.parts[slot].norm("post_norm"), computed(layer, slot, hidden)
    return hidden + layer.parts[slot].place.residual * (out if post_norm is None else post_norm(out))
