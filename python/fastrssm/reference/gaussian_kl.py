"""KL divergence of diagonal Gaussians: the specification that every backend is compared with."""

import torch
from torch import Tensor


def _kl(post_mean: Tensor, post_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    ratio = post_std / prior_std
    shift = (post_mean - prior_mean) / prior_std
    # log of the ratio, not of its square: the square underflows at 1e-23 in float32
    return (0.5 * (ratio.square() + shift.square() - 1.0) - ratio.log()).sum(-1)


def gaussian_kl(
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    *,
    kl_balance: float | None = None,
    free_nats: float = 0.0,
) -> Tensor:
    """Sum KL(post || prior) over the last dimension; [..., S] four times -> [...] nats.

    The value is the true KL whatever the options: they change gradients only.
    bfloat16 inputs are computed, and their KL returned, in float32.
    """
    if post_mean.dtype == torch.bfloat16:
        post_mean, post_std = post_mean.float(), post_std.float()
        prior_mean, prior_std = prior_mean.float(), prior_std.float()
    if kl_balance is None:
        kl = _kl(post_mean, post_std, prior_mean, prior_std)
    else:
        # both terms have the value of the plain KL, so their mean has it too
        train_prior = _kl(post_mean.detach(), post_std.detach(), prior_mean, prior_std)
        train_post = _kl(post_mean, post_std, prior_mean.detach(), prior_std.detach())
        kl = kl_balance * train_prior + (1.0 - kl_balance) * train_post
    if free_nats > 0.0:
        # straight-through: the value of max(kl, free_nats) is not reported, its gradient is used
        kl = torch.where(kl < free_nats, kl.detach(), kl)
    return kl
