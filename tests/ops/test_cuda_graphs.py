"""Every op with a GPU backend inside a CUDA graph: captured once, replayed on other numbers."""

import pytest
import torch
from scan_runs import NAMES, results, same, sources
from test_rssm_scan_cuda import arguments as scan_arguments
from torch.utils._pytree import tree_leaves

from bench.cuda import captured
from fastrssm import ops
from fastrssm._dispatch import OPS
from tests.op_cases import (
    SCANS,
    CategoricalKLCase,
    GaussianKLCase,
    GaussianNLLCase,
    LambdaReturnCase,
)

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
# case, and options beside it
LOSSES = {
    "gaussian_kl": (GaussianKLCase("", (33, 30)), {"kl_balance": 0.8, "free_nats": 3.0}),
    "categorical_kl": (CategoricalKLCase("", (33, 4, 30)), {"unimix": 0.01, "free_nats": 3.0}),
    "gaussian_nll": (GaussianNLLCase("", (33, 30)), {"weight_by_std": True}),
    "lambda_return": (LambdaReturnCase("", (5, 33)), {"lambda_": 0.9}),
}
EVERY = [
    pytest.param(op, backend, id=f"{op}-{backend}")
    for op in (*LOSSES, *NAMES)
    for backend in OPS[op]
    # clusters have a test of their own
    if backend == "triton" or (backend == "cuda" and op in LOSSES)
]


def problem(op):
    """The tensors of an op, and a call that gives results and gradients."""
    if op in LOSSES:
        case, options = LOSSES[op]
        args = case.inputs(device=DEVICE)
    else:
        args, options = scan_arguments(op, SCANS[0], torch.float32)
    leaves = sources(args, options)

    def call(backend):
        found = getattr(ops, op)(*args, **options, backend=backend)
        values = [found] if op in LOSSES else results(found)
        gradients = torch.autograd.grad(
            sum((x * x).sum() for x in values), leaves, allow_unused=True
        )
        return [x.detach() for x in values], [g for g in gradients if g is not None]

    return (args, options), call


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_replay_equals_a_call_bit_for_bit(op, backend):
    given, call = problem(op)
    replay = captured(lambda: call(backend))
    for step in range(3):
        with torch.no_grad():
            for i, x in enumerate(tree_leaves(given)):
                if torch.is_tensor(x) and x.is_floating_point():
                    # a std stays above zero
                    x.mul_(1.0 + 0.1 * ((step + i) % 3))
        got = [[x.clone() for x in part] for part in replay()]
        assert same(got, call(backend))


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_another_stream(op, backend):
    _, call = problem(op)
    want = call(backend)
    torch.cuda.synchronize()
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        got = call(backend)
    beside.synchronize()
    assert same(got, want)
