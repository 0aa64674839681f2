"""The cluster kernels on a GPU of compute capability 9.0: values, gradients, repeats and graphs."""

from dataclasses import replace

import pytest
import torch
from rounded import RoundedProducts
from scan_runs import CASES, EVERY_OP, matmul_precision, same, settled
from test_rssm_cluster import AIME, RSSMO, RSSMO_V2
from test_rssm_cluster_blocks import PUBLISHED as DREAMER
from test_rssm_scan_cuda import arguments, assert_all_match, plains, run
from torch.utils._pytree import tree_leaves

from bench.cuda import captured
from fastrssm import ops
from tests.op_cases import SCANS

# a kernel that is wrong in its barriers fails its launch, and with it everything after
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]


@pytest.fixture(autouse=True)
def _bfloat16_products():
    with matmul_precision("medium"):
        yield


def agree(op, case):
    with matmul_precision("highest"):
        noise = settled(op, case)
        exact = run(op, case, torch.float64, "reference", noise)
        with RoundedProducts("bfloat16"):
            plain = plains(op, case, noise)
    assert_all_match(run(op, case, torch.float32, "cuda", noise), exact, plain)


@EVERY_OP
@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_agrees_with_rounded_products(op, case):
    agree(op, case)


@pytest.mark.parametrize("T", [1, 2, 17, 64])
@pytest.mark.parametrize("B", [1, 50, 131])
@pytest.mark.parametrize("name", ["rssm", "rssmo_v2", "dreamer v3"])
def test_lengths_and_ragged_batches(T, B, name):
    agree("rssm_observe_policy", replace(CASES[name], T=T, B=B))


@pytest.mark.parametrize("case", [AIME, RSSMO, RSSMO_V2, DREAMER], ids=lambda case: case.name)
@pytest.mark.parametrize("op", ["rssm_observe", "rssm_observe_policy", "rssm_imagine_policy"])
def test_published_sizes_stay_within_the_caps(op, case):
    case = replace(case, T=64, B=50)
    with matmul_precision("highest"):
        noise = settled(op, case)
        exact = run(op, case, torch.float64, "reference", noise)
    got = run(op, case, torch.float32, "cuda", noise)
    for part, cap in zip(range(2), (3e-2, 5e-2), strict=True):
        for x, y in zip(got[part], exact[part], strict=True):
            assert torch.linalg.vector_norm(x.double() - y) < cap * torch.linalg.vector_norm(y)


@EVERY_OP
@pytest.mark.parametrize("name", ["rssmo_v2", "dreamer v3"])
def test_twenty_runs_are_equal_bit_for_bit(op, name):
    case = replace(CASES[name], T=17, B=131)
    first = run(op, case, torch.float32, "cuda")
    assert all(same(run(op, case, torch.float32, "cuda"), first) for _ in range(19))


@EVERY_OP
@pytest.mark.parametrize("name", ["rssm", "dreamer v3"])
def test_replay_of_a_graph_equals_a_call(op, name):
    args, options = arguments(op, CASES[name], torch.float32)
    leaves = [x for x in tree_leaves((args, options)) if torch.is_tensor(x) and x.requires_grad]

    def call():
        found = getattr(ops, op)(*args, **options, backend="cuda")
        values = [found.deter, found.stoch, *found.stats]
        gradients = torch.autograd.grad(sum((x * x).sum() for x in values), leaves)
        return [x.detach() for x in values], list(gradients)

    replay = captured(call)
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.9)
    replayed = [[x.clone() for x in part] for part in replay()]
    assert same(replayed, call())
