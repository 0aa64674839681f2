"""categorical_kl against what one would write without it: workload KL.

The peers compute the plain KL; balancing would cost them a second one, and costs ours nothing.
"""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from bench.harness import Workload
from bench.ops.calls import MODES, providers
from fastrssm.ops import categorical_kl
from tests.op_cases import CATEGORICAL_KL_BENCH


def plain(post, prior):
    log_q, log_p = post.log_softmax(-1), prior.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum((-2, -1))


def mixed(post, prior, unimix):
    uniform = unimix / post.shape[-1]
    q, p = ((1.0 - unimix) * x.softmax(-1) + uniform for x in (post, prior))
    return (q * (q.log() - p.log())).sum((-2, -1))


def distributions(post, prior, unimix):
    uniform = unimix / post.shape[-1]
    q, p = ((1.0 - unimix) * x.softmax(-1) + uniform for x in (post, prior))
    q, p = (Categorical(probs=x, validate_args=False) for x in (q, p))
    return kl_divergence(q, p).sum(-1)


def workload(case, mode, device="cpu"):
    inputs, u = case.inputs(device=device), case.unimix
    # read two; for the gradient read two again and write two
    moved = 4 * inputs[0].numel() * (2 if mode == "fwd" else 6)
    peers = {
        "eager": (lambda q, p: mixed(q, p, u)) if u else plain,
        "distributions-unvalidated": lambda q, p: distributions(q, p, u),
    }
    found = providers(categorical_kl, peers, mode, inputs, unimix=u)
    return Workload("KL", f"categorical {case.name}", mode, "float32", device, moved, found)


def workloads(threads):
    for case in CATEGORICAL_KL_BENCH:
        for mode in MODES:
            yield workload(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CATEGORICAL_KL_BENCH, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ["eager", "eager-compiled", "fastrssm-cpu"])
def test_speed(benchmark, case, mode, provider):
    torch.set_num_threads(1)
    benchmark.pedantic(workload(case, mode).providers[provider], rounds=30, warmup_rounds=5)
