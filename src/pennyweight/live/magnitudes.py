"""Leaving input channels out, and counting how large inputs are to know which.

A table of evenly spaced quantiles of |x| gives the threshold for any share. It is made from histograms over the float's
leading bits, which add up over chunks of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pennyweight.model.shapes import QUANTILES

_BITS = 17
"""A magnitude's bin is its float32 bits without the last 17: 64 bins from one power of two to the next."""

BINS = 1 << (31 - _BITS)


def leave_out(module: Any, columns: int, share: float, *, weighted: bool = False) -> None:
    """Let a module (a block, or one matrix of it) see only the largest of its `columns` input channels: those whose
    |x|, times `importance` if `weighted`, is above the quantile `share` of the module's table `magnitudes`.

    Both are parameters of the module, to be loaded or set. The first DENSE_TOKENS of a text are seen whole: much
    attention rests on them. A text read at once is thinned like one that is written token by token, so that its loss
    is the loss of writing it.
    """
    module.magnitudes = nn.Parameter(torch.zeros(QUANTILES), requires_grad=False)
    module.importance = nn.Parameter(torch.ones(columns), requires_grad=False) if weighted else None
    module.left_out = share
    module.register_forward_pre_hook(_leave_out, with_kwargs=True)


DENSE_TOKENS = 4


def threshold(magnitudes: torch.Tensor, share: float) -> torch.Tensor:
    """The magnitude below which `share` of the values lie, between the points of a table of evenly spaced quantiles."""
    at = share * (len(magnitudes) - 1)
    below = min(int(at), len(magnitudes) - 2)
    table = magnitudes.float()
    return table[below] + (table[below + 1] - table[below]) * (at - below)


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among what a module of transformers is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _leave_out(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = entering(args, kwargs)
    if module.left_out > 0:
        keep = _large(module, x.detach())
        if x.shape[-2] > 1:  # one token alone is one that is being written
            keep[..., :DENSE_TOKENS, :] = True
        x = x * keep
    return (args, {**kwargs, "hidden_states": x}) if "hidden_states" in kwargs else ((x, *args[1:]), kwargs)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Within it a model's modules see all their channels."""
    shares = {module: module.left_out for module in _thinned(model)}
    for module in shares:
        module.left_out = 0.0
    try:
        yield
    finally:
        for module, share in shares.items():
            module.left_out = share


def kept(model: Any, ids: torch.Tensor) -> dict[Any, tuple[int, int]]:
    """Of every module of a model that leaves channels out: how many of its inputs' channels it sees of a text (1,
    tokens) behind the tokens that are seen whole, and of how many."""
    counted: dict[Any, tuple[int, int]] = {}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = _large(module, entering(args, kwargs).detach()[..., DENSE_TOKENS:, :])
        counted[module] = int(seen.sum()), seen.numel()

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for module in _thinned(model)]
    try:
        if handles:
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def _thinned(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "left_out", 0.0) > 0]


def _large(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Which channels of its input a thinned module sees."""
    size = x.abs().float()
    if module.importance is not None:
        size = size * module.importance.float()
    return size > threshold(module.magnitudes, module.left_out)


def fill(module: Any, found: Any) -> None:
    """Set a module's table of magnitudes from counts, rounded as it will be stored."""
    module.magnitudes.copy_(quantiles(found).bfloat16())


def counting(into: list[Any]) -> Any:
    """A forward pre-hook that adds counts of a thinned module's inputs to a list."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = entering(args, kwargs).detach().abs().float()
        into.append(counts(size if module.importance is None else size * module.importance))

    return hook


def importance(weights: list[Any]) -> Any:
    """Norm of each column over all matrices that read it, mean 1 (columns,): WINA's weight of |x|."""
    total = sum(weight.detach().float().square().sum(dim=0) for weight in weights)
    norm = total.sqrt()  # type: ignore[union-attr]
    return norm / norm.mean().clamp_min(1e-12)


def counts(magnitudes: Any) -> Any:
    """How many of the values, all at least 0, fall into each bin (BINS,) float32."""
    bins = magnitudes.float().contiguous().view(torch.int32) >> _BITS
    return torch.bincount(bins.flatten(), minlength=BINS).float()


def quantiles(found: Any) -> Any:
    """(QUANTILES,) float32: the magnitudes that evenly spaced shares of the counted values lie below, between a bin's
    edges in proportion. Within 1/64 of a value, as bins are no wider.

    Raises ValueError if nothing was counted.
    """
    total = found.double().cumsum(0)
    if not float(total[-1]) > 0:
        raise ValueError("no magnitudes were counted: the calibration pass did not reach this input")
    edges = (torch.arange(BINS + 1, dtype=torch.int64) << _BITS).to(torch.int32).view(torch.float32).double()
    wanted = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * total[-1]
    at = torch.searchsorted(total, wanted).clamp_max(int(found.nonzero().max()))
    before = total[at] - found.double()[at]
    share = ((wanted - before) / found.double()[at].clamp_min(1e-300)).clamp(0, 1)
    return (edges[at] + (edges[at + 1] - edges[at]) * share).float()
