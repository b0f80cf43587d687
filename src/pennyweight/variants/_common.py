"""Helpers of the axes that edit nn.Linear modules."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pennyweight.live.parts import Parts

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats as Stats
else:
    Stats = Any


def set_linear(linear: Any, weight: Any, bias: Any = None) -> None:
    """Give an nn.Linear (or nn.Embedding) other weights, keeping dtype and whether it trains."""
    import torch

    trains = linear.weight.requires_grad
    linear.weight = torch.nn.Parameter(weight.to(linear.weight.dtype).contiguous(), requires_grad=trains)
    if isinstance(linear, torch.nn.Linear):
        linear.out_features, linear.in_features = weight.shape
    if getattr(linear, "bias", None) is not None:
        linear.bias = torch.nn.Parameter(bias.to(linear.bias.dtype).contiguous(), requires_grad=trains)


def fitted_linear(stats: Stats, *, damping: float = 1e-4) -> Any:
    """The matrix A (hidden, hidden) that best maps the slot's normed input x to its output y in least squares.

    A = E[y x^T] (E[x x^T] + damping * mean diagonal)^-1, in float64. Reads input_moment and cross_moment.
    """
    import torch

    moment, cross = stats["input_moment"].double(), stats["cross_moment"].double()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(damped, cross.T).T.float()


def with_shape(parts: Parts, shape: Any) -> Parts:
    """The same modules under their new shape."""
    return dataclasses.replace(parts, shape=shape)
