"""Input channels left out token by token: matrices stored column by column, so that what is not needed is not read.

A channel whose |x| is below a threshold adds next to nothing to W x (TEAL, arXiv:2408.14690). Stored in zigzag
(formats/zigzag.py; SpQt, arXiv:2511.04477), its column need not be fetched either. A block has two thresholds: one for
its normed input, one for what o_proj or down_proj reads; which share each leaves out is what the search picks.

Each row is divided by its root mean square before it is rounded: groups that run down a column would otherwise have to
span rows of different size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from pennyweight.families._decoder import INNER, Parts
from pennyweight.slots import BFLOAT16, QUANTILES, Attention, GatedMLP, Shape, Sparsity, Stored
from pennyweight.variants._common import Stats, with_shape

STATS = ("input_moment", "output_moment", "down_moment", "magnitudes")
SHARES = (0.0, 0.3, 0.5, 0.65)
GROUP = 64
_BITS = 17
"""A magnitude's bin is its float32 bits without the last 17: 64 bins from one power of two to the next."""

BINS = 1 << (31 - _BITS)


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
        return Stored(4, self.group, down=True, scales=self.scales, ordered=self.ordered)

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


def pack(name: str, weight: Any, stats: Stats, spec: Spec) -> dict[str, Any]:
    """The tensors of the matrix called `name`, by suffix."""
    from pennyweight.formats import _matrix
    from pennyweight.variants import bits

    row_scale = weight.detach().float().square().mean(dim=1).sqrt().clamp_min(1e-12)
    codes, grid = bits.codes(name, weight.detach().float() / row_scale.unsqueeze(1), stats, spec.method, spec.stored)
    order = _by_activity(name, weight, stats) if spec.ordered else None
    return _matrix.pack(codes, grid, spec.stored, row_scale=row_scale, order=order)


def _by_activity(name: str, weight: Any, stats: Stats) -> Any:
    """Columns (columns,) int32, those first whose inputs are largest on average: what stays lies together, and so does
    what is left out, in longer pieces than single columns."""
    import torch

    from pennyweight.variants.bits import MOMENT_OF

    moment = MOMENT_OF.get(name, "input_moment")
    if moment not in stats or len(stats[moment]) != weight.shape[1]:  # a child narrower than the parent
        return torch.arange(weight.shape[1], dtype=torch.int32)
    return stats[moment].diagonal().argsort(descending=True, stable=True).int()


def apply(parts: Parts, spec: Spec, stats: Stats) -> Parts:
    """Replace every matrix by its dequantised values and leave channels out of their inputs, in place."""
    from pennyweight.formats import _matrix

    for name, linear in parts.linears().items():
        linear.weight.copy_(_matrix.unpack(pack(name, linear.weight, stats, spec)))
    return thin(parts, spec, stats)


def thin(parts: Parts, spec: Spec, stats: Stats) -> Parts:
    """Leave channels out of the inputs of a slot's matrices by the parent's statistics, whatever the matrices hold."""
    for module, prefix in attach(parts, spec.sparsity):
        fill(module, stats[f"{prefix}_weighted_counts" if spec.weighted else f"{prefix}_counts"])
    return with_shape(parts, reshape(parts.shape, spec))


def attach(parts: Parts, sparsity: Sparsity) -> list[tuple[Any, str]]:
    """Give a block and its inner matrix the hooks and tables that `sparsity` needs: both modules, in the order in which
    they run, and how statistics call their inputs. Importance is set; the tables are to be filled."""
    from pennyweight import blocks

    inner, first = getattr(parts.block, INNER[parts.kind]), readers(parts.block, parts.kind)
    found = ((parts.block, "input", first, sparsity.entering), (inner, "inner", [inner], sparsity.inner))
    for module, _, matrices, share in found:
        blocks.leave_out(module, matrices[0].in_features, share, weighted=sparsity.weighted)
        if sparsity.weighted:  # rounded as it will be stored
            module.importance.copy_(importance([linear.weight for linear in matrices]).bfloat16())
    return [(module, prefix) for module, prefix, _, _ in found]


def fill(module: Any, found: Any) -> None:
    """Set a module's table of magnitudes from counts, rounded as it will be stored."""
    module.magnitudes.copy_(quantiles(found).bfloat16())


def counting(into: list[Any]) -> Any:
    """A forward pre-hook that adds counts of a thinned module's inputs to a list."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        size = x.detach().abs().float()
        into.append(counts(size if module.importance is None else size * module.importance))

    return hook


def readers(block: Any, kind: str) -> list[Any]:
    """The matrices that read a block's normed input."""
    names = ("q_proj", "k_proj", "v_proj") if kind == "mixer" else ("gate_proj", "up_proj")
    return [getattr(block, name) for name in names]


def importance(weights: list[Any]) -> Any:
    """Norm of each column over all matrices that read it, mean 1 (columns,): WINA's weight of |x|."""
    total = sum(weight.detach().float().square().sum(dim=0) for weight in weights)
    norm = total.sqrt()  # type: ignore[union-attr]
    return norm / norm.mean().clamp_min(1e-12)


def counts(magnitudes: Any) -> Any:
    """How many of the values, all at least 0, fall into each bin (BINS,) float32."""
    import torch

    bins = magnitudes.float().contiguous().view(torch.int32) >> _BITS
    return torch.bincount(bins.flatten(), minlength=BINS).float()


def quantiles(found: Any) -> Any:
    """(QUANTILES,) float32: the magnitudes that evenly spaced shares of the counted values lie below, between a bin's
    edges in proportion. Within 1/64 of a value, as bins are no wider.

    Raises ValueError if nothing was counted.
    """
    import torch

    total = found.double().cumsum(0)
    if not float(total[-1]) > 0:
        raise ValueError("no magnitudes were counted: the calibration pass did not reach this input")
    edges = (torch.arange(BINS + 1, dtype=torch.int64) << _BITS).to(torch.int32).view(torch.float32).double()
    wanted = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * total[-1]
    at = torch.searchsorted(total, wanted).clamp_max(int(found.nonzero().max()))
    before = total[at] - found.double()[at]
    share = ((wanted - before) / found.double()[at].clamp_min(1e-300)).clamp(0, 1)
    return (edges[at] + (edges[at + 1] - edges[at]) * share).float()
