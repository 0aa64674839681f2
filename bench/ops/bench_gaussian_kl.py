"""gaussian_kl against what one would write without it: workload KL.

The peers compute the plain KL, which is all that torch.distributions has; balancing would cost them
a second one, and costs ours nothing.
"""

from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastrssm
from bench.harness import Workload
from bench.ops.calls import MODES, call_of, with_graphs
from fastrssm.ops import gaussian_kl
from tests.op_cases import GAUSSIAN_KL_BENCH


def closed_form(post_mean, post_std, prior_mean, prior_std):
    ratio = post_std / prior_std
    shift = (post_mean - prior_mean) / prior_std
    return (0.5 * (ratio * ratio + shift * shift - 1.0) - ratio.log()).sum(-1)


def distributions(post_mean, post_std, prior_mean, prior_std, validate):
    q = Normal(post_mean, post_std, validate_args=validate)
    p = Normal(prior_mean, prior_std, validate_args=validate)
    return kl_divergence(q, p).sum(-1)


def functions(device):
    able = fastrssm.backends()["gaussian_kl"]
    ours = ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference")
    torch.compiler.reset()
    return {
        "distributions": partial(distributions, validate=True),
        "distributions-unvalidated": partial(distributions, validate=False),
        "eager": closed_form,
        "compiled": torch.compile(closed_form, dynamic=False),
        **{f"fastrssm-{b}": partial(gaussian_kl, backend=b) for b in ours if able[b] is None},
    }


def workload(case, mode, device="cpu"):
    inputs = case.inputs(device=device)
    elements = inputs[0].numel()
    # read four; for the gradient read four again and write four
    moved = 4 * elements * (4 if mode == "fwd" else 12)
    providers = {name: call_of(f, mode, inputs) for name, f in functions(device).items()}
    providers = with_graphs(providers, device)
    return Workload("KL", f"gaussian {case.name}", mode, "float32", device, moved, providers)


def workloads(threads):
    for case in GAUSSIAN_KL_BENCH:
        for mode in MODES:
            yield workload(case, mode)


@pytest.mark.parametrize("provider", functions("cpu"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GAUSSIAN_KL_BENCH[:2], ids=lambda case: case.name)
def test_speed(benchmark, case, mode, provider):
    torch.set_num_threads(1)
    benchmark.pedantic(workload(case, mode).providers[provider], rounds=30, warmup_rounds=5)
