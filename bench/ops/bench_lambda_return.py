"""lambda_return against the loop that one would write without it: workload returns."""

import pytest
import torch

from bench.harness import Workload
from bench.ops.calls import MODES, is_tensor, providers
from fastrssm.ops import lambda_return
from tests.op_cases import LAMBDA_RETURN_BENCH


def loop(rewards, next_values, discount, lambda_):
    """The loop of most Dreamer codebases."""
    carry, returns = next_values[-1], []
    for t in reversed(range(rewards.shape[0])):
        d = discount[t] if is_tensor(discount) else discount
        carry = rewards[t] + d * ((1.0 - lambda_) * next_values[t] + lambda_ * carry)
        returns.append(carry)
    return torch.stack(returns[::-1])


def workload(case, mode, device="cpu"):
    inputs, lambda_ = case.inputs(device=device), case.lambda_
    tensors = sum(map(is_tensor, inputs))
    # read all, write one; for the gradient read that, its own and all but the rewards, write all
    units = tensors + 1 if mode == "fwd" else 3 * tensors + 2
    moved = 4 * inputs[0].numel() * units
    peers = {"eager": lambda r, v, d: loop(r, v, d, lambda_)}
    found = providers(lambda_return, peers, mode, inputs, lambda_=lambda_)
    name = f"lambda return {case.name}"
    return Workload("returns", name, mode, "float32", device, moved, found)


def workloads(threads):
    for case in LAMBDA_RETURN_BENCH:
        for mode in MODES:
            yield workload(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LAMBDA_RETURN_BENCH, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ["eager", "eager-compiled", "fastrssm-cpu"])
def test_speed(benchmark, case, mode, provider):
    torch.set_num_threads(1)
    benchmark.pedantic(workload(case, mode).providers[provider], rounds=30, warmup_rounds=5)
