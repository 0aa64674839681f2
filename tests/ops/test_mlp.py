"""mlp against plain PyTorch in float64, on every instruction path, under every transformation."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastrssm import ops, reference, use_backend
from fastrssm.models.nets import MLP
from fastrssm.ops import Layer
from tests.checks import assert_matches
from tests.op_cases import MLPS, MLPCase
from tests.ops.rounded import RoundedProducts

CASES = pytest.mark.parametrize("case", MLPS, ids=lambda case: case.name)
SMALL = MLPCase("small", lead=(3,), in_size=4, width=3, depth=2, outs=(2, 3))


def cast(tree, dtype):
    def leaf(x):
        return x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) else x

    return tree_map(leaf, tree)


def leaves_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def values_and_gradients(args, options, backend):
    results = ops.mlp(*args, **options, backend=backend)
    weights = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape) for y in results]
    total = sum((y * w.to(y)).sum() for y, w in zip(results, weights, strict=True))
    return [*(y.detach() for y in results), *torch.autograd.grad(total, leaves_of(args))]


def assert_agree(args, options, got, plain, factor=2.0):
    exact = values_and_gradients(cast(args, torch.float64), options, "reference")
    for i, three in enumerate(zip(got, exact, plain, strict=True)):
        assert_matches(f"tensor {i}", *three, factor=factor)


# 1. the kernel against the reference


@CASES
def test_agrees_with_the_reference(case):
    args, options = case.arguments()
    got = values_and_gradients(args, options, "cpu")
    assert_agree(args, options, got, values_and_gradients(args, options, "reference"), factor=3.0)


@CASES
def test_float64(case):
    args, options = case.arguments(torch.float64)
    got = values_and_gradients(args, options, "cpu")
    for one, other in zip(got, values_and_gradients(args, options, "reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@CASES
def test_bfloat16_products(case):
    # a matrix, for the products that stand in
    args, options = replace(case, lead=case.lead or (1,)).arguments()
    with RoundedProducts("bfloat16"):
        plain = values_and_gradients(args, options, "reference")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = values_and_gradients(args, options, "cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert_agree(args, options, got, plain, factor=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = values_and_gradients(args, options, "cpu")
    for one, other in zip(mixed, got, strict=True):
        assert torch.equal(one, other)


def test_reference_under_autocast_gives_float32():
    args, options = SMALL.arguments()
    with torch.autocast("cpu", torch.bfloat16):
        (first, *_) = ops.mlp(*args, **options, backend="reference")
    assert first.dtype == torch.float32


@CASES
def test_equal_for_any_number_of_threads(case):
    args, options = case.arguments()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(values_and_gradients(args, options, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("norm", "activation"), [("none", "elu"), ("layer", "swish"), ("rms", "swish")]
)
def test_networks_of_the_models_are_these(norm, activation):
    torch.manual_seed(0)
    net = MLP(7, 3, width=9, depth=2, norm=norm, activation=activation).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(20, 7, dtype=torch.float64)
    assert net.kind is not None
    with use_backend("cpu"):
        torch.testing.assert_close(net(x), net.net(x))


# 2. what is asked for, and no more


def test_gradients_of_some():
    (x, nets), options = MLPCase("many nets", outs=(1, 14)).arguments()
    whole = values_and_gradients((x, nets), options, "cpu")[2:]
    nets = tree_map(lambda p: p.detach() if isinstance(p, torch.Tensor) else p, nets)
    weight = nets[1][1].weight.requires_grad_()
    results = ops.mlp(x, nets, backend="cpu")
    weights = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape) for y in results]
    total = sum((y * w.to(y)).sum() for y, w in zip(results, weights, strict=True))
    x_grad, weight_grad = torch.autograd.grad(total, (x, weight))
    assert torch.equal(x_grad, whole[0])
    # x, then two parts of each of three layers of the first network, two of the second's first
    assert torch.equal(weight_grad, whole[1 + 6 + 2])


def test_one_result_without_a_gradient():
    (x, nets), _ = SMALL.arguments()
    alone = torch.autograd.grad(ops.mlp(x, nets[:1], backend="cpu")[0].sum(), x)
    first, _ = ops.mlp(x, nets, backend="cpu")
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x), alone)


def test_strides_do_not_matter():
    (x, nets), _ = MLPCase("strides").arguments()
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    first = nets[0][0]
    wide = torch.cat((first.weight, first.weight), 1).detach()[:, : first.weight.shape[1]]
    nets[0] = (first._replace(weight=wide), *nets[0][1:])
    got = ops.mlp(turned, nets, backend="cpu")[0]
    assert torch.equal(got, ops.mlp(x, nets, backend="cpu")[0])


def test_no_rows():
    (x, nets), _ = SMALL.arguments()
    first, _ = ops.mlp(x[:0], nets, backend="cpu")
    assert first.shape == (0, 2)
    (gradient,) = torch.autograd.grad(first.sum(), nets[0][0].weight)
    assert torch.equal(gradient, torch.zeros_like(gradient))


# 3. wiring


def test_opcheck(monkeypatch):
    seen = []
    module = __import__("fastrssm.ops.mlp", fromlist=["_mlp"])
    whole = module._mlp
    monkeypatch.setattr(module, "_mlp", lambda *args: seen.append(args) or whole(*args))
    args, options = SMALL.arguments()
    ops.mlp(*args, **options, backend="cpu")
    library = torch.ops.fastrssm
    torch.library.opcheck(library.mlp.default, [*seen[0], True])
    given = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, [*seen[0], True])
    found = [*library.mlp(*given)]
    wanted = [True] * (1 + len(given[1]))
    torch.library.opcheck(
        library.mlp_backward.default, [torch.ones_like(found[0]), *given, found, wanted]
    )


def test_compile_fullgraph():
    args, options = SMALL.arguments()

    def loss(x, nets):
        return sum(y.square().sum() for y in ops.mlp(2 * x, nets, **options, backend="cpu"))

    torch.compiler.reset()
    leaves = leaves_of(args)
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), leaves
    )
    for one, other in zip(got, torch.autograd.grad(loss(*args), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_func_transforms():
    (x, nets), options = cast(SMALL.arguments()[0], torch.float64), {}
    x = x.detach()
    nets = tree_map(lambda p: p.detach() if isinstance(p, torch.Tensor) else p, nets)

    def total(x, weight, backend):
        first = nets[0][0]._replace(weight=weight)
        found = ops.mlp(x, [(first, *nets[0][1:]), nets[1]], **options, backend=backend)
        return sum(y.square().sum() for y in found)

    weight = nets[0][0].weight

    def run(backend):
        def gradient(x, weight):
            return torch.func.grad(lambda *both: total(*both, backend), argnums=(0, 1))(x, weight)

        stacked = torch.stack([weight, 2 * weight])
        return (
            *gradient(x, weight),
            *torch.vmap(gradient, in_dims=(0, None))(x, weight),
            *torch.vmap(gradient, in_dims=(None, 0))(x, stacked),
        )

    for got, want in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_no_second_derivative():
    (x, nets), _ = SMALL.arguments()
    (gradient,) = torch.autograd.grad(
        ops.mlp(x, nets, backend="cpu")[0].sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


# 4. bad input


def _replaced(case, net, layer, **parts):
    (x, nets), options = case.arguments()
    layers = list(nets[net])
    layers[layer] = layers[layer]._replace(**parts)
    nets[net] = tuple(layers)
    return (x, nets), options


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (_replaced(SMALL, 0, 1, weight=torch.zeros(2, 5)), r"nets\[0\]\[1\].weight has shape"),
        (_replaced(SMALL, 1, 0, bias=torch.zeros(4)), r"nets\[1\]\[0\].bias has shape \[4\]"),
        (_replaced(SMALL, 0, 0, weight=torch.zeros(3)), r"expected \[out, in\]"),
        (_replaced(SMALL, 1, 0, scale=torch.ones(3), shift=torch.ones(3)), "no norm there"),
        (_replaced(MLPS[1], 1, 0, scale=None), r"nets\[1\]\[0\].scale is None"),
        (_replaced(MLPS[2], 1, 0, shift=torch.zeros(19)), "shift is a Tensor, .* RMS norm there"),
        (((torch.zeros(3, 4), []), {}), "nets is empty"),
        (((torch.zeros(3, 4), [SMALL.arguments()[0][1][0][:1], *SMALL.arguments()[0][1]]), {}),
         r"nets\[1\] has 2 layers, expected 1"),
    ],
)  # fmt: skip
def test_bad_shapes(args, message):
    args, options = args
    with pytest.raises(ValueError, match=message):
        ops.mlp(*args, **options)


def test_bad_dtypes():
    (x, nets), _ = SMALL.arguments()
    with pytest.raises(TypeError, match="x is torch.int64"):
        ops.mlp(torch.zeros(3, 4, dtype=torch.int64), nets)
    with pytest.raises(TypeError, match=r"weight is torch.float32, expected torch.float64 like x"):
        ops.mlp(x.double(), nets)
    with pytest.raises(TypeError, match="x is a list"):
        ops.mlp([1.0], nets)


def test_explicit_backend_that_cannot():
    x, layer = torch.zeros(3, 4), Layer(torch.zeros(2, 4), None)
    with pytest.raises(RuntimeError, match=r"nets\[0\]\[0\] has no bias"):
        ops.mlp(x, [(layer,)], backend="cpu")
    assert torch.equal(ops.mlp(x, [(layer,)])[0], reference.mlp(x, [(layer,)])[0])
