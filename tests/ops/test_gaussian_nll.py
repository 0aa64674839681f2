"""gaussian_nll against torch.distributions, and its kernel against the reference."""

import math

import pytest
import torch
from torch.distributions import Normal

from fastrssm import reference
from fastrssm.ops import gaussian_nll
from tests.op_cases import GAUSSIAN_NLL, GaussianNLLCase
from tests.ops import loss_checks
from tests.ops.loss_checks import DTYPES

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
CASES = pytest.mark.parametrize("case", GAUSSIAN_NLL, ids=lambda case: case.name)
SMALL = GaussianNLLCase("small", (3, 5), weight_by_std=True, mask_shape=(3, 5))


def sample(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    target, mean, raw = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    return target, mean.requires_grad_(), raw.exp().requires_grad_()


# 1. the reference against an independent source


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 1), (7,), (0, 3, 5)])
def test_value_and_gradient(shape):
    target, mean, std = sample(*shape)
    got = reference.gaussian_nll(target, mean, std)
    expected = -Normal(mean, std).log_prob(target).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (mean, std)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# 2. gradients against finite differences, and the options that they cannot see


@BACKENDS
def test_gradcheck(backend):
    target, mean, std = sample(2, 3)
    target.requires_grad_()
    mask = torch.tensor([0.5, 2.0, 0.0])

    def nll(*inputs, std=None):
        return gaussian_nll(*inputs[:2], std, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(lambda t, m, s: nll(t, m, std=s), (target, mean, std))
    assert torch.autograd.gradcheck(nll, (target, mean))


@BACKENDS
def test_unit_std(backend):
    target, mean, _ = sample(4, 3)
    one = torch.ones_like(mean)
    expected = gaussian_nll(target, mean, one, weight_by_std=True, backend=backend)
    got = gaussian_nll(target, mean, None, weight_by_std=True, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0.0)


@BACKENDS
def test_without_the_constant(backend):
    target, mean, std = sample(4, 5)
    whole, without = (
        gaussian_nll(target, mean, std, constant=c, backend=backend) for c in (True, False)
    )
    difference = whole - without
    torch.testing.assert_close(difference, torch.full_like(difference, 2.5 * math.log(2 * math.pi)))


@BACKENDS
def test_weighting_uses_the_detached_std(backend):
    target, mean, std = sample(4, 5)
    got = gaussian_nll(target, mean, std, weight_by_std=True, backend=backend)
    weight = std.detach().clone()
    expected = -(Normal(mean, std).log_prob(target) * weight).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(x.sum(), (mean, std)) for x in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@BACKENDS
def test_mask_removes_elements(backend):
    target, mean, std = sample(4, 5)
    mask = (torch.arange(5) % 2).double().expand(4, 5)
    got = gaussian_nll(target, mean, std, mask=mask, backend=backend)
    kept = mask[0].bool()
    expected = gaussian_nll(target[:, kept], mean[:, kept], std[:, kept], backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0.0)
    rows = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)
    masked = gaussian_nll(target, mean, std, mask=rows, backend=backend)
    assert torch.equal(masked[1::2], torch.zeros(2).double())


# 3. the kernel against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_kernel_agrees_with_the_reference(case, dtype):
    inputs = case.inputs(dtype)
    loss_checks.assert_agrees_with_the_reference(gaussian_nll, inputs, **case.options())


# 4. registration


def test_opcheck():
    ops, options = torch.ops.fastrssm, (0.9, True, "cpu")
    target, mean, std = SMALL.inputs()
    absent, mask = torch.ones(3, 0), torch.ones(3, 1)
    for inputs in ((target, mean, std, mask), (target, mean, absent, absent)):
        torch.library.opcheck(ops.gaussian_nll.default, (*inputs, *options))
        fixed = [x.detach() for x in inputs]
        backward = (torch.ones(3), ops.gaussian_nll(*fixed, *options), *fixed, *options)
        torch.library.opcheck(ops.gaussian_nll_backward.default, backward)


def test_compile_transforms_and_second_derivative():
    inputs, options = SMALL.inputs(), SMALL.options()
    loss_checks.assert_compiles(gaussian_nll, inputs, **options)
    loss_checks.assert_no_second_derivative(gaussian_nll, inputs, **options)
    target, mean, std = (x.detach() for x in inputs)
    for first in (True, False):

        def total(x, backend, first=first):
            pair = (x, mean) if first else (target, x)
            nll = gaussian_nll(*pair, std, weight_by_std=True, backend=backend)
            return nll.square().sum()

        loss_checks.assert_transforms(total, target if first else mean)


# 5. edges


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_bad_numbers_are_not_hidden(bad, place):
    *inputs, mask = *(x.detach() for x in GaussianNLLCase("", (6, 19)).inputs()), torch.ones(6, 19)
    (*inputs, mask)[place][2, 7] = bad
    got, want = (gaussian_nll(*inputs, mask=mask, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 30), (4, 0), (3, 0, 5)])
def test_empty(shape, backend):
    inputs = [torch.ones(shape), *(torch.ones(shape, requires_grad=True) for _ in range(2))]
    found = loss_checks.value_and_gradients(gaussian_nll, inputs, backend=backend)
    assert [x.shape for x in found] == [shape[:-1], shape, shape]
    assert not found[0].any()


def test_not_contiguous():
    inputs = [x.transpose(0, 1)[..., ::2] for x in GaussianNLLCase("", (7, 4, 12)).inputs()]
    mask = torch.arange(4 * 12.0).view(4, 1, 12)[..., ::2]
    got, want = (gaussian_nll(*inputs, mask=mask, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


@BACKENDS
def test_errors(backend):
    target, mean, std = SMALL.inputs()

    def refused(error, match, *inputs, **options):
        with pytest.raises(error, match=match):
            gaussian_nll(*inputs, backend=backend, **options)

    refused(ValueError, r"mean has shape \[3\], expected \[3, 5\]", target, mean[:, 0], None)
    refused(TypeError, r"std is torch\.float64, expected", target, mean, std.double())
    refused(TypeError, r"target is torch\.int64, expected one of", target.long(), mean, std)
    refused(TypeError, r"mask is a float, expected", target, mean, std, mask=1.0)
    wrong = r"mask has shape \[3\], expected one that broadcasts to \[3, 5\]"
    refused(ValueError, wrong, target, mean, std, mask=torch.ones(3))
    refused(ValueError, r"mask has shape \[1, 3, 5\]", target, mean, std, mask=torch.ones(1, 3, 5))


@BACKENDS
def test_tiny_std_stays_finite(backend):
    target = torch.zeros(3, dtype=torch.float32)
    std = torch.full((3,), 1e-6, requires_grad=True)
    nll = gaussian_nll(target, target + 1.0, std, backend=backend)
    nll.backward()
    assert nll.isfinite()
    assert std.grad.isfinite().all()


# 6. repeatability


def test_repeatable():
    case = GaussianNLLCase("parallel", (1500, 33), weight_by_std=True, mask_shape=(1500, 33))
    inputs = case.inputs()
    loss_checks.assert_repeatable(gaussian_nll, inputs, **case.options())
    part = gaussian_nll(*(x[17:40] for x in inputs))
    assert torch.equal(part, gaussian_nll(*inputs)[17:40])
