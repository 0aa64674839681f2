"""What the tests of categorical_kl, gaussian_nll and lambda_return ask of their kernels."""

import pytest
import torch

from tests.checks import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def value_and_gradients(op, inputs, **options):
    """The result, and its gradients to the inputs that ask for one, weighted differently."""
    result = op(*inputs, **options)
    weight = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    asked = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return result.detach(), *torch.autograd.grad((result * weight.to(result)).sum(), asked)


def cast(inputs, dtype):
    return [
        x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]


def assert_agrees_with_the_reference(op, inputs, backend="cpu", **options):
    def reference(dtype):
        return value_and_gradients(op, cast(inputs, dtype), backend="reference", **options)

    dtype = inputs[0].dtype
    exact, factor = reference(torch.float64), 2.0
    plain = exact if dtype == torch.float64 else reference(dtype)
    if dtype == torch.float64:
        # the reference is rounded too: as wrong as it is in float32, on the scale of float64, and
        # its error adds to the two that a kernel may have
        shrink, factor = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps, 3.0
        plain = [e + (p - e) * shrink for e, p in zip(exact, reference(torch.float32), strict=True)]
    got = value_and_gradients(op, inputs, backend=backend, **options)
    for i, three in enumerate(zip(got, exact, plain, strict=True)):
        assert_matches(f"gradient {i}" if i else "value", *three, factor=factor)


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_repeatable(op, inputs, **options):
    """Equal bit for bit in every run and on any number of threads."""
    threads, first = torch.get_num_threads(), None
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found = value_and_gradients(op, inputs, backend="cpu", **options)
            assert_equal(found, first or found)
            first = found
    finally:
        torch.set_num_threads(threads)


def assert_compiles(op, inputs, **options):
    def loss(*x):
        return op(*(2 * t if isinstance(t, torch.Tensor) else t for t in x), **options).square()

    torch.compiler.reset()
    got = value_and_gradients(torch.compile(loss, fullgraph=True), inputs)
    for one, other in zip(got, value_and_gradients(loss, inputs), strict=True):
        torch.testing.assert_close(one, other)


def assert_transforms(total, x, backend="cpu"):
    """total(x, backend) -> scalar: torch.func sees the same gradients through both backends."""
    stacked = torch.stack([x, x + 1, x * 0.5])

    def run(backend):
        return (
            torch.func.grad(lambda x: total(x, backend))(x),
            torch.vmap(torch.func.grad(lambda x: total(x, backend)))(stacked),
            torch.vmap(lambda x: total(x, backend), in_dims=1)(stacked.movedim(0, 1)),
        )

    for got, want in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(got, want)


def assert_no_second_derivative(op, inputs, backend="cpu", **options):
    asked = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    total = op(*inputs, backend=backend, **options).square().sum()
    gradients = torch.autograd.grad(total, asked, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in gradients).backward()
