"""Lambda-returns of imagined sequences."""

import torch
from torch import Tensor


def lambda_return(
    rewards: Tensor, next_values: Tensor, discount: Tensor | float, *, lambda_: float
) -> Tensor:
    """Mix n-step returns of all lengths, in one reverse scan.

    G_k = r_k + d_k [(1 - lambda) v_{k+1} + lambda G_{k+1}], bootstrapped with the last value.

    Args:
        rewards: [T, B] reward of each state.
        next_values: [T, B] value of the state after it; the last row is the bootstrap.
        discount: gamma, or [T, B] gamma times the probability of going on (AIME-v2).
        lambda_: mixing weight in [0, 1].

    Returns:
        [T, B] returns.

    Source:
        Eq. 6 of Dreamer (1912.01603); a discount per state as in DreamerV2 (2010.02193).
    """
    discounts = discount if isinstance(discount, Tensor) else torch.full_like(rewards, discount)
    inputs = rewards + discounts * (1.0 - lambda_) * next_values
    carry, returns = next_values[-1], []
    for step, d in zip(inputs.flip(0).unbind(0), discounts.flip(0).unbind(0), strict=True):
        carry = step + d * lambda_ * carry
        returns.append(carry)
    return torch.stack(returns[::-1])
