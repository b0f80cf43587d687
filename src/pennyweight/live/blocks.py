"""Modules that stand in for a decoder layer's attention or MLP, and the mask of a per-layer window.

They keep the calling convention of transformers' decoder layers (attention returns a pair, MLP a tensor), so an edited
layer runs inside an ordinary transformers model, cache and generation included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Dense, Noop


def _keep_length(past_key_values: Any, hidden_states: torch.Tensor, layer: int | None) -> None:
    """Tell the cache that these tokens passed: transformers asks layer 0 how long the sequence is."""
    if past_key_values is not None:
        batch, tokens, _ = hidden_states.shape
        empty = hidden_states.new_zeros(batch, 1, tokens, 1)
        past_key_values.update(empty, empty, layer)


class SkippedAttention(nn.Module):
    """Attention taken out: adds nothing to the residual stream."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer_idx = layer

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        _keep_length(past_key_values, hidden_states, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class LinearAttention(nn.Module):
    """Attention replaced by one matrix: every token attends to itself alone. `linear_attn` is the name DeciLM uses."""

    def __init__(self, hidden_size: int, layer: int | None) -> None:
        super().__init__()
        self.layer_idx = layer
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        _keep_length(past_key_values, hidden_states, self.layer_idx)
        return self.linear_attn(hidden_states), None


class SkippedMLP(nn.Module):
    """MLP taken out: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class LinearMLP(nn.Module):
    """MLP replaced by one matrix. `linear_mlp` is the name DeciLM uses."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


def replace_block(parts: Parts, shape: Noop | Dense) -> Parts:
    """Put one matrix, yet to be set, where a slot's block stands, or nothing and no norm."""
    mixes = parts.slot.kind == "mixer"
    if isinstance(shape, Dense):
        made = LinearAttention(shape.hidden_size, parts.slot.layer) if mixes else LinearMLP(shape.hidden_size)
    else:
        parts.drop_norms()
        made = SkippedAttention(parts.slot.layer) if mixes else SkippedMLP()
    parts.replace_block(made)
    return parts.having(shape)


def set_window(attention: nn.Module, window: int) -> None:
    """Let queries of this attention see only keys with 0 <= i - j < window, the current token included.

    The narrower of two windows counts. Works by narrowing the mask the layer is given, so the KV cache of transformers
    keeps what it would; a runtime that keeps only the last `window` keys computes the same.
    """
    narrowed = getattr(attention, "window", None)
    attention.window = window if narrowed is None else min(narrowed, window)  # type: ignore[assignment]
    if narrowed is not None:
        return
    attention.register_forward_pre_hook(_narrow_mask, with_kwargs=True)


def _narrow_mask(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values")
    tokens, past, first = hidden.shape[1], 0, 0
    mask = kwargs.get("attention_mask")
    keys = tokens
    if cache is not None:  # one that slides keeps the last keys only, and a static one has more than it holds
        past = cache.get_seq_length(attention.layer_idx)
        keys, first = cache.get_mask_sizes(tokens, attention.layer_idx)
    if mask is not None:  # made for another layer, perhaps, whose cache keeps more
        mask = mask[..., max(0, mask.shape[-1] - keys) :]
    query = torch.arange(past, past + tokens, device=hidden.device).unsqueeze(1)
    key = torch.arange(first, first + keys, device=hidden.device).unsqueeze(0)
    seen = (key <= query) & (query - key < attention.window)
    if mask is None:
        mask = seen[None, None]
    elif mask.dtype == torch.bool:
        mask = mask & seen
    else:
        mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return args, {**kwargs, "attention_mask": mask}
