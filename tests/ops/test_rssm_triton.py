"""The four RSSM scans in Triton, interpreted: values and all gradients against the reference.

Sizes are no multiples of the tiles, which are made small, so that products need several of them.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scan_runs import NAMES, results, run, same, settled, sources, values_and_gradients
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fastrssm import ops
from fastrssm.kernels import rssm_scan as kernel
from fastrssm.kernels.rssm_layout import Tiles
from fastrssm.reference.gru_cell import gru_cell
from tests.checks import assert_matches
from tests.op_cases import ScanCase

BASE = ScanCase("", T=3, B=5, D=24, S=10, A=3, width=17)
JOINT = replace(BASE, heads="joint", hidden=1, policy_hidden=1)
BLOCKS = replace(JOINT, T=2, B=3, D=36, cell="block_gru", blocks=4, branch=13)
CASES = {
    "rssm": BASE,
    "rssmo": replace(JOINT, pre=20, projected=True),
    "rssmo_v2": replace(JOINT, cell="ln_gru_a", pre=20, detach=True),
    "discrete": replace(JOINT, cell="ln_gru_a", groups=2, pre=20),
    "dreamer": replace(JOINT, cell="ln_gru_d", S=9, groups=3, unimix=0.1, hidden=2),
    "powers of two": replace(BASE, T=2, B=21, D=32, S=16, A=16, width=16, hidden=3, resets=False),
    "dreamer_v3": replace(BLOCKS, S=9, groups=3, unimix=0.01),
    "blocks": replace(BLOCKS, heads="split", D=34, blocks=2, branch=20, detach=True),
    "one step": replace(BASE, T=1, B=1, projected=True),
}
CASES = {name: replace(case, name=name) for name, case in CASES.items()}
# what the quick tests run; the other pairs of a case and an op are slow ones. The ops with a policy
# contain the others
QUICK = {(name, NAMES[2 + i % 2]) for i, name in enumerate(CASES)}
QUICK |= {("rssm", NAMES[0]), ("rssmo_v2", NAMES[1])}
HOISTED = {("rssm", NAMES[2]), ("rssmo", NAMES[0]), ("dreamer", NAMES[3]), ("discrete", NAMES[1])}
HOISTED |= {("dreamer_v3", NAMES[1]), ("blocks", NAMES[2])}
HALF = {("rssm", NAMES[2]), ("dreamer", NAMES[0]), ("dreamer_v3", NAMES[0])}


def pairs(quick, names=tuple(CASES)):
    """Every case with every op."""
    found = [(name, op) for name in names for op in NAMES]
    marked = [pytest.param(*x, marks=[] if x in quick else pytest.mark.slow) for x in found]
    return pytest.mark.parametrize(("name", "op"), marked)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "choose_tiles", lambda *_, **__: Tiles(16, 16, 16, 4, 1))


class Autocast(TorchFunctionMode):
    """Inside, the reference does what autocast to float16 makes of its layers and activations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def half(f, *given, **more):
            return f(*(None if x is None else x.half() for x in given), **more).float()

        if func in (F.linear, F.elu, F.silu, torch.addmm, torch.baddbmm):
            return half(func, *args, **(kwargs or {}))
        if func is torch.gru_cell:
            x, h, weight, state_weight, bias, state_bias = args
            gates = half(F.linear, x, weight, bias)
            state = half(F.linear, h, state_weight, state_bias)
            return gru_cell(gates, h, cell="torch_gru", state_gates=state)
        return func(*args, **(kwargs or {}))


def assert_all_match(got, exact, plain):
    for kind, *three in zip(("value", "gradient"), got, exact, plain, strict=True):
        for i, one in enumerate(zip(*three, strict=True)):
            assert_matches(f"{kind} {i}", *one)


def errors(got, exact):
    """Relative errors of all tensors, in the 2-norm."""
    norm = torch.linalg.vector_norm
    tiny = torch.finfo(torch.float64).tiny
    found = [norm(x - y) / norm(y).clamp_min(tiny) for x, y in zip(got, exact, strict=True)]
    return torch.stack(found)


@pairs(QUICK)
def test_float32_agrees_with_the_reference(name, op):
    case = CASES[name]
    compare(case, op)


@pairs(HOISTED)
def test_hoisted_scans_agree_with_the_reference(name, op, monkeypatch):
    monkeypatch.setattr(kernel, "STREAMED", 0)
    compare(replace(CASES[name], B=min(CASES[name].B, 3), T=min(CASES[name].T, 2)), op)


def compare(case, op):
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    plain, got = (run(op, case, torch.float32, b, noise) for b in ("reference", "triton"))
    assert_all_match(got, exact, plain)
    assert errors(got[0], exact[0])[0] < 1e-5


@pairs(HALF, ("rssm", "rssmo_v2", "dreamer", "dreamer_v3"))
def test_float16_is_as_good_as_autocast(name, op):
    """Both round at other places: a gradient of six numbers tells nothing, all of them do."""
    case = CASES[name]
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    with Autocast():
        plain = run(op, case, torch.float32, "reference", noise)
    with torch.autocast("cpu", torch.float16):
        got = run(op, case, torch.float32, "triton", noise)
    # the caps of bfloat16, of which float16 has eight times the digits
    for ours, theirs, right, cap in zip(got, plain, exact, (3e-2 / 8, 5e-2 / 8), strict=True):
        found, allowed = errors(ours, right), errors(theirs, right)
        assert found.max() < cap
        assert found.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt()


