"""categorical_kl, gaussian_nll and lambda_return as Triton kernels, interpreted or on a GPU."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastrssm.ops import categorical_kl, gaussian_kl, gaussian_nll, lambda_return
from tests.op_cases import (
    CATEGORICAL_KL,
    GAUSSIAN_NLL,
    LAMBDA_RETURN,
    CategoricalKLCase,
    GaussianKLCase,
    GaussianNLLCase,
    LambdaReturnCase,
)
from tests.ops import loss_checks
from tests.ops.loss_checks import cast, value_and_gradients

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.cuda)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CASES = {"categorical_kl": CATEGORICAL_KL, "gaussian_nll": GAUSSIAN_NLL}
CASES |= {"lambda_return": LAMBDA_RETURN}
EVERY_CASE = pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.name}") for op in CASES for case in CASES[op]],
)
SMALL = {
    "categorical_kl": CategoricalKLCase("small", (3, 2, 5), unimix=0.01, kl_balance=0.8),
    "gaussian_nll": GaussianNLLCase("small", (3, 5), weight_by_std=True, mask_shape=(3, 5)),
    "lambda_return": LambdaReturnCase("small", (4, 3)),
}
OPS = pytest.mark.parametrize("op", SMALL)


def arguments(op, case, dtype=torch.float32, device="cpu"):
    """The op, its tensors and its options."""
    inputs = case.inputs(dtype, device)
    match op:
        case "categorical_kl":
            return categorical_kl, inputs, case.options(inputs)
        case "gaussian_nll":
            return gaussian_nll, inputs, case.options(device)
        case _:
            return lambda_return, inputs, {"lambda_": case.lambda_}


# 3. the kernels against the references


@DTYPES
@DEVICES
@EVERY_CASE
def test_kernel_agrees_with_the_reference(op, case, device, dtype):
    function, inputs, options = arguments(op, case, dtype, device)
    loss_checks.assert_agrees_with_the_reference(function, inputs, "triton", **options)


# 4. registration


@OPS
def test_opcheck(op):
    library = torch.ops.fastrssm
    _, inputs, _ = arguments(op, SMALL[op])
    match op:
        case "categorical_kl":
            forward, backward = library.categorical_kl, library.categorical_kl_backward
            options = (0.01, 0.2, 0.8, 1.0, "triton")
        case "gaussian_nll":
            forward, backward = library.gaussian_nll, library.gaussian_nll_backward
            inputs, options = (*inputs, torch.ones(3, 1)), (0.9, True, "triton")
        case _:
            forward, backward = library.lambda_return, library.lambda_return_backward
            options = (0.9, 0.95, "triton")
    torch.library.opcheck(forward.default, (*inputs, *options))
    fixed = [x.detach() for x in inputs]
    found = forward(*fixed, *options)
    results = found if isinstance(found, tuple) else (found,)
    grad = torch.ones_like(results[0])
    torch.library.opcheck(backward.default, (grad, *results, *fixed, *options))


@OPS
def test_compile_fullgraph(op):
    function, inputs, options = arguments(op, SMALL[op])

    def loss(*x):
        return function(2 * x[0], *x[1:], **options, backend="triton").square()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        value_and_gradients(compiled, inputs), value_and_gradients(loss, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


@OPS
def test_modes_see_the_op(op):
    function, inputs, options = arguments(op, SMALL[op])
    plain = function(*inputs, **options, backend="triton")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        options |= {"mask": mode.from_tensor(options["mask"])} if op == "gaussian_nll" else {}
        assert function(*fake, **options, backend="triton").shape == plain.shape


@OPS
def test_transforms_and_second_derivative(op):
    function, inputs, options = arguments(op, SMALL[op])
    loss_checks.assert_no_second_derivative(function, inputs, "triton", **options)
    first, second, *rest = (x.detach() for x in inputs)
    # a mask would be mapped as well
    options = options | {"mask": None} if op == "gaussian_nll" else options

    def total(x, backend):
        return function(first, x, *rest, **options, backend=backend).square().sum()

    with warnings.catch_warnings():  # a slow fallback of vmap would warn
        warnings.filterwarnings("error", message=".*performance drop.*")
        loss_checks.assert_transforms(total, second, "triton")


@DEVICES
@OPS
def test_checkpoint_autocast_and_inference_mode(op, device):
    function, inputs, options = arguments(op, SMALL[op], device=device)

    def run(*x):
        return function(*x, **options, backend="triton")

    plain = value_and_gradients(run, inputs)
    again = value_and_gradients(lambda *x: checkpoint(run, *x, use_reentrant=False), inputs)
    loss_checks.assert_equal(again, plain)
    with torch.autocast(device, torch.bfloat16):
        mixed = run(inputs[0].bfloat16(), *inputs[1:])
    assert mixed.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(run(*inputs), plain[0])


# 5. edges


@DEVICES
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("categorical_kl", (0, 3, 4)),
        ("categorical_kl", (2, 0, 4)),
        ("gaussian_nll", (0, 30)),
        ("gaussian_nll", (3, 0)),
        ("lambda_return", (3, 0)),
    ],
)
def test_empty(op, shape, device):
    function, inputs, options = arguments(op, type(SMALL[op])("empty", shape), device=device)
    value, *gradients = value_and_gradients(function, inputs, backend="triton", **options)
    assert not value.any()
    want, *_ = value_and_gradients(function, inputs, backend="reference", **options)
    assert value.shape == want.shape
    assert all(g.shape == shape for g in gradients)


@DEVICES
@pytest.mark.parametrize(
    ("op", "shape"), [("categorical_kl", (7, 4, 3, 12)), ("gaussian_nll", (7, 4, 12))]
)
def test_not_contiguous(op, shape, device):
    function, inputs, options = arguments(op, type(SMALL[op])("wide", shape), device=device)
    sliced = [x.transpose(0, 1)[..., ::2] for x in inputs]
    got, want = (function(*sliced, **options, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)


@DEVICES
def test_columns_that_are_not_contiguous(device):
    inputs = [x.mT[:, ::2] for x in LambdaReturnCase("", (12, 7)).inputs(device=device)]
    got, want = (lambda_return(*inputs, lambda_=0.9, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)


@DEVICES
@pytest.mark.parametrize("unimix", [0.0, 0.1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_logits_are_not_hidden(bad, unimix, device):
    case = CategoricalKLCase("rows", (6, 2, 19))
    post, prior = (x.detach() for x in case.inputs(device=device))
    post[0, 0, 7] = prior[1, 1, 3] = prior[2, 0, 0] = post[2, 0, 0] = bad
    post[3], prior[4] = bad, bad
    got, want = (
        categorical_kl(post, prior, unimix=unimix, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, equal_nan=True)


@DEVICES
@pytest.mark.parametrize("op", ["gaussian_nll", "lambda_return"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_bad_numbers_are_not_hidden(bad, op, device):
    function, inputs, options = arguments(op, type(SMALL[op])("", (6, 19)), device=device)
    for place in range(3):
        given = [x.detach().clone() for x in inputs]
        given[place][2, 7] = bad
        got, want = (function(*given, **options, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(got, want, equal_nan=True)


@DEVICES
@pytest.mark.parametrize(
    ("function", "case", "options"),
    [
        (gaussian_kl, GaussianKLCase("", (3, 5)), {"kl_balance": 1, "free_nats": 1}),
        (categorical_kl, SMALL["categorical_kl"], {"unimix": 0, "kl_balance": 0, "free_nats": 1}),
        (lambda_return, LambdaReturnCase("", (4, 3), discount=1), {"lambda_": 1}),
    ],
    ids=["gaussian_kl", "categorical_kl", "lambda_return"],
)
def test_options_may_be_whole_numbers(function, case, options, device):
    inputs = case.inputs(device=device)
    got, want = (
        value_and_gradients(function, inputs, backend=b, **options) for b in ("triton", "reference")
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@DEVICES
def test_equal_distributions_have_no_divergence(device):
    (post, _) = CategoricalKLCase("rows", (6, 3, 19)).inputs(device=device)
    for unimix in (0.0, 0.1):
        assert not categorical_kl(post, post + 0.0, unimix=unimix, backend="triton").any()


def test_a_number_of_classes_that_no_tile_holds():
    inputs = CategoricalKLCase("huge", (1, 1, 1025)).inputs()
    with pytest.raises(RuntimeError, match="1025 classes are more than 1024"):
        categorical_kl(*inputs, backend="triton")


# 6. repeatability


@DEVICES
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("categorical_kl", CategoricalKLCase("rows", (130, 7, 33), unimix=0.01, kl_balance=0.8)),
        ("gaussian_nll", GaussianNLLCase("rows", (130, 33), weight_by_std=True)),
        ("lambda_return", LambdaReturnCase("columns", (5, 130))),
    ],
    ids=["categorical_kl", "gaussian_nll", "lambda_return"],
)
def test_two_runs_and_parts_are_equal_bit_for_bit(op, case, device):
    function, inputs, options = arguments(op, case, device=device)

    def run(*x):
        return value_and_gradients(function, x, backend="triton", **options)

    first = run(*inputs)
    loss_checks.assert_equal(first, run(*inputs))
    # sequences are independent, as rows are
    dim = 1 if op == "lambda_return" else 0
    part = function(*(x.narrow(dim, 17, 23) for x in inputs), backend="triton", **options)
    assert torch.equal(part, first[0].narrow(dim, 17, 23))


@DEVICES
@OPS
def test_float64_is_refused(op, device):
    function, inputs, options = arguments(op, SMALL[op], device=device)
    with pytest.raises(RuntimeError, match="float64 runs on cpu and reference only"):
        function(*cast(inputs, torch.float64), **options, backend="triton")
