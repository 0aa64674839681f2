"""Policies and their distribution against torch.distributions."""

import copy

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from fastrssm import ops, use_backend
from fastrssm.models.distributions import TanhNormal
from fastrssm.models.policy import TanhGaussianPolicy
from tests.checks import assert_matches


def sample() -> tuple[TanhNormal, TanhNormal, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mean, raw, mean2, raw2, noise = torch.randn(5, 4, 3, 6, generator=g, dtype=torch.float64)
    return TanhNormal(mean, raw.exp()), TanhNormal(mean2, raw2.exp()), noise


def test_log_prob_inside_the_clamp():
    p, _, noise = sample()
    action = torch.tanh(noise)
    inside = action.abs() < 0.999
    assert inside.all()
    theirs = TransformedDistribution(Normal(*p), [TanhTransform()]).log_prob(action).sum(-1)
    torch.testing.assert_close(p.log_prob(action), theirs, rtol=1e-10, atol=1e-10)


def test_log_prob_is_clamped_at_the_ends():
    p, _, _ = sample()
    ends = torch.ones(4, 3, 6, dtype=torch.float64)
    assert p.log_prob(ends).isfinite().all()
    assert torch.equal(p.log_prob(ends), p.log_prob(0.9995 * ends))


def test_mode_and_kl():
    p, q, _ = sample()
    assert torch.equal(p.mode, torch.tanh(p.mean))
    theirs = kl_divergence(Normal(*p), Normal(*q)).sum(-1)
    torch.testing.assert_close(p.kl(q), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("features", "count"), [(640, 198_668), (542, 173_580)])
def test_parameter_counts(features, count):
    assert sum(p.numel() for p in TanhGaussianPolicy(features, 6).parameters()) == count


def test_act_is_the_mode():
    policy = TanhGaussianPolicy(10, 3)
    feature = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.act(feature), policy(feature).mode)
    assert policy(feature).std.min() > 0


@torch.no_grad()
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_prepared_mode_has_the_bits_of_the_op(precision):
    torch.manual_seed(0)
    policy = TanhGaussianPolicy(37, 3, hidden=33, layers=3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for shape in ((1,), (5,), (131,), (2, 9), ()):
            feature = torch.randn(*shape, 37)
            (mean,) = ops.mlp(feature, [policy.mean_net.layers()])
            assert torch.equal(policy.act(feature), mean.tanh())
    finally:
        torch.set_float32_matmul_precision(before)
    assert policy._mode.get(policy, list, lambda: None) is not None


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_prepared_mode_is_as_exact_as_the_reference(rows):
    policy = TanhGaussianPolicy(40, 3)
    feature = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    with use_backend("reference"):
        plain = policy.act(feature)
    exact = copy.deepcopy(policy).double().act(feature.double())
    assert_matches("action", policy.act(feature), exact, plain)


def test_prepared_mode_follows_the_parameters():
    policy = TanhGaussianPolicy(10, 3, hidden=8)
    feature = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def mode():
        return policy.act(feature)

    first = mode()
    assert torch.equal(mode(), first)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=True)
    policy(feature).mode.sum().backward()
    optimizer.step()
    second = mode()
    assert not torch.equal(second, first)
    torch.testing.assert_close(second, policy.act(feature).detach())
    policy(feature).mode.sum().backward()
    policy.mean_net.net[0].weight.data.add_(0.1)
    torch.testing.assert_close(mode(), policy.act(feature).detach())
    policy.mean_net = copy.deepcopy(policy.std_net)
    torch.testing.assert_close(mode(), policy.act(feature).detach())


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="action_size is 0, expected at least 1"):
        TanhGaussianPolicy(10, 0)
