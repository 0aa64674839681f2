"""mlp against torch's own products, eager and compiled: workload mlp."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bench import peak
from bench.harness import Workload
from bench.ops.calls import MODES
from fastrssm import ops, reference
from tests.op_cases import MLP_BENCH

# what torch and our kernels multiply: its own switch
PRECISIONS = {"float32": "highest", "bfloat16": "medium"}


def _calls(function, case, mode):
    (x, nets), _ = case.arguments()
    if mode == "fwd":
        fixed = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, (x, nets))
        return lambda: function(*fixed)
    leaves, structure = tree_flatten((x, nets))
    learnt = [t for t in leaves if isinstance(t, torch.Tensor)]
    weights = [torch.ones_like(y) for y in function(x, nets)]
    return lambda: torch.autograd.grad(
        function(*tree_unflatten(leaves, structure)), learnt, weights
    )


def _at(precision, call):
    def run():
        torch.set_float32_matmul_precision(precision)
        return call()

    return run


def workload(case, mode, dtype, threads):
    torch.compiler.reset()
    functions = {
        "eager": reference.mlp,
        "eager-compiled": torch.compile(reference.mlp, dynamic=False),
        "fastrssm-cpu": lambda x, nets: ops.mlp(x, nets, backend="cpu"),
    }
    calls = {name: _calls(function, case, mode) for name, function in functions.items()}
    limit, run = peak.limit(peak.flop(calls["eager"]), dtype, threads)
    found = {name: _at(PRECISIONS[dtype], call) for name, call in calls.items()}
    if dtype == "float32":
        # oneDNN instead of MKL, exact for float32 where the processor has nothing faster
        found["eager-medium"] = _at("medium", calls["eager"])
    found = {limit: run, **found}
    return Workload("mlp", f"mlp {case.name}", mode, dtype, "cpu", None, found, limit)


def workloads(threads):
    for case in MLP_BENCH:
        for dtype in PRECISIONS:
            for mode in MODES:
                yield workload(case, mode, dtype, threads)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", MLP_BENCH, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ["eager", "eager-compiled", "fastrssm-cpu"])
def test_speed(benchmark, case, mode, provider):
    torch.set_num_threads(1)
    found = workload(case, mode, "float32", 1)
    benchmark.pedantic(found.providers[provider], rounds=30, warmup_rounds=5)
