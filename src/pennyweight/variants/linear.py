"""A block replaced by one hidden x hidden matrix on its normed input.

product: Puzzle's start without training (arXiv:2411.19146): down @ up for an FFN, gate ignored; o @ v for attention,
every token attending to itself. fitted: ours: the matrix that maps inputs to the block's outputs best in least
squares over the calibration text, from moments that the one pass gathers anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pennyweight.live.least_squares import solve
from pennyweight.model.shapes import Attention, Dense, GatedMLP, Shape

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 1
STATS = ("input_moment", "cross_moment")
TRAINS = True


@dataclass(frozen=True)
class Spec:
    """Where the matrix comes from."""

    init: Literal["product", "fitted"] = "fitted"

    def __str__(self) -> str:
        return f"linear {self.init}"


def options(shape: Shape) -> list[Spec]:
    return [Spec("fitted"), Spec("product")] if isinstance(shape, Attention | GatedMLP) else []


def reshape(shape: Shape, spec: Spec) -> Dense:
    if not isinstance(shape, Attention | GatedMLP):
        raise ValueError(f"{shape} cannot become linear")
    return Dense(hidden_size=shape.hidden_size, norms=shape.norms)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Put one matrix in the block's place; biases of the block are dropped."""
    import torch

    from pennyweight.live.blocks import replace_block

    dtype = parts.matrix(parts.shape.readers("inner")[0]).weight.dtype
    matrix = _fitted(stats) if spec.init == "fitted" else _product(parts)
    parts = replace_block(parts, reshape(parts.shape, spec))
    parts.matrix("linear").weight = torch.nn.Parameter(matrix.to(dtype))
    return parts


def _fitted(stats: SlotStats) -> Any:
    """The matrix (hidden, hidden) that best maps the slot's normed input to its output in least squares."""
    return solve(stats["cross_moment"], stats["input_moment"])


def _product(parts: Parts) -> Any:
    def weight(name: str) -> Any:
        return parts.matrix(name).weight.detach().float()

    shape = parts.shape
    if isinstance(shape, GatedMLP):
        return weight("down_proj") @ weight("up_proj")
    assert isinstance(shape, Attention)
    value = weight("v_proj").view(shape.num_kv_heads, shape.head_dim, -1)
    value = value.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=0).flatten(0, 1)
    return weight("o_proj") @ value
