"""Matrices that stock transformers holds as one, each as a module of its own.

A whole model is loaded as stock transformers has it, and taken apart afterwards; what it computes stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pennyweight.model.blocks import Block


class Joined(nn.Module):
    """Matrices on one input, their results one after the other; `parts` in order, by name. Its state is one matrix
    again, so that a model that somebody saves is one that stock transformers reads."""

    def __init__(self, parts: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.register_state_dict_post_hook(_as_one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def _as_one(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    parts = [state.pop(f"{prefix}{name}.weight") for name, _ in module.named_children()]
    state[f"{prefix}weight"] = torch.cat(parts)


def take_apart(root: Any, blocks: Iterable[Block], *, whole: bool = False) -> None:
    """Replace the matrices that `blocks` join below a decoder layer, or below a `whole` model. Where a block has been
    replaced there is nothing to do."""
    for block in blocks:
        rows = {weight.name: weight.shape[0] for weight in block.shape.weights() if weight.is_matrix}
        for module, parts in block.joins.items():
            if not rows.keys() >= set(parts):
                continue
            path = (block.prefix if whole else "") + module
            linear: Any = root.get_submodule(path)
            if isinstance(linear, nn.Linear):
                pieces = linear.weight.detach().split([rows[part] for part in parts])
                root.set_submodule(
                    path, Joined(dict(zip(parts, map(_linear, pieces, [linear] * len(parts)), strict=True)))
                )


def _linear(weight: torch.Tensor, like: nn.Linear) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=like.weight.requires_grad)
    return made.train(like.training)
