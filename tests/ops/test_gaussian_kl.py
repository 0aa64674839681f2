import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastrssm import reference
from fastrssm.ops import gaussian_kl
from tests.checks import assert_matches
from tests.op_cases import GAUSSIAN_KL, GaussianKLCase

NAMES = ("post_mean", "post_std", "prior_mean", "prior_std")
BACKENDS = (
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cpu", id="triton-interpreted"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.cuda),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.cuda),
)
CASES = pytest.mark.parametrize("case", GAUSSIAN_KL, ids=lambda case: case.name)
SMALL = GaussianKLCase("small", (3, 5), kl_balance=0.8)


def value_and_gradients(inputs, function, **options):
    kl = function(*inputs, **options)
    weight = torch.linspace(-1, 2, kl.numel(), dtype=torch.float64).view(kl.shape).to(kl)
    return kl.detach(), *torch.autograd.grad((kl * weight).sum(), inputs)


def independent(inputs, kl_balance=None, free_nats=0.0):
    """torch.distributions, with the clamp of Dreamer: it has our gradient, not our value."""
    alpha = 0.5 if kl_balance is None else kl_balance
    scale = 2.0 if kl_balance is None else 1.0
    q, p = Normal(*inputs[:2]), Normal(*inputs[2:])
    q_fixed, p_fixed = (Normal(n.loc.detach(), n.scale.detach()) for n in (q, p))
    train_prior = kl_divergence(q_fixed, p).sum(-1).clamp_min(free_nats)
    train_post = kl_divergence(q, p_fixed).sum(-1).clamp_min(free_nats)
    return scale * (alpha * train_prior + (1 - alpha) * train_post)


# 1. the reference against an independent source


@CASES
def test_reference_agrees_with_torch_distributions(case):
    inputs = case.inputs(torch.float64)
    options = case.options(inputs)
    kl, *gradients = value_and_gradients(inputs, reference.gaussian_kl, **options)
    exact = kl_divergence(Normal(*inputs[:2]), Normal(*inputs[2:])).sum(-1)
    torch.testing.assert_close(kl, exact, rtol=1e-12, atol=1e-12)
    _, *expected = value_and_gradients(inputs, lambda *x, **o: independent(x, **o), **options)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


# 2. gradients against finite differences


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    inputs = SMALL.inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: gaussian_kl(*x, backend=backend), inputs)


# 3. each backend against the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@CASES
def test_backend_agrees_with_the_reference(case, backend, device, dtype):
    if dtype == torch.float64 and backend != "cpu":
        pytest.skip("float64 runs on cpu and reference only")
    inputs = case.inputs(dtype, device)
    options = case.options(inputs)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = value_and_gradients(wide, reference.gaussian_kl, **options)
    plain = value_and_gradients(inputs, reference.gaussian_kl, **options)
    got = value_and_gradients(inputs, gaussian_kl, backend=backend, **options)
    for name, *three in zip(("kl", *NAMES), got, exact, plain, strict=True):
        assert_matches(name, *three)


# 4. registration


def test_opcheck():
    inputs, options = SMALL.inputs(), (0.2, 0.8, 1.0, "cpu")
    ops = torch.ops.fastrssm
    torch.library.opcheck(ops.gaussian_kl.default, (*inputs, *options))
    fixed = [x.detach() for x in inputs]
    kl = ops.gaussian_kl(*fixed, *options)
    torch.library.opcheck(ops.gaussian_kl_backward.default, (torch.ones(3), kl, *fixed, *options))


def test_compile_fullgraph():
    inputs = SMALL.inputs()

    def loss(*x, **options):
        return gaussian_kl(*(2 * t for t in x), **options).square()

    torch.compiler.reset()
    options = SMALL.options(inputs)
    got = value_and_gradients(inputs, torch.compile(loss, fullgraph=True), **options)
    for one, other in zip(got, value_and_gradients(inputs, loss, **options), strict=True):
        torch.testing.assert_close(one, other)


