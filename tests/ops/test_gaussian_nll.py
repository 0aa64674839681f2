"""gaussian_nll against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal

from fastrssm.ops import gaussian_nll


def sample(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    target, mean, raw = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    return target, mean.requires_grad_(), raw.exp().requires_grad_()


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 1), (7,), (0, 3, 5)])
def test_value_and_gradient(shape):
    target, mean, std = sample(*shape)
    got = gaussian_nll(target, mean, std)
    expected = -Normal(mean, std).log_prob(target).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (mean, std)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    target, mean, std = sample(2, 3)
    target.requires_grad_()
    assert torch.autograd.gradcheck(gaussian_nll, (target, mean, std))
    assert torch.autograd.gradcheck(lambda t, m: gaussian_nll(t, m, None), (target, mean))


def test_unit_std():
    target, mean, _ = sample(4, 3)
    expected = gaussian_nll(target, mean, torch.ones_like(mean), weight_by_std=True)
    got = gaussian_nll(target, mean, None, weight_by_std=True)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0.0)


def test_without_the_constant():
    target, mean, std = sample(4, 5)
    difference = gaussian_nll(target, mean, std) - gaussian_nll(target, mean, std, constant=False)
    torch.testing.assert_close(difference, torch.full_like(difference, 2.5 * math.log(2 * math.pi)))


def test_weighting_uses_the_detached_std():
    target, mean, std = sample(4, 5)
    got = gaussian_nll(target, mean, std, weight_by_std=True)
    weight = std.detach().clone()
    expected = -(Normal(mean, std).log_prob(target) * weight).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.sum(), (mean, std)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_mask_removes_elements():
    target, mean, std = sample(4, 5)
    mask = (torch.arange(5) % 2).double().expand(4, 5)
    got = gaussian_nll(target, mean, std, mask=mask)
    kept = mask[0].bool()
    expected = gaussian_nll(target[:, kept], mean[:, kept], std[:, kept])
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0.0)
    rows = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)
    assert torch.equal(gaussian_nll(target, mean, std, mask=rows)[1::2], torch.zeros(2).double())


def test_tiny_std_stays_finite():
    target = torch.zeros(3, dtype=torch.float32)
    std = torch.full((3,), 1e-6, requires_grad=True)
    nll = gaussian_nll(target, target + 1.0, std)
    nll.backward()
    assert nll.isfinite()
    assert std.grad.isfinite().all()
