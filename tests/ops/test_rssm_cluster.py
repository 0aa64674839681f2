"""The cluster kernels without a GPU: their source on the host, where stores come late and out of
order, against rounded products of the reference; and errors that this emulation has to notice."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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
    emulated,
    formulas,
    noticed,
)
from rounded import RoundedProducts
from scan_runs import (
    CASES,
    EVERY_OP,
    NAMES,
    matmul_precision,
    results,
    same,
    sources,
)

from fastrssm import ops
from tests.checks import assert_matches
from tests.op_cases import SCANS, ScanCase

TINY = replace(CASES["rssm"], T=2, B=9)
JOINT = replace(CASES["rssmo"], T=2, B=9)
# the published sizes: what does not fit into registers, and slices of more than one block
NORMED = replace(CASES["rssmo_v2"], T=2, B=9)
AIME = ScanCase("aime", T=2, B=3, D=512, S=128, A=6, width=128)
RSSMO = ScanCase("rssmo", T=2, B=3, D=512, S=30, A=6, width=512, heads="joint", pre=512, hidden=1)
RSSMO_V2 = replace(RSSMO, name="rssmo_v2", cell="ln_gru_a")
# block_gru has a file of its own
CASES_HERE = [
    replace(case, T=min(case.T, 3), B=min(case.B, 9)) for case in SCANS if not case.blocks
]
EVERY_KIND = pytest.mark.parametrize(
    "case", [TINY, JOINT, NORMED], ids=["split", "joint", "normed"]
)


# scalar formulas


def test_formulas_of_the_cell():
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(6, 2000, generator=g, dtype=torch.float64)
    exact = x.float().double()
    r_sum, z_sum, xn, hn, before = exact[:5].unbind()
    leaves = [y.clone().requires_grad_() for y in (r_sum, z_sum, xn, hn, before)]
    r, z = leaves[0].sigmoid(), leaves[1].sigmoid()
    n = (leaves[2] + r * leaves[3]).tanh()
    h = (1 - z) * n + z * leaves[4]
    # the part of hn's gradient, and of the state's, that does not pass its own sum
    gradients = torch.autograd.grad((h * exact[5]).sum(), leaves)
    got = formulas("cell", x, 10).double()
    for one, other in zip(got, (r, z, n, leaves[3], h, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cell", ["ln_gru_a", "ln_gru_d"])
def test_formulas_of_the_cells_with_a_norm(cell):
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, 2000, generator=g, dtype=torch.float64)).float().double()
    leaves = [y.clone().requires_grad_() for y in x[:4]]
    *y, before = leaves
    if cell == "ln_gru_a":
        z, r, o = y
        h = torch.lerp(torch.tanh(r.sigmoid() * o), before, z.sigmoid())
    else:
        r, c, u = y
        h = torch.lerp(before, torch.tanh(r.sigmoid() * c), (u - 1).sigmoid())
    gradients = torch.autograd.grad((h * x[4]).sum(), leaves)
    got = formulas("norm_cell", x, 5, float(cell == "ln_gru_a")).double()
    # a share next to 1 is exact to a rounding of 1
    atol = torch.finfo(torch.float32).eps * (x[4].abs() * (1 + x[3].abs())).max().item()
    for one, other in zip(got, (h, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=atol)


def test_formulas_of_activations():
    x = torch.cat((torch.linspace(-30, 30, 1999, dtype=torch.float64), torch.zeros(1)))
    x = x.float().double().requires_grad_()
    values = F.elu(x), F.silu(x), x.tanh(), F.softplus(x) + 0.1, 2 * (x / 2).sigmoid() + 0.1
    slopes = [torch.autograd.grad(y.sum(), x)[0] for i, y in enumerate(values) if i != 2]
    got = formulas("activations", x.detach(), 9, 0.1).double()
    # from the result, where it is the sum that is at zero, torch takes 1
    for one, other in zip(got, (*values, *slopes), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=2e-6)


# packing


@EVERY_KIND
@pytest.mark.parametrize("ranks", [8, 16])
@BOTH_DIRECTIONS
def test_every_weight_is_packed_once(case, ranks, backward):
    assert_packed_once(case, ranks, backward)


# whole scans


@EVERY_OP
@pytest.mark.parametrize("case", CASES_HERE, ids=lambda case: case.name)
def test_agrees_with_rounded_products(op, case):
    assert_agrees(op, case)


@pytest.mark.parametrize(
    ("ranks", "rows", "clusters"), [(16, 16, 1), (8, 8, 3), (8, 16, 2)], ids=str
)
@EVERY_KIND
def test_clusters_of_any_shape(case, ranks, rows, clusters):
    assert_agrees(
        "rssm_observe_policy", replace(case, B=35), ranks=ranks, rows=rows, clusters=clusters
    )


@pytest.mark.parametrize("case", [AIME, RSSMO, RSSMO_V2], ids=lambda case: case.name)
def test_published_sizes(case):
    assert_agrees("rssm_observe", case)


def test_half_a_cluster_has_registers_for_the_published_size():
    case = replace(AIME, T=1, B=2)
    args, options = case.arguments("rssm_observe")
    with torch.no_grad():
        exact = results(ops.rssm_observe(*args, **options, backend="reference"))
        with RoundedProducts("bfloat16"):
            plain = results(ops.rssm_observe(*args, **options, backend="reference"))
        with matmul_precision("medium"), emulated(ranks=8):
            got = results(ops.rssm_observe(*args, **options, backend="cuda"))
    for i, (x, y, z) in enumerate(zip(got, exact, plain, strict=True)):
        # the reference in float32 stands for float64: its own error is a thousandth
        assert_matches(f"value {i}", x, y.double(), z)


@EVERY_KIND
def test_no_order_of_stores_changes_a_bit(case):
    runs = [
        emulate("rssm_observe_policy", case, order=order, seed=seed)
        for order, seed in ((AT_ONCE, 0), (LATE, 1), (ANY, 2), (ANY, 3))
    ]
    assert all(same(one, runs[0]) for one in runs[1:])


def test_frozen_weights_have_no_gradient():
    args, options = TINY.arguments("rssm_observe_policy")
    policy = args[-1]
    every = emulate("rssm_observe_policy", TINY)[1]
    leaves = sources(args, options)
    of_policy = [any(x is y for layer in policy.layers for y in layer) for x in leaves]
    for x, wanted in zip(leaves, of_policy, strict=True):
        x.requires_grad_(wanted)
    with matmul_precision("medium"), emulated():
        values = results(ops.rssm_observe_policy(*args, **options, backend="cuda"))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in values]
    total = sum((x * w.to(x)).sum() for x, w in zip(values, weights, strict=True))
    learnt = [x for x in leaves if x.requires_grad]
    with emulated():
        got = torch.autograd.grad(total, learnt)
    wanted = [g for g, is_policy in zip(every, of_policy, strict=True) if is_policy]
    assert len(got) == len(wanted) > 0
    assert same(list(got), wanted)


# errors that must not stay unnoticed


@BOTH_DIRECTIONS
@pytest.mark.parametrize("mutation", MUTATIONS)
@EVERY_KIND
def test_an_error_at_any_barrier_is_noticed(case, mutation, backward):
    op = "rssm_observe_policy"
    wanted = emulate(op, case)
    barriers = {TINY: 7, JOINT: 9, NORMED: 10}[case]
    missed = [
        barrier
        for barrier in range(barriers)
        if not noticed(
            op, case, wanted, mutation=mutation, barrier=barrier, order=LATE, backward=backward
        )
    ]
    assert missed == []


@BOTH_DIRECTIONS
def test_a_missing_token_is_noticed(backward):
    wanted = emulate("rssm_observe", TINY)
    assert noticed("rssm_observe", TINY, wanted, mutation="token", order=LATE, backward=backward)


def test_a_buffer_too_few_is_noticed():
    wanted = emulate("rssm_observe", TINY)
    assert noticed("rssm_observe", TINY, wanted, mutation="buffer", order=LATE)


# what cannot run


def test_refusals():
    emulator = Emulator()
    layout = [1, 1, 512, 128, 6, 1, 0, 0, 0, 0, 3, 128, 0, 0, 1, 0, 0, 0]

    def refusal(**changed):
        places = {"D": 2, "head_layers": 10, "head_width": 11}
        found = list(layout)
        for name, value in changed.items():
            found[places[name]] = value
        return emulator.rssm_cluster_refusal(found, False, 16, 8)

    assert refusal() == ""
    assert "too wide" in refusal(D=1040)
    assert "shared memory" in refusal(D=1024)
    assert "hidden layers" in refusal(head_layers=1)
    assert "hidden layers" in refusal(head_layers=5)


@pytest.mark.parametrize("op", NAMES)
def test_nothing_falls_back_in_silence(op):
    args, options = TINY.arguments(op)
    with pytest.raises(RuntimeError, match="'cuda' is not available"):
        getattr(ops, op)(*args, **options, backend="cuda")
