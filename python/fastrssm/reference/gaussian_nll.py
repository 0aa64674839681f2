"""Negative log likelihood of a diagonal Gaussian."""

import math

import torch
from torch import Tensor


def gaussian_nll(
    target: Tensor,
    mean: Tensor,
    std: Tensor | None,
    *,
    weight_by_std: bool = False,
    mask: Tensor | None = None,
    constant: bool = True,
) -> Tensor:
    """Sum the negative log likelihood of a diagonal Gaussian over the last dimension.

    Args:
        target: [..., N] data.
        mean: [..., N] mean.
        std: [..., N] standard deviation, > 0; None: 1 everywhere.
        weight_by_std: multiply each element by its detached std, so that elements predicted with
            a small std do not dominate the gradient.
        mask: [..., N] or broadcastable factor on each element; None: 1.
        constant: keep the term ln(2 pi) / 2 of each element.

    Returns:
        [...] sum in nats.

    Source:
        Weighting: Seitzer et al. 2022 (2203.09168), beta = 1.
    """
    nll = 0.5 * torch.square(target - mean if std is None else (target - mean) / std)
    if std is not None:
        nll = nll + std.log()
    if constant:
        nll = nll + 0.5 * math.log(2.0 * math.pi)
    if weight_by_std and std is not None:
        nll = nll * std.detach()
    if mask is not None:
        nll = nll * mask
    return nll.sum(-1)
