"""categorical_kl against torch.distributions."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from fastrssm.ops import categorical_kl


def logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()


def independent(post, prior, unimix):
    classes = post.shape[-1]
    q, p = ((1 - unimix) * x.softmax(-1) + unimix / classes for x in (post, prior))
    return kl_divergence(Categorical(probs=q), Categorical(probs=p)).sum(-1)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (1, 1, 1, 2), (5, 7), (0, 3, 5, 7)])
def test_value_and_gradient(shape, unimix):
    post, prior = logits(0, *shape), logits(1, *shape)
    got, expected = (f(post, prior, unimix=unimix) for f in (categorical_kl, independent))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (post, prior)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unimix", [0.0, 0.3])
def test_gradcheck(unimix):
    tensors = (logits(0, 2, 3, 4), logits(1, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda q, p: categorical_kl(q, p, unimix=unimix), tensors)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.8, 1.0])
def test_balance_scales_gradients_only(alpha):
    post, prior = logits(0, 4, 3, 5), logits(1, 4, 3, 5)
    plain, balanced = categorical_kl(post, prior), categorical_kl(post, prior, kl_balance=alpha)
    torch.testing.assert_close(balanced, plain, rtol=1e-14, atol=0.0)
    to_post, to_prior = torch.autograd.grad(plain.sum(), (post, prior))
    got = torch.autograd.grad(balanced.sum(), (post, prior))
    expected = ((1 - alpha) * to_post, alpha * to_prior)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_free_nats_silence_gradients_only():
    post, prior = logits(0, 6, 2, 3, scale=1.0), logits(1, 6, 2, 3, scale=1.0)
    plain = categorical_kl(post, prior)
    free = plain.median().item()
    got = categorical_kl(post, prior, free_nats=free)
    assert torch.equal(got, plain)
    (gradient,) = torch.autograd.grad(got.sum(), post, retain_graph=True)
    (full,) = torch.autograd.grad(plain.sum(), post)
    below = plain < free
    assert below.any()
    assert not below.all()
    assert not gradient[below].any()
    assert torch.equal(gradient[~below], full[~below])


def test_extreme_logits_stay_finite():
    post = torch.tensor([[[1e4, 0.0, -1e4]]], dtype=torch.float64, requires_grad=True)
    prior = -post.detach()
    kl = categorical_kl(post, prior)
    # all of q on the first class, whose log probability under p is -2e4
    assert kl.item() == pytest.approx(2e4)
    kl.sum().backward()
    assert post.grad.isfinite().all()


def test_equal_distributions_give_zero():
    post = logits(0, 3, 2, 4)
    assert torch.equal(categorical_kl(post, post + 0.0), torch.zeros(3, dtype=torch.float64))