# 5. edges


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", [(0, 30), (4, 0), (3, 0, 5)])
def test_empty(backend, device, shape):
    inputs = [torch.ones(shape, device=device, requires_grad=True) for _ in NAMES]
    kl, *gradients = value_and_gradients(inputs, gaussian_kl, backend=backend)
    assert kl.shape == shape[:-1]
    assert not kl.any()
    assert all(g.shape == shape for g in gradients)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_not_contiguous(backend, device):
    inputs = GaussianKLCase("wide", (7, 4, 12)).inputs(device=device)
    sliced = [x.transpose(0, 1)[..., ::2] for x in inputs]
    dense = [x.detach().clone(memory_format=torch.contiguous_format) for x in sliced]
    want = gaussian_kl(*dense, backend="reference")
    torch.testing.assert_close(gaussian_kl(*sliced, backend=backend), want)
    # the op itself too, which a compiler calls with strides of its own
    raw = torch.ops.fastrssm.gaussian_kl(*sliced, 1.0, 1.0, 0.0, backend)
    torch.testing.assert_close(raw, want)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_not_hidden(backend, device, bad):
    inputs = [x.detach() for x in GaussianKLCase("rows", (6, 19)).inputs(device=device)]
    for row, x in enumerate(inputs):
        x[row, 7] = bad
    inputs[1][4, 3] = 0.0
    inputs[3][5, 3] = -1.0
    got, want = (gaussian_kl(*inputs, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want, equal_nan=True)


def test_near_the_limits_of_float32():
    ratios = torch.tensor([1e-44, 1e-38, 1e-30, 1.0, 1e15]).unsqueeze(-1)
    one, zero = torch.ones_like(ratios), torch.zeros_like(ratios)
    want = gaussian_kl(*(x.double() for x in (zero, ratios, zero, one)), backend="reference")
    got = gaussian_kl(zero, ratios, zero, one, backend="cpu")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_errors_are_the_same_on_every_backend(backend):
    pm, ps, qm, qs = SMALL.inputs()

    def refused(error, match, *inputs, **options):
        with pytest.raises(error, match=match):
            gaussian_kl(*inputs, backend=backend, **options)

    refused(ValueError, r"prior_std has shape \[3\], expected \[3, 5\]", pm, ps, qm, qs[:, 0])
    refused(ValueError, r"post_mean has shape \[\], expected \[\.\.\., S\]", *[pm.sum()] * 4)
    refused(
        TypeError,
        r"post_std is torch\.bfloat16, expected torch\.float32",
        pm,
        ps.bfloat16(),
        qm,
        qs,
    )
    refused(
        TypeError,
        r"post_mean is torch\.float16, expected one of",
        *[x.half() for x in (pm, ps, qm, qs)],
    )
    refused(TypeError, r"prior_mean is a list, expected a Tensor", pm, ps, [1.0], qs)
    refused(ValueError, r"kl_balance is 1\.5, expected", pm, ps, qm, qs, kl_balance=1.5)
    refused(ValueError, r"kl_balance is nan, expected", pm, ps, qm, qs, kl_balance=float("nan"))
    refused(ValueError, r"free_nats is -1, expected", pm, ps, qm, qs, free_nats=-1)
    refused(ValueError, r"free_nats is inf, expected", pm, ps, qm, qs, free_nats=float("inf"))


# 6. repeatability


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_two_runs_and_parts_are_equal_bit_for_bit(backend, device):
    inputs = GaussianKLCase("rows", (130, 30), kl_balance=0.8).inputs(device=device)
    first, second = (value_and_gradients(inputs, gaussian_kl, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    part = gaussian_kl(*(x[17:40] for x in inputs), backend=backend)
    assert torch.equal(part, first[0][17:40])


def test_number_of_threads_does_not_matter():
    inputs = GaussianKLCase("parallel", (1500, 33), kl_balance=0.8).inputs()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(value_and_gradients(inputs, gaussian_kl, backend="cpu"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
