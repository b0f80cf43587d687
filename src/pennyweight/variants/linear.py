"""A block replaced by one hidden x hidden matrix on its normed input.

product: Puzzle's start without training (arXiv:2411.19146): down @ up for an FFN, gate ignored; o @ v for attention,
every token attending to itself. fitted: ours: the matrix that maps inputs to the block's outputs best in least
squares over the calibration text, from moments that the one pass gathers anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Attention, GatedMLP, Shape
from pennyweight.model.shapes import Dense as Linear
from pennyweight.variants._common import Stats, fitted_linear, with_shape

STATS = ("input_moment", "cross_moment")


@dataclass(frozen=True)
class Spec:
    """Where the matrix comes from."""

    init: Literal["product", "fitted"] = "fitted"

    def __str__(self) -> str:
        return f"linear {self.init}"


def options(shape: Shape) -> list[Spec]:
    return [Spec("fitted"), Spec("product")] if isinstance(shape, Attention | GatedMLP) else []


def reshape(shape: Shape, spec: Spec) -> Linear:
    if not isinstance(shape, Attention | GatedMLP):
        raise ValueError(f"{shape} cannot become linear")
    return Linear(hidden_size=shape.hidden_size)


def apply(parts: Parts, spec: Spec, stats: Stats) -> Parts:
    """Put LinearAttention or LinearMLP in the block's place; biases of the block are dropped."""
    import torch

    from pennyweight.live.blocks import LinearAttention, LinearMLP

    block, shape = parts.block, parts.shape
    dtype = next(block.parameters()).dtype
    matrix = fitted_linear(stats) if spec.init == "fitted" else _product(block, shape)
    if isinstance(shape, Attention):
        module: Any = LinearAttention(shape.hidden_size, block.layer_idx)
        module.linear_attn.weight = torch.nn.Parameter(matrix.to(dtype))
    else:
        module = LinearMLP(shape.hidden_size)
        module.linear_mlp.weight = torch.nn.Parameter(matrix.to(dtype))
    parts.replace_block(module)
    return with_shape(parts, reshape(shape, spec))


def _product(block: Any, shape: Shape) -> Any:
    if isinstance(shape, GatedMLP):
        return block.down_proj.weight.detach().float() @ block.up_proj.weight.detach().float()
    assert isinstance(shape, Attention)
    value = block.v_proj.weight.detach().float().view(shape.num_kv_heads, shape.head_dim, -1)
    value = value.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=0).flatten(0, 1)
    return block.o_proj.weight.detach().float() @ value
