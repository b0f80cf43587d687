"""The loop of everything that trains: rates by schedule, clipped steps, and a state that a stopped run goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The optimiser of distillation, without decay: weights should stay near the parent's. `lr` is the peak rate."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def run(
    loss_of: Callable[[int], torch.Tensor],
    parameters: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    rate: Callable[[int], float],
    first: int = 0,
    hear: Callable[[int, torch.Tensor], None] | None = None,
    save: Callable[[int], None] | None = None,
    save_every_s: float = 20.0,
) -> None:
    """Steps `first` to `steps` on `loss_of(step)`, a scalar; gradients of `parameters` are clipped to norm 1.

    The rate of step s is `rate(s)` times the rate that each optimiser was made with. After a step `hear(steps done,
    loss)` is told, and `save(steps done)` every so many seconds and at the end. What a step does depends on its number
    and the state alone, so that a run that goes on from a saved state ends with the same bits.
    """
    parameters = list(parameters)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    saved_at = time.monotonic()
    for step in range(first, steps):
        for optimizer, own in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = peak * rate(step)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if hear is not None:
            hear(step + 1, loss.detach())
        if save is not None and (step + 1 == steps or time.monotonic() - saved_at > save_every_s):
            save(step + 1)
            saved_at = time.monotonic()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def state(named: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Everything that a run needs to go on, by name."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    for number, optimizer in enumerate(optimizers):
        for index, own in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{k}": torch.as_tensor(v).clone() for k, v in own.items()}
    return tensors


def restore(
    tensors: Mapping[str, torch.Tensor],
    named: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Put back what `state` gave."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            named[rest].data.copy_(tensor)
        else:
            number, index, name = rest.split(".")
            states[int(number)].setdefault(int(index), {})[name] = tensor
    for optimizer, own in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
