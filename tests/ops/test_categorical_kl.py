"""categorical_kl against torch.distributions, and its kernel against the reference."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from fastrssm import reference
from fastrssm.ops import categorical_kl
from tests.op_cases import CATEGORICAL_KL, CategoricalKLCase
from tests.ops import loss_checks
from tests.ops.loss_checks import DTYPES

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
CASES = pytest.mark.parametrize("case", CATEGORICAL_KL, ids=lambda case: case.name)
SMALL = CategoricalKLCase("small", (3, 2, 5), unimix=0.01, kl_balance=0.8)


def logits(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()


def independent(post, prior, unimix):
    classes = post.shape[-1]
    q, p = ((1 - unimix) * x.softmax(-1) + unimix / classes for x in (post, prior))
    return kl_divergence(Categorical(probs=q), Categorical(probs=p)).sum(-1)


# 1. the reference against an independent source


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (1, 1, 1, 2), (5, 7), (0, 3, 5, 7)])
def test_value_and_gradient(shape, unimix):
    post, prior = logits(0, *shape), logits(1, *shape)
    got, expected = (f(post, prior, unimix=unimix) for f in (reference.categorical_kl, independent))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (post, prior)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# 2. gradients against finite differences, and the options that they cannot see


@BACKENDS
@pytest.mark.parametrize("unimix", [0.0, 0.3])
def test_gradcheck(unimix, backend):
    def kl(q, p):
        return categorical_kl(q, p, unimix=unimix, backend=backend)

    assert torch.autograd.gradcheck(kl, (logits(0, 2, 3, 4), logits(1, 2, 3, 4)))


@BACKENDS
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.8, 1.0])
def test_balance_scales_gradients_only(alpha, backend):
    post, prior = logits(0, 4, 3, 5), logits(1, 4, 3, 5)
    plain = categorical_kl(post, prior, backend=backend)
    balanced = categorical_kl(post, prior, kl_balance=alpha, backend=backend)
    torch.testing.assert_close(balanced, plain, rtol=1e-14, atol=0.0)
    to_post, to_prior = torch.autograd.grad(plain.sum(), (post, prior))
    got = torch.autograd.grad(balanced.sum(), (post, prior))
    expected = ((1 - alpha) * to_post, alpha * to_prior)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@BACKENDS
def test_free_nats_silence_gradients_only(backend):
    post, prior = logits(0, 6, 2, 3, scale=1.0), logits(1, 6, 2, 3, scale=1.0)
    plain = categorical_kl(post, prior, backend=backend)
    free = plain.median().item()
    got = categorical_kl(post, prior, free_nats=free, backend=backend)
    assert torch.equal(got, plain)
    (gradient,) = torch.autograd.grad(got.sum(), post, retain_graph=True)
    (full,) = torch.autograd.grad(plain.sum(), post)
    below = plain < free
    assert below.any()
    assert not below.all()
    assert not gradient[below].any()
    assert torch.equal(gradient[~below], full[~below])


# 3. the kernel against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_kernel_agrees_with_the_reference(case, dtype):
    inputs = case.inputs(dtype)
    loss_checks.assert_agrees_with_the_reference(categorical_kl, inputs, **case.options(inputs))


@BACKENDS
def test_frozen_posterior(backend):
    post, prior = logits(0, 4, 3, 5), logits(1, 4, 3, 5)
    kl = categorical_kl(post.detach(), prior, backend=backend)
    (gradient,) = torch.autograd.grad(kl.sum(), prior)
    torch.testing.assert_close(gradient, (prior.softmax(-1) - post.softmax(-1)).detach())
    assert not categorical_kl(post.detach(), prior.detach(), backend=backend).requires_grad


# 4. registration


def test_opcheck():
    ops, options = torch.ops.fastrssm, (0.01, 0.2, 0.8, 1.0, "cpu")
    torch.library.opcheck(ops.categorical_kl.default, (*SMALL.inputs(), *options))
    fixed = [x.detach() for x in SMALL.inputs()]
    found = ops.categorical_kl(*fixed, *options)
    backward = (torch.ones(3), *found, *fixed, *options)
    torch.library.opcheck(ops.categorical_kl_backward.default, backward)


def test_compile_transforms_and_second_derivative():
    inputs, options = SMALL.inputs(), {"unimix": 0.01, "kl_balance": 0.8}
    loss_checks.assert_compiles(categorical_kl, inputs, **options)
    loss_checks.assert_no_second_derivative(categorical_kl, inputs, **options)
    post, prior = (x.detach() for x in inputs)

    def total(x, backend):
        return categorical_kl(x, prior, backend=backend, **options).square().sum()

    loss_checks.assert_transforms(total, post)


# 5. edges


@BACKENDS
@pytest.mark.parametrize("unimix", [0.0, 0.1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_are_not_hidden(backend, bad, unimix):
    post, prior = (x.detach() for x in CategoricalKLCase("rows", (6, 2, 19)).inputs())
    post[0, 0, 7] = prior[1, 1, 3] = prior[2, 0, 0] = post[2, 0, 0] = bad
    post[3], prior[4] = bad, bad
    got, want = (
        categorical_kl(post, prior, unimix=unimix, backend=b) for b in (backend, "reference")
    )
    torch.testing.assert_close(got, want, equal_nan=True)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape, backend):
    inputs = [torch.ones(shape, requires_grad=True) for _ in range(2)]
    found = loss_checks.value_and_gradients(categorical_kl, inputs, backend=backend)
    assert [x.shape for x in found] == [shape[:1], shape, shape]
    assert not found[0].any()


def test_not_contiguous():
    inputs = [x.transpose(0, 1)[..., ::2] for x in CategoricalKLCase("", (7, 4, 3, 12)).inputs()]
    got, want = (categorical_kl(*inputs, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


def test_more_classes_than_the_kernel_has_room_for():
    inputs = CategoricalKLCase("huge", (1, 1, 1025)).inputs()
    want = categorical_kl(*inputs, backend="reference")
    assert torch.equal(categorical_kl(*inputs), want)
    with pytest.raises(RuntimeError, match="1025 classes are more than 1024"):
        categorical_kl(*inputs, backend="cpu")


@BACKENDS
def test_errors(backend):
    post, prior = SMALL.inputs()

    def refused(error, match, *inputs, **options):
        with pytest.raises(error, match=match):
            categorical_kl(*inputs, backend=backend, **options)

    refused(ValueError, r"prior_logits has shape \[3, 2\], expected", post, prior[..., 0])
    refused(ValueError, r"shape \[5\], expected \[\.\.\., G, K\]", post[0, 0], prior[0, 0])
    refused(ValueError, r"shape \[3, 2, 0\], expected", post[..., :0], prior[..., :0])
    refused(TypeError, r"prior_logits is torch\.bfloat16, expected", post, prior.bfloat16())
    refused(ValueError, r"unimix is 1\.5, expected", post, prior, unimix=1.5)
    refused(ValueError, r"kl_balance is -0\.1, expected", post, prior, kl_balance=-0.1)
    refused(ValueError, r"free_nats is inf, expected", post, prior, free_nats=float("inf"))


@BACKENDS
def test_extreme_logits_stay_finite(backend):
    post = torch.tensor([[[1e4, 0.0, -1e4]]], dtype=torch.float64, requires_grad=True)
    kl = categorical_kl(post, -post.detach(), backend=backend)
    # all of q on the first class, whose log probability under p is -2e4
    assert kl.item() == pytest.approx(2e4)
    kl.sum().backward()
    assert post.grad.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_distributions_give_zero(backend, dtype):
    post = logits(0, 3, 2, 4).to(dtype)
    assert not categorical_kl(post, post + 0.0, backend=backend).any()


# 6. repeatability


def test_repeatable():
    case = CategoricalKLCase("parallel", (130, 7, 33), unimix=0.01, kl_balance=0.8)
    loss_checks.assert_repeatable(categorical_kl, case.inputs(), **case.options(()))
    inputs = case.inputs()
    part = categorical_kl(*(x[17:40] for x in inputs))
    assert torch.equal(part, categorical_kl(*inputs)[17:40])
