"""DreamerV3's block_gru and categorical latents on the emulation of the cluster kernels."""

from dataclasses import replace

import pytest
import torch
from cluster_emulation import (
    ANY,
    AT_ONCE,
    BOTH_DIRECTIONS,
    LATE,
    MUTATIONS,
    Emulator,
    assert_agrees,
    assert_packed_once,
    emulate,
    formulas,
    noticed,
)
from scan_runs import CASES, EVERY_OP, same

from fastrssm.reference.gru_cell import gru_cell
from tests.op_cases import SCANS, ScanCase

HERE = [replace(case, T=min(case.T, 3), B=min(case.B, 20)) for case in SCANS if case.blocks]
# two tiles of rows, and variables that share a block of units with padding
TINY = replace(CASES["dreamer v3"], T=2, B=9)
# DreamerV3's smallest size; its actor has the width of its other layers
PUBLISHED = ScanCase(
    "dreamer v3, 1M", T=2, B=3, D=512, S=128, A=6, cell="block_gru", heads="joint", groups=32,
    unimix=0.01, width=64, hidden=1, policy_hidden=3, blocks=8, branch=64,
)  # fmt: skip
# T, B and the numbers of Plan.structure before those of the layers
LAYOUT = {
    "T": 50, "B": 50, "D": 512, "S": 128, "A": 6, "groups": 32, "cell": 3, "heads": 1, "latent": 1,
    "pre": 0, "head_layers": 2, "head_width": 64, "policy_layers": 0, "policy_width": 0,
    "observe": 1, "detach": 0, "blocks": 8, "branch": 64,
}  # fmt: skip


def test_formulas_of_the_cell():
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, 2000, generator=g, dtype=torch.float64)).float().double()
    leaves = [y.clone().requires_grad_() for y in x[:4]]
    r, c, u, before = leaves
    h = gru_cell(torch.stack((r, c, u), -1).flatten(), before, cell="block_gru", blocks=2000)
    gradients = torch.autograd.grad((h * x[4]).sum(), leaves)
    got = formulas("block_cell", x, 5).double()
    for one, other in zip(got, (h, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
@BOTH_DIRECTIONS
def test_every_weight_is_packed_once(case, backward):
    assert_packed_once(case, 8, backward)


@EVERY_OP
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_agrees_with_rounded_products(op, case):
    assert_agrees(op, case, ranks=8)


@pytest.mark.parametrize(("rows", "clusters"), [(16, 1), (8, 3), (16, 2)], ids=str)
def test_clusters_of_any_shape(rows, clusters):
    assert_agrees("rssm_imagine_policy", replace(TINY, B=35), ranks=8, rows=rows, clusters=clusters)


# more blocks than half a cluster has ranks; variables of classes that fill a rank's slice or more
@pytest.mark.parametrize(
    ("changed", "ranks"),
    [
        ({"D": 36, "blocks": 9}, 16),
        ({"D": 128, "blocks": 16}, 8),
        ({"S": 64, "groups": 2}, 8),
        ({"S": 20, "groups": 4}, 8),
        ({"S": 12, "groups": 12}, 8),
    ],
    ids=str,
)
def test_blocks_and_variables_of_any_size(changed, ranks):
    assert_agrees("rssm_observe", replace(TINY, **changed), ranks=ranks)


@pytest.mark.parametrize("op", ["rssm_observe", "rssm_imagine_policy"])
def test_torch_gru_has_categorical_latents_too(op):
    assert_agrees(op, replace(CASES["rssmo"], S=12, groups=4, unimix=0.1, T=3))


@pytest.mark.parametrize("op", ["rssm_observe", "rssm_imagine_policy"])
def test_published_size(op):
    assert_agrees(op, replace(PUBLISHED, hidden=1 if op == "rssm_observe" else 2), ranks=8)


def test_no_order_of_stores_changes_a_bit():
    runs = [
        emulate("rssm_observe_policy", TINY, ranks=8, order=order, seed=seed)
        for order, seed in ((AT_ONCE, 0), (LATE, 1), (ANY, 2), (ANY, 3))
    ]
    assert all(same(one, runs[0]) for one in runs[1:])


# errors that must not stay unnoticed


@BOTH_DIRECTIONS
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_error_at_any_barrier_is_noticed(mutation, backward):
    op, options = "rssm_observe_policy", {"ranks": 8, "order": LATE, "backward": backward}
    wanted = emulate(op, TINY, ranks=8)
    # three of the policy; the branches, the mixing layer's norm, the cell; two of the head's hidden
    # layer; the latent
    missed = [
        barrier
        for barrier in range(9)
        if not noticed(op, TINY, wanted, mutation=mutation, barrier=barrier, **options)
    ]
    assert missed == []


@pytest.mark.parametrize(
    ("mutation", "backward"), [("token", False), ("token", True), ("buffer", False)], ids=str
)
def test_a_missing_token_or_buffer_is_noticed(mutation, backward):
    op, options = "rssm_observe", {"ranks": 8, "order": LATE, "backward": backward}
    wanted = emulate(op, TINY, ranks=8)
    assert noticed(op, TINY, wanted, mutation=mutation, **options)


# A step of TINY has nine of them forward, behind the first five of a scan, and twelve backward.
# Behind the eleventh of these only warps that send nothing could overtake others, which takes more
# luck than a test has, and the fifteenth stands next to another.
SYNCS = {False: range(4, 23), True: sorted({*range(4, 28)} - {11, 15, 23})}


@BOTH_DIRECTIONS
def test_a_missing_sync_of_warps_is_noticed(backward):
    op, case = "rssm_observe_policy", replace(TINY, B=8)
    wanted = emulate(op, case, ranks=8)
    options = {"ranks": 8, "mutation": "skipped sync", "backward": backward}
    missed = [
        place
        for place in SYNCS[backward]
        if not any(
            noticed(op, case, wanted, barrier=place, seed=seed, **options) for seed in range(12)
        )
    ]
    assert missed == []


# what cannot run


@pytest.mark.parametrize(
    ("changed", "ranks", "why"),
    [
        ({}, 8, ""),
        ({}, 16, "8 ranks"),
        ({"branch": 80}, 8, "too wide"),
        ({"D": 1024}, 8, "too wide"),
        ({"S": 6 * 96, "groups": 6}, 8, "categorical variable"),
        ({"policy_layers": 4, "policy_width": 256}, 8, "shared memory"),
    ],
    ids=str,
)
def test_refusals(changed, ranks, why):
    layout = [*(LAYOUT | changed).values()]
    found = Emulator(ranks=ranks).rssm_cluster_refusal(layout, False, ranks, 8)
    assert why in found
    assert bool(found) == bool(why)
