"""The autograd wiring that every op shares, seen through gaussian_kl."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastrssm.ops import gaussian_kl
from tests.op_cases import GaussianKLCase

SMALL = GaussianKLCase("small", (3, 5))


def test_function_transforms():
    fixed = [x.detach() for x in SMALL.inputs()]
    stacked = torch.stack([fixed[0], fixed[0] + 1, fixed[0] - 2])

    def run(backend):
        def total(post_mean):
            return (
                gaussian_kl(post_mean, *fixed[1:], kl_balance=0.8, backend=backend).square().sum()
            )

        per_row = torch.vmap(lambda x: gaussian_kl(x, *fixed[1:], backend=backend), in_dims=1)
        return (
            torch.func.grad(total)(fixed[0]),
            torch.vmap(torch.func.grad(total))(stacked),
            torch.func.vjp(total, fixed[0])[1](torch.tensor(3.0))[0],
            per_row(stacked.movedim(0, 1)),
        )

    with warnings.catch_warnings(action="error"):  # a slow fallback of vmap would warn
        for got, want in zip(run("cpu"), run("reference"), strict=True):
            torch.testing.assert_close(got, want)


def test_checkpoint_autocast_and_inference_mode():
    inputs = SMALL.inputs()
    plain = gaussian_kl(*inputs)
    torch.testing.assert_close(checkpoint(gaussian_kl, *inputs, use_reentrant=False), plain)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gaussian_kl(inputs[0].bfloat16(), *inputs[1:])
    assert mixed.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(gaussian_kl(*inputs), plain)


def penalty(inputs, loss_in_graph):
    kl = gaussian_kl(*inputs, backend="cpu")
    gradients = torch.autograd.grad(kl.sum(), inputs, create_graph=True)
    squares = sum(g.square().sum() for g in gradients)
    return squares + kl.sum() if loss_in_graph else squares


@pytest.mark.parametrize("loss_in_graph", [True, False])
def test_double_backward_raises(loss_in_graph):
    inputs = SMALL.inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(inputs, loss_in_graph).backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalty(inputs, loss_in_graph), inputs)
    fixed = [x.detach() for x in inputs]
    once = torch.func.grad(lambda x: gaussian_kl(x, *fixed[1:], backend="cpu").sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: once(x).sum())(fixed[0])


def test_compiled_transform_raises_and_is_not_silently_zero():
    fixed = [x.detach() for x in SMALL.inputs()]
    gradient = torch.func.grad(lambda x: gaussian_kl(x, *fixed[1:], backend="cpu").sum())
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="setup_context|fake tensor"):
        torch.compile(gradient, backend="eager", fullgraph=True)(fixed[0])


def test_modes_see_the_op():
    with FakeTensorMode():
        assert gaussian_kl(*[torch.ones(3, 5)] * 4, backend="cpu").shape == (3,)


def test_frozen_inputs_need_no_gradient():
    post_mean, *fixed = (x.detach() for x in SMALL.inputs())
    assert not gaussian_kl(post_mean, *fixed).requires_grad
    kl = gaussian_kl(post_mean.requires_grad_(), *fixed)
    (gradient,) = torch.autograd.grad(kl.sum(), post_mean)
    torch.testing.assert_close(gradient, (post_mean - fixed[1]) / fixed[2].square())
