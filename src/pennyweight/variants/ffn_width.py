"""A narrower FFN: keep the channels that contribute most.

Channel i of the gated MLP contributes C_i = mean_t |x_ti| * ||down[:, i]||, x being the gated activation (Puzzle,
arXiv:2411.19146). Widths are nested: the channels of a narrower FFN are a subset of every wider one's.

slice: gate, up and down are cut, as Puzzle begins. fitted: ours: down_proj is fitted in least squares to what the
whole block gave on the calibration text; that costs a solve in the kept channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pennyweight.live.least_squares import without
from pennyweight.model.shapes import GatedMLP, Shape

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 11
STATS = ("activation_mean_abs", "inner_moment")
TRAINS = True
SHARES = tuple(sixteenths / 16 for sixteenths in range(15, 1, -1))


@dataclass(frozen=True)
class Spec:
    """Intermediate size to keep, and how down_proj is made."""

    width: int
    init: Literal["fitted", "slice"] = "fitted"

    def __str__(self) -> str:
        return f"ffn {self.width}" + (" slice" if self.init == "slice" else "")


def options(shape: Shape) -> list[Spec]:
    """Widths below the parent's, in steps of a sixteenth, rounded to what an int4 group divides. Puzzle's steps are
    twice as wide: by widths alone they meet a budget less closely than one width for all layers does."""
    if not isinstance(shape, GatedMLP):
        return []
    align = 64 if shape.intermediate_size >= 1024 else 32  # an int4 group of one of these fits every width
    while align > 8 and shape.intermediate_size < 4 * align:
        align //= 2
    widths = {max(align, round(shape.intermediate_size * share / align) * align) for share in SHARES}
    return [Spec(width) for width in sorted(widths, reverse=True) if width < shape.intermediate_size]


def reshape(shape: Shape, spec: Spec) -> GatedMLP:
    if not isinstance(shape, GatedMLP) or not 0 < spec.width <= shape.intermediate_size:
        raise ValueError(f"FFN width {spec.width} does not fit {shape}")
    return replace(shape, intermediate_size=spec.width)


def ranking(down_weight, activation_mean_abs):
    """Channels from most to least contributing; down_weight (hidden, channels), activation_mean_abs (channels,).
    Ties go to the lower index, so every ranking is reproducible."""
    import torch

    contribution = activation_mean_abs.double() * down_weight.double().norm(dim=0)
    return torch.argsort(contribution, descending=True, stable=True)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Cut gate and up (rows) and down (columns) to the kept channels, in their original order."""
    from pennyweight.live.parts import set_linear

    down = parts.matrix("down_proj")
    kept = ranking(down.weight.detach(), stats["activation_mean_abs"])[: spec.width].sort().values
    for linear in (parts.matrix("gate_proj"), parts.matrix("up_proj")):
        set_linear(
            linear, linear.weight.detach()[kept], linear.bias.detach()[kept] if linear.bias is not None else None
        )
    weight = down.weight.detach()
    set_linear(
        down, weight[:, kept] if spec.init == "slice" else without(weight, stats["inner_moment"], kept), down.bias
    )
    parts.block.intermediate_size = spec.width
    return parts.having(reshape(parts.shape, spec), inner=kept)
