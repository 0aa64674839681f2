"""What decoders and policies return: small values over ops, without validation."""

import math
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrssm import ops


class Normal(NamedTuple):
    """Diagonal Gaussian over the last dimension; `std` None means 1 everywhere."""

    mean: Tensor  # [..., N]
    std: Tensor | None = None  # [..., N]

    @property
    def mode(self) -> Tensor:
        """[..., N] most likely value."""
        return self.mean

    def nll(
        self, target: Tensor, *, weight_by_std: bool, mask: Tensor | None, constant: bool
    ) -> Tensor:
        """[...] negative log likelihood; the options are those of the op."""
        return ops.gaussian_nll(
            target, self.mean, self.std, weight_by_std=weight_by_std, mask=mask, constant=constant
        )


class Bernoulli(NamedTuple):
    """Independent binary variables over the last dimension."""

    logits: Tensor  # [..., N]

    @property
    def mode(self) -> Tensor:
        """[..., N] probability of one: the value by which its error is measured."""
        return torch.sigmoid(self.logits)

    def nll(
        self, target: Tensor, *, weight_by_std: bool, mask: Tensor | None, constant: bool
    ) -> Tensor:
        """[...] negative log likelihood; there is neither a std nor a constant to act on."""
        del weight_by_std, constant
        nll = F.binary_cross_entropy_with_logits(self.logits, target, reduction="none")
        return (nll if mask is None else nll * mask).sum(-1)


class TanhNormal(NamedTuple):
    """Distribution of tanh(x), x from a diagonal Gaussian."""

    mean: Tensor  # [..., A] of x
    std: Tensor  # [..., A] of x

    @property
    def mode(self) -> Tensor:
        """[..., A] tanh of the mean, what policies do when they are evaluated."""
        return torch.tanh(self.mean)

    def log_prob(self, action: Tensor) -> Tensor:
        """[...] log density of actions [..., A], which are clamped to +-0.999 first."""
        action = action.clamp(-0.999, 0.999)
        z = (torch.atanh(action) - self.mean) / self.std
        gaussian = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2.0 * math.pi)
        return (gaussian - torch.log1p(-action.square())).sum(-1)

    def kl(self, other: Self) -> Tensor:
        """[...] KL(self || other), that of the Gaussians below the tanh."""
        return ops.gaussian_kl(self.mean, self.std, other.mean, other.std)
