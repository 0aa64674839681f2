"""The four RSSM scans in Triton, interpreted: values and all gradients against the reference.

Sizes are no multiples of the tiles, which are made small, so that products need several of them.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scan_runs import EVERY_OP, results, run, same, settled
from torch.overrides import TorchFunctionMode

from fastrssm import ops
from fastrssm.kernels import rssm_scan as kernel
from fastrssm.kernels.rssm_layout import Tiles
from fastrssm.reference.gru_cell import gru_cell
from tests.checks import assert_matches
from tests.op_cases import ScanCase

BASE = ScanCase("", T=3, B=5, D=24, S=10, A=3, width=17)
JOINT = replace(BASE, heads="joint", hidden=1, policy_hidden=1)
CASES = {
    "rssm": BASE,
    "rssmo": replace(JOINT, pre=20, projected=True),
    "rssmo_v2": replace(JOINT, cell="ln_gru_a", pre=20, detach=True),
    "discrete": replace(JOINT, cell="ln_gru_a", groups=2, pre=20),
    "dreamer": replace(JOINT, cell="ln_gru_d", S=9, groups=3, unimix=0.1, hidden=2),
    "powers of two": replace(BASE, T=2, B=21, D=32, S=16, A=16, width=16, hidden=3, resets=False),
    "one step": replace(BASE, T=1, B=1, projected=True),
}
CASES = {name: replace(case, name=name) for name, case in CASES.items()}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "choose_tiles", lambda *_: Tiles(16, 16, 16, 4, 1))


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


@EVERY_OP
@EVERY_CASE
def test_float32_agrees_with_the_reference(name, op):
    case = CASES[name]
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    plain, got = (run(op, case, torch.float32, b, noise) for b in ("reference", "triton"))
    assert_all_match(got, exact, plain)
    assert errors(got[0], exact[0])[0] < 1e-5


@EVERY_OP
@pytest.mark.parametrize("name", ["rssm", "rssmo_v2", "dreamer"])
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


@EVERY_OP
def test_bfloat16_stays_within_its_caps(op):
    """The interpreter cuts bfloat16 off instead of rounding, so no closer bound holds here."""
    exact = run(op, CASES["rssmo"], torch.float64, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(op, CASES["rssmo"], torch.float32, "triton")
    assert errors(got[0], exact[0]).max() < 3e-2
    assert errors(got[1], exact[1]).max() < 5e-2


@EVERY_OP
def test_without_gradient_nothing_else_changes(op):
    args, options = CASES["rssmo"].arguments(op)
    want = results(getattr(ops, op)(*args, **options, backend="triton"))
    with torch.no_grad():
        got = results(getattr(ops, op)(*args, **options, backend="triton"))
    assert same([got], [want])
