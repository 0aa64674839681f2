"""lambda_return against the mixture of n-step returns that defines it."""

import pytest
import torch

from fastrssm import reference
from fastrssm.ops import lambda_return
from tests.op_cases import LAMBDA_RETURN, LambdaReturnCase
from tests.ops import loss_checks
from tests.ops.loss_checks import DTYPES

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
CASES = pytest.mark.parametrize("case", LAMBDA_RETURN, ids=lambda case: case.name)
SMALL = LambdaReturnCase("small", (4, 3))


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


# 1. the reference against its definition


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("T", "B"), [(5, 3), (1, 3), (14, 1), (1, 1), (3, 0)])
def test_discount_per_state(T, B, lambda_):
    rewards, values, discount = sample(T, B)
    got = reference.lambda_return(rewards, values, discount, lambda_=lambda_)
    expected = textbook(rewards, values, discount, lambda_)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_constant_discount():
    rewards, values, _ = sample(14, 3)
    got = reference.lambda_return(rewards, values, 0.99, lambda_=0.95)
    expected = textbook(rewards, values, torch.full_like(rewards, 0.99), 0.95)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


# 2. gradients against finite differences


@BACKENDS
def test_gradcheck(backend):
    def returns(r, v, d=0.9):
        return lambda_return(r, v, d, lambda_=0.9, backend=backend)

    tensors = sample(4, 2)
    assert torch.autograd.gradcheck(returns, tensors)
    assert torch.autograd.gradcheck(returns, tensors[:2])


# 3. the kernel against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_kernel_agrees_with_the_reference(case, dtype):
    inputs = case.inputs(dtype)
    loss_checks.assert_agrees_with_the_reference(lambda_return, inputs, lambda_=case.lambda_)


# 4. registration


def test_opcheck():
    ops, options = torch.ops.fastrssm, (0.9, 0.95, "cpu")
    rewards, values, discounts = SMALL.inputs()
    for inputs in ((rewards, values, discounts), (rewards, values, torch.ones(4, 0))):
        torch.library.opcheck(ops.lambda_return.default, (*inputs, *options))
        fixed = [x.detach() for x in inputs]
        backward = (torch.ones(4, 3), ops.lambda_return(*fixed, *options), *fixed, *options)
        torch.library.opcheck(ops.lambda_return_backward.default, backward)


def test_compile_transforms_and_second_derivative():
    inputs = SMALL.inputs()
    loss_checks.assert_compiles(lambda_return, inputs, lambda_=0.95)
    loss_checks.assert_no_second_derivative(lambda_return, inputs, lambda_=0.95)
    rewards, values, discounts = (x.detach() for x in inputs)

    def total(x, backend):
        returns = lambda_return(rewards, x, discounts, lambda_=0.95, backend=backend)
        return returns.square().sum()

    loss_checks.assert_transforms(total, values)


# 5. edges


@BACKENDS
def test_nothing_flows_past_the_end_of_an_episode(backend):
    rewards, values, _ = sample(5, 2)
    discount = torch.full((5, 2), 0.9, dtype=torch.float64)
    discount[2] = 0.0
    returns = lambda_return(rewards, values, discount, lambda_=0.95, backend=backend)
    before = torch.autograd.grad(returns[:3].sum(), (rewards, values))
    assert not before[0][3:].any()
    assert not before[1][2:].any()
    assert torch.equal(returns[2], rewards[2])


@BACKENDS
def test_extreme_rewards_stay_finite(backend):
    rewards = torch.full((50, 2), 1e30)
    returns = lambda_return(rewards, rewards, 0.99, lambda_=0.95, backend=backend)
    assert returns.isfinite().all()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_not_hidden(bad, place):
    inputs = [x.detach() for x in LambdaReturnCase("", (6, 19)).inputs()]
    inputs[place][3, 7] = bad
    got, want = (lambda_return(*inputs, lambda_=0.9, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


@BACKENDS
def test_no_sequences(backend):
    inputs = [torch.ones(3, 0, requires_grad=True) for _ in range(3)]
    found = loss_checks.value_and_gradients(lambda_return, inputs, lambda_=0.9, backend=backend)
    assert [x.shape for x in found] == [(3, 0)] * 4


def test_not_contiguous():
    inputs = [x.mT[:, ::2] for x in LambdaReturnCase("", (12, 7)).inputs()]
    got, want = (lambda_return(*inputs, lambda_=0.9, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


@BACKENDS
def test_errors(backend):
    rewards, values, discounts = SMALL.inputs()

    def refused(error, match, *inputs, lambda_=0.95):
        with pytest.raises(error, match=match):
            lambda_return(*inputs, lambda_=lambda_, backend=backend)

    refused(ValueError, r"next_values has shape \[3, 3\], expected", rewards, values[1:], 0.9)
    refused(ValueError, r"discount has shape \[3\], expected", rewards, values, discounts[0])
    refused(TypeError, r"discount is torch\.float64", rewards, values, discounts.double())
    refused(ValueError, r"discount is nan, expected", rewards, values, float("nan"))
    refused(ValueError, r"shape \[3\], expected \[T, B\]", rewards[0], values[0], 0.9)
    refused(ValueError, r"shape \[0, 3\], expected \[T, B\]", rewards[:0], values[:0], 0.9)
    refused(ValueError, r"lambda_ is 1\.1, expected", rewards, values, 0.9, lambda_=1.1)


# 6. repeatability


def test_repeatable():
    inputs = LambdaReturnCase("parallel", (15, 1500)).inputs()
    loss_checks.assert_repeatable(lambda_return, inputs, lambda_=0.95)
    part = lambda_return(*(x[:, 300:410] for x in inputs), lambda_=0.95)
    assert torch.equal(part, lambda_return(*inputs, lambda_=0.95)[:, 300:410])
