"""Matrices fitted in least squares to what a block did, from second moments of its activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DAMPING = 1e-4
_LARGEST = 1.0


def solve(
    cross: torch.Tensor, moment: torch.Tensor, *, toward: torch.Tensor | None = None, damping: float = DAMPING
) -> torch.Tensor:
    """The matrix A (outputs, inputs) that minimises E |y - A x|^2 + r |A - toward|^2, float32; arithmetic in float64.

    cross (outputs, inputs) is E[y x^T], moment (inputs, inputs) is E[x x^T]; r is `damping` times the mean of the
    moment's diagonal. Where the text says nothing of a direction (fewer tokens than inputs, inputs that are sums of
    others) the answer there is `toward`'s, zero if none is given. A moment that is not positive definite even so, by
    rounding, is damped ten times more, and so on. Raises ValueError for one that is not finite.
    """
    import torch

    moment, cross = moment.double(), cross.double()
    scale = float(moment.diagonal().mean())
    if not torch.isfinite(moment).all() or not torch.isfinite(cross).all():
        raise ValueError("moments of the calibration text are not finite; the model's weights are damaged")
    if scale <= 0:  # nothing ever came in
        return (torch.zeros_like(cross) if toward is None else toward).float()
    while True:
        ridge = damping * scale
        factor, failed = torch.linalg.cholesky_ex(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
        if not int(failed) or damping >= _LARGEST:
            break
        damping *= 10
    wanted = cross if toward is None else cross + ridge * toward.double()
    return torch.cholesky_solve(wanted.T, factor).T.float()


def without(weight: torch.Tensor, moment: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A matrix (outputs, channels) cut to the `kept` channels of its input, and fitted to what it gave with all of
    them: those that stay take over what they can of those that go. `moment` (channels, channels) is E[z z^T]."""
    cross = weight.double() @ moment[:, kept].double()
    return solve(cross, moment[kept][:, kept], toward=weight[:, kept])
