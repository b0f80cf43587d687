"""Input channels left out token by token: matrices stored column by column, so that what is not needed is not read.

A channel whose |x| is below a threshold adds next to nothing to W x (TEAL, arXiv:2408.14690). Stored in zigzag
(formats/zigzag.py; SpQt, arXiv:2511.04477), its column need not be fetched either. A block has two thresholds: one for
its normed input, one for what o_proj or down_proj reads; which share each leaves out is what the search picks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from pennyweight import quantize
from pennyweight.formats import zigzag
from pennyweight.model.shapes import Attention, GatedMLP, Shape, Sparsity
from pennyweight.model.stored import BFLOAT16, Stored

if TYPE_CHECKING:
    from pennyweight.judge.stats import SlotStats
    from pennyweight.live.parts import Parts

PLACE = 31
STORES = True
DEFAULT = False  # only where it is asked for: transformers cannot run it
STATS = ("input_moment", "inner_moment", "magnitudes")
SHARES = (0.0, 0.3, 0.5, 0.65)
GROUP = 64


@dataclass(frozen=True)
class Spec:
    """Shares left out of the block's input and of its inner matrix's; rows per scale and what scales are
    (formats/zigzag.py); whether columns that are needed often lie together; how codes are found."""

    entering: float
    inner: float
    weighted: bool = False
    group: int = GROUP
    scales: Literal["symmetric", "affine", "super"] = "symmetric"
    ordered: bool = False
    method: str = "gptq"

    @property
    def stored(self) -> Stored:
        return zigzag.Spec(self.group, self.scales, ordered=self.ordered)

    @property
    def sparsity(self) -> Sparsity:
        return Sparsity(self.entering, self.inner, self.weighted)

    def __str__(self) -> str:
        return f"zigzag -{self.entering:.0%}/-{self.inner:.0%}" + (" weighted" if self.weighted else "")


def options(shape: Shape) -> list[Spec]:
    """Every pair of shares, for blocks whose matrices are not stored in fewer bits already, and are not so small that
    whole units of 128 rows take more bytes than they save."""
    if not isinstance(shape, Attention | GatedMLP) or shape.stored != BFLOAT16 or shape.sparsity is not None:
        return []
    before, after = (
        sum(weight.nbytes for weight in each.weights()) for each in (shape, reshape(shape, Spec(0.0, 0.0)))
    )
    if after > before:
        return []
    return [Spec(entering, inner) for entering, inner in product(SHARES, SHARES)]


def reshape(shape: Shape, spec: Spec) -> Shape:
    if not isinstance(shape, Attention | GatedMLP):
        raise ValueError(f"{shape} has no inputs to leave out")
    return replace(shape, stored=spec.stored, sparsity=spec.sparsity)


def apply(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Replace every matrix by its dequantised values and leave channels out of their inputs, in place."""
    quantize.store(parts, reshape(parts.shape, spec), stats, spec.method)
    return thin(parts, spec, stats)


def thin(parts: Parts, spec: Spec, stats: SlotStats) -> Parts:
    """Leave channels out of the inputs of a slot's matrices by the parent's statistics, whatever the matrices hold."""
    from pennyweight.live import magnitudes

    for activation, module in attach(parts, spec.sparsity).items():
        magnitudes.fill(module, stats[f"{activation}_weighted_counts" if spec.weighted else f"{activation}_counts"])
    return parts.having(reshape(parts.shape, spec))


def attach(parts: Parts, sparsity: Sparsity) -> dict[str, Any]:
    """Give the modules that a block's input and its inner activation enter the hooks and tables that `sparsity` needs;
    by activation, in the order in which they run. Importance is set; the tables are to be filled."""
    from pennyweight.live import magnitudes

    found = {}
    for activation, share in (("input", sparsity.entering), ("inner", sparsity.inner)):
        module, readers = parts.reading(activation)
        magnitudes.leave_out(module, readers[0].in_features, share, weighted=sparsity.weighted)
        if sparsity.weighted:  # rounded as it will be stored
            module.importance.copy_(magnitudes.importance([linear.weight for linear in readers]).bfloat16())
        found[activation] = module
    return found
