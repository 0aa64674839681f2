"""One step of an optimiser: how long it is, and how a gradient is clipped before."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def set_learning_rate(
    optimizer: torch.optim.Optimizer, lr: float, *, decay: float, step: int, updates: int
) -> None:
    """Set the rate of update `step` of `updates`: lr, at the end falling linearly to 0.

    Args:
        optimizer: changed in place.
        lr: the rate before it falls.
        decay: share of the updates over which it falls; 0: never.
        step: counted from 1.
        updates: in all.
    """
    left = (updates - step + 1) / updates
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, left / decay) if decay else lr


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    grad_clip: float,
    apart: Iterable[Parameter] = (),
) -> Tensor:
    """Take one step down the gradient of a loss.

    Args:
        optimizer: of all parameters that learn.
        loss: scalar.
        grad_clip: largest norm of the gradient.
        apart: those of the parameters whose gradient is clipped by itself, as it says nothing about
            the others.

    Returns:
        The norm of the gradient of the others before clipping.
    """
    apart = list(apart)
    left_out = {id(parameter) for parameter in apart}
    all_of_them = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    rest = [parameter for parameter in all_of_them if id(parameter) not in left_out]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(rest, grad_clip)
    if apart:
        torch.nn.utils.clip_grad_norm_(apart, grad_clip)
    optimizer.step()
    return norm
