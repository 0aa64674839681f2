"""lambda_return against the mixture of n-step returns that defines it."""

import pytest
import torch

from fastrssm.ops import lambda_return


def sample(T: int, B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, T, B, generator=g, dtype=torch.float64)
    discount = torch.rand(T, B, generator=g, dtype=torch.float64)
    return rewards.requires_grad_(), values.requires_grad_(), discount.requires_grad_()


def n_step(rewards, next_values, discount, start: int, n: int) -> torch.Tensor:
    """Sum n discounted rewards from `start`, then the value of the state reached."""
    total, weight = torch.zeros_like(rewards[0]), torch.ones_like(rewards[0])
    for k in range(start, start + n):
        total = total + weight * rewards[k]
        weight = weight * discount[k]
    return total + weight * next_values[start + n - 1]


def textbook(rewards, next_values, discount, lambda_: float) -> torch.Tensor:
    """(1 - lambda) sum of lambda^(n-1) times the n-step return; the longest takes the rest."""
    T, rows = rewards.shape[0], []
    for k in range(T):
        longest = T - k
        returns = [n_step(rewards, next_values, discount, k, n) for n in range(1, longest + 1)]
        mixed = sum((1 - lambda_) * lambda_**i * g for i, g in enumerate(returns[:-1]))
        rows.append(mixed + lambda_ ** (longest - 1) * returns[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("T", "B"), [(5, 3), (1, 3), (14, 1), (1, 1), (3, 0)])
def test_discount_per_state(T, B, lambda_):
    rewards, values, discount = sample(T, B)
    got = lambda_return(rewards, values, discount, lambda_=lambda_)
    expected = textbook(rewards, values, discount, lambda_)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_constant_discount():
    rewards, values, _ = sample(14, 3)
    got = lambda_return(rewards, values, 0.99, lambda_=0.95)
    expected = textbook(rewards, values, torch.full_like(rewards, 0.99), 0.95)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    tensors = sample(4, 2)
    assert torch.autograd.gradcheck(lambda r, v, d: lambda_return(r, v, d, lambda_=0.9), tensors)


def test_nothing_flows_past_the_end_of_an_episode():
    rewards, values, _ = sample(5, 2)
    discount = torch.full((5, 2), 0.9, dtype=torch.float64)
    discount[2] = 0.0
    returns = lambda_return(rewards, values, discount, lambda_=0.95)
    before = torch.autograd.grad(returns[:3].sum(), (rewards, values))
    assert not before[0][3:].any()
    assert not before[1][2:].any()
    assert torch.equal(returns[2], rewards[2])


def test_extreme_rewards_stay_finite():
    rewards = torch.full((50, 2), 1e30)
    assert lambda_return(rewards, rewards, 0.99, lambda_=0.95).isfinite().all()
