"""gaussian_nll against what one would write without it: workload NLL."""

import math

import pytest
import torch
from torch.distributions import Normal

from bench.harness import Workload
from bench.ops.calls import MODES, providers
from fastrssm.ops import gaussian_nll
from tests.op_cases import GAUSSIAN_NLL_BENCH

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def unit(target, mean, std):
    return (0.5 * (target - mean).square() + HALF_LOG_2PI).sum(-1)


def plain(target, mean, std):
    return (0.5 * ((target - mean) / std).square() + std.log() + HALF_LOG_2PI).sum(-1)


def weighted(target, mean, std):
    nll = 0.5 * ((target - mean) / std).square() + std.log() + HALF_LOG_2PI
    return (nll * std.detach()).sum(-1)


def distributions(target, mean, std, weight):
    nll = -Normal(mean, 1.0 if std is None else std, validate_args=False).log_prob(target)
    return (nll * std.detach() if weight else nll).sum(-1)


def workload(case, mode, device="cpu"):
    inputs, options = case.inputs(device=device), case.options(device)
    weight = options["weight_by_std"]
    read, written = (3, 2) if case.has_std else (2, 1)
    moved = 4 * inputs[0].numel() * (read if mode == "fwd" else 2 * read + written)
    peers = {
        "eager": unit if not case.has_std else weighted if weight else plain,
        "distributions-unvalidated": lambda t, m, s: distributions(t, m, s, weight),
    }
    found = providers(gaussian_nll, peers, mode, inputs, **options)
    return Workload("NLL", f"gaussian nll {case.name}", mode, "float32", device, moved, found)


def workloads(threads):
    for case in GAUSSIAN_NLL_BENCH:
        for mode in MODES:
            yield workload(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GAUSSIAN_NLL_BENCH, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ["eager", "eager-compiled", "fastrssm-cpu"])
def test_speed(benchmark, case, mode, provider):
    torch.set_num_threads(1)
    benchmark.pedantic(workload(case, mode).providers[provider], rounds=30, warmup_rounds=5)
