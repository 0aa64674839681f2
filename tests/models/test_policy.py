"""Policies and their distribution against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from fastrssm.models.distributions import TanhNormal
from fastrssm.models.policy import TanhGaussianPolicy


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


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="action_size is 0, expected at least 1"):
        TanhGaussianPolicy(10, 0)