@pytest.mark.parametrize(("op", "streamed"), [(NAMES[2], kernel.STREAMED), (NAMES[3], 0)])
def test_bfloat16_stays_within_its_caps(op, streamed, monkeypatch):
    """The interpreter cuts bfloat16 off instead of rounding, so no closer bound holds here."""
    monkeypatch.setattr(kernel, "STREAMED", streamed)
    case = replace(CASES["rssmo"], B=2)
    exact = run(op, case, torch.float64, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(op, case, torch.float32, "triton")
    assert errors(got[0], exact[0]).max() < 3e-2
    assert errors(got[1], exact[1]).max() < 5e-2


@pytest.mark.parametrize(("name", "streamed"), [("rssmo", kernel.STREAMED), ("discrete", 0)])
def test_without_gradient_nothing_else_changes(name, streamed, monkeypatch):
    """Then memory of one step serves all steps."""
    monkeypatch.setattr(kernel, "STREAMED", streamed)
    args, options = replace(CASES[name], B=2).arguments("rssm_observe_policy")
    want = results(ops.rssm_observe_policy(*args, **options, backend="triton"))
    with torch.no_grad():
        got = results(ops.rssm_observe_policy(*args, **options, backend="triton"))
    assert same([got], [want])


def test_frozen_world_model():
    """The gradient of the policy alone, and then of nothing but a given action."""
    case = replace(CASES["rssm"], T=2)
    args, options = case.arguments("rssm_observe_policy")
    leaves, policy = sources(args, options), tree_leaves(args[-1])
    every = values_and_gradients(ops.rssm_observe_policy, args, options, backend="triton")[1]
    for x in leaves:
        x.requires_grad_(any(x is y for y in policy))
    some = values_and_gradients(ops.rssm_observe_policy, args, options, backend="triton")[1]
    assert same([some], [[g for g, x in zip(every, leaves, strict=True) if x.requires_grad]])

    args, options = case.arguments("rssm_imagine")
    every = values_and_gradients(ops.rssm_imagine, args, options, backend="triton")[1]
    for x in sources(args, options)[1:]:
        x.requires_grad_(False)
    some = values_and_gradients(ops.rssm_imagine, args, options, backend="triton")[1]
    assert same([some], [every[:1]])


def test_weights_are_packed_once_while_they_stay(monkeypatch):
    packed, pack = [], kernel.pack
    monkeypatch.setattr(kernel, "pack", lambda *args: packed.append(args) or pack(*args))
    args, options = replace(CASES["rssm"], T=1, B=1).arguments("rssm_imagine")
    weight = args[-1].cell_state.weight

    def imagine():
        return ops.rssm_imagine(*args, **options, backend="triton").deter

    with torch.no_grad():
        before = imagine()
        assert torch.equal(imagine(), before)
        assert len(packed) == 1
        weight.mul_(0.5)
        assert not torch.equal(imagine(), before)
        assert len(packed) == 2
    # what is learnt is packed anew for each direction, for changes through .data have no version
    weight.data *= 2
    assert torch.equal(imagine(), before)
    imagine().sum().backward()
    assert len(packed) == 5


def test_layers_without_bias():
    """As Dreamer has them; the CPU's kernels ask for a bias."""
    args, options = replace(CASES["dreamer"], T=2).arguments("rssm_imagine", torch.float64)
    noise = torch.full_like(args[1], 0.5)
    weights = args[-1]._replace(cell_input=args[-1].cell_input._replace(bias=None))
    found = []
    for dtype, backend in (
        (torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton"),
    ):  # fmt: skip
        given = tree_map(
            lambda x, dtype=dtype: x.detach().to(dtype).requires_grad_(x is not noise)
            if torch.is_tensor(x) else x,
            [args[0], noise, *args[2:4], weights],
        )  # fmt: skip
        found.append(values_and_gradients(ops.rssm_imagine, given, options, backend=backend))
    assert_all_match(found[2], found[0], found[1])
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: .*cell_input has no"):
        ops.rssm_imagine(*given, **options, backend="cpu")


def test_an_explicit_request_never_falls_back():
    args, options = CASES["rssm"].arguments("rssm_imagine", torch.float64)
    with pytest.raises(RuntimeError, match="'triton' is not available: float64 runs on cpu and"):
        ops.rssm_imagine(*args, **options, backend="triton")
    args, options = replace(CASES["rssm"], hidden=0).arguments("rssm_imagine")
    with pytest.raises(RuntimeError, match="'triton' is not available: .* or there are none"):
        ops.rssm_imagine(*args, **options, backend="triton")


def test_empty_batch():
    values, gradients = run("rssm_observe", replace(CASES["rssm"], B=0), torch.float32, "triton")
    assert values[0].shape == (3, 0, 24)
    assert not any(g.any() for g in gradients)
