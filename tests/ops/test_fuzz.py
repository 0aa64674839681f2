"""Any sizes, variants and values: the CPU kernels are right or refuse, never wrong, never a crash.

`make asan` runs these under the address sanitizer, `make test-isa` on every instruction set.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_runs import NAMES, run, values_and_gradients
from torch.utils._pytree import tree_map

from fastrssm import ops
from tests.op_cases import (
    CategoricalKLCase,
    GaussianKLCase,
    LambdaReturnCase,
    MLPCase,
    ScanCase,
)
from tests.ops import loss_checks

EXAMPLES = int(os.environ.get("FASTRSSM_FUZZ", "80"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
# one, primes, around the widths of vectors, tiles and blocks
SIZES = st.sampled_from([1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 32, 33, 61, 65])
SMALL = st.sampled_from([1, 2, 3, 5, 7, 11])


@st.composite
def scans(draw):
    joint = draw(st.booleans())
    groups = draw(st.sampled_from([0, 0, 1, 3])) if joint else 0
    cell = draw(st.sampled_from(["torch_gru", "ln_gru_a", "ln_gru_d", "block_gru"]))
    blocks = draw(st.sampled_from([1, 2, 3, 8])) if cell == "block_gru" else 0
    return ScanCase(
        draw(st.text("x", min_size=1, max_size=50)),
        T=draw(SMALL),
        B=draw(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 67])),
        D=draw(SIZES) * max(blocks, 1),
        S=max(groups, 1) * draw(SMALL),
        A=draw(SMALL),
        cell=cell,
        heads="joint" if joint else "split",
        groups=groups,
        unimix=draw(st.sampled_from([0.0, 0.1])) if groups else 0.0,
        pre=0 if blocks else draw(st.sampled_from([0, 1, 8, 19])),
        width=draw(SIZES),
        hidden=draw(st.integers(1, 3)),
        policy_hidden=draw(st.integers(1, 3)),
        resets=draw(st.booleans()),
        projected=draw(st.booleans()),
        detach=draw(st.booleans()),
        blocks=blocks,
        branch=draw(SIZES) if blocks else 0,
    )


@FUZZ
@given(scans(), st.sampled_from(NAMES))
def test_scans(case, op):
    for one, other in zip(
        run(op, case, torch.float64, "cpu"), run(op, case, torch.float64, "reference"), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    # the float32 kernels differ in their layout; categorical draws may fall on the other side
    values, gradients = run(op, case, torch.float32, "cpu")
    assert all(x.isfinite().all() for x in (*values, *gradients))


@FUZZ
@given(
    scans(),
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 1e-30, 1e4, 1e30, float("inf"), float("nan")]),
    st.integers(0, 3),
)
def test_scans_of_extreme_values(case, op, value, which):
    """One input is scaled by that: what is finite or NaN is so on both backends."""
    found = []
    for backend in ("cpu", "reference"):
        args, options = case.arguments(op, torch.float64)
        tensors = [i for i, x in enumerate(args) if torch.is_tensor(x) and x.is_floating_point()]
        place = tensors[which % len(tensors)]
        args = list(args)
        scaled = (args[place] * value).detach()
        args[place] = scaled.requires_grad_(args[place].requires_grad)
        with torch.no_grad():
            seen = getattr(ops, op)(*args, **options, backend=backend)
        found.append([seen.deter, seen.stoch, *seen.stats])
        values_and_gradients(getattr(ops, op), args, options, backend=backend)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@FUZZ
@given(
    st.builds(
        MLPCase,
        name=st.text("x", min_size=1, max_size=50),
        lead=st.lists(st.sampled_from([0, 1, 3, 7, 65]), max_size=2).map(tuple),
        in_size=SIZES,
        width=SIZES,
        depth=st.integers(1, 4),
        outs=st.lists(SIZES, min_size=1, max_size=4).map(tuple),
        norm=st.sampled_from(["", "layer", "rms"]),
        activate_last=st.booleans(),
    )
)
def test_mlp(case):
    found = []
    for backend in ("cpu", "reference"):
        (x, nets), options = case.arguments(torch.float64)
        results = ops.mlp(x, nets, **options, backend=backend)
        leaves = [x, *(part for net in nets for layer in net for part in layer if part is not None)]
        # cubes, so that a gradient is not the same everywhere
        total = sum((y**3).sum() for y in results)
        found.append([*results, *torch.autograd.grad(total, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    (x, nets), options = case.arguments()
    with torch.no_grad():
        assert all(y.isfinite().all() for y in ops.mlp(x, nets, **options, backend="cpu"))


LEAD = st.lists(st.sampled_from([0, 1, 2, 7, 33]), max_size=2).map(tuple)
NAME = st.just("fuzz")


@FUZZ
@given(
    st.one_of(
        st.builds(GaussianKLCase, NAME, st.tuples(LEAD, SIZES).map(lambda x: (*x[0], x[1]))),
        st.builds(
            CategoricalKLCase,
            NAME,
            st.tuples(LEAD, SMALL, SIZES).map(lambda x: (*x[0], *x[1:])),
            unimix=st.sampled_from([0.0, 0.01, 0.5]),
            kl_balance=st.sampled_from([None, 0.0, 0.8, 1.0]),
            scale=st.sampled_from([0.0, 1.0, 30.0]),
        ),
        st.builds(LambdaReturnCase, NAME, st.tuples(SMALL, st.sampled_from([0, 1, 7, 601]))),
    ),
    st.booleans(),
)
def test_losses(case, strided):
    op = {
        GaussianKLCase: ops.gaussian_kl,
        CategoricalKLCase: ops.categorical_kl,
        LambdaReturnCase: ops.lambda_return,
    }[type(case)]
    inputs = case.inputs(torch.float64)
    options = {"lambda_": case.lambda_} if op is ops.lambda_return else {}
    if op is ops.categorical_kl:
        options = {"unimix": case.unimix, "kl_balance": case.kl_balance}
    if strided:
        inputs = tree_map(
            lambda x: (
                torch.stack((x, x), -1).detach()[..., 1].requires_grad_()
                if torch.is_tensor(x)
                else x
            ),
            inputs,
        )
    one, other = (
        loss_checks.value_and_gradients(op, inputs, backend=backend, **options)
        for backend in ("cpu", "reference")
    )
    for got, want in zip(one, other, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bool, torch.complex64])
@pytest.mark.parametrize("op", NAMES)
def test_scans_refuse_other_dtypes(op, dtype):
    args, options = ScanCase("refused", T=2, B=3, D=4, S=3, A=2, width=5).arguments(op)
    args = [x.detach().to(dtype) if torch.is_tensor(x) and x.ndim == 3 else x for x in args]
    with pytest.raises(TypeError, match="expected torch.float32"):
        getattr(ops, op)(*args, **options, backend="cpu")
