"""The packed weights of the RSSM scans on the CPU: made when needed, right when weights change."""

import gc

import pytest
import torch
from scan_runs import CASES
from torch.utils._pytree import tree_leaves, tree_map

from fastrssm import _native, ops
from fastrssm.ops import rssm_cpu
from fastrssm.ops.rssm_plan import SIZES
from fastrssm.ops.rssm_scan import Inputs, prepare

CASE = CASES["rssm"]


def imagine(args, options, backend="cpu"):
    return ops.rssm_imagine(*args, **options, backend=backend).deter


@pytest.fixture
def packs(monkeypatch):
    """Count how often weights are packed, as (precision, transposed)."""
    seen, pack = [], _native.rssm_scan_pack

    def counted(threads, dtype, precision, layout, weights, transposed, packed):
        seen.append((precision, transposed))
        pack(threads, dtype, precision, layout, weights, transposed, packed)

    monkeypatch.setattr(_native, "rssm_scan_pack", counted)
    return seen


def test_weights_are_packed_once_while_they_stay(packs):
    args, options = CASE.arguments("rssm_imagine")
    weight = args[-1].cell_state.weight
    with torch.no_grad():
        before = imagine(args, options)
        assert torch.equal(imagine(args, options), before)
        assert len(packs) == 1
        weight.mul_(0.5)
        changed = imagine(args, options)
        assert len(packs) == 2
        weight.data = weight.data * 2
        assert torch.equal(imagine(args, options), before)
        assert not torch.equal(changed, before)
        assert len(packs) == 3
        torch.set_float32_matmul_precision("medium")
        imagine(args, options)
        torch.set_float32_matmul_precision("highest")
        imagine(args, options)
    assert packs[3:] == [("bfloat16", False)]


def test_frozen_weights_are_packed_once_for_both_directions(packs):
    args, options = CASE.arguments("rssm_imagine")
    args[-1] = tree_map(lambda x: x if x is None else x.detach(), args[-1])
    for _ in range(3):
        torch.autograd.grad(imagine(args, options).sum(), args[2])
    assert packs == [("float32", False), ("float32", True)]


def test_learnt_weights_may_change_behind_their_versions(packs):
    """As old optimisers do, and finite differences."""
    args, options = CASE.arguments("rssm_imagine")
    imagine(args, options)
    args[-1].cell_state.weight.data.mul_(0.5)
    got = imagine(args, options)
    torch.testing.assert_close(got, imagine(args, options, backend="reference"))
    with torch.no_grad():
        assert torch.equal(imagine(args, options), got)
    assert len(packs) == 2


@torch.no_grad()
def test_steps_of_fused_optimizers_are_seen(packs):
    args, options = CASE.arguments("rssm_imagine")
    weights = [x for x in tree_leaves(args[-1]) if x is not None]
    optimizer = torch.optim.Adam(weights, lr=0.1, fused=True)
    for _ in range(2):
        before = imagine(args, options)
        for x in weights:
            x.grad = torch.ones_like(x)
        optimizer.step()
        assert not torch.equal(imagine(args, options), before)
    assert len(packs) == 3


def test_packs_end_with_their_weights():
    def count():
        gc.collect()
        return len(rssm_cpu._PACKS._entries)

    before = count()
    args, options = CASE.arguments("rssm_imagine")
    imagine(args, options)
    assert count() == before + 1
    del args
    assert count() == before
    for _ in range(20):
        args, options = CASE.arguments("rssm_imagine")
        imagine(args, options)
    assert count() <= 8


def test_packs_are_the_same_for_all_lengths_and_batches():
    args, options = CASE.arguments("rssm_imagine")
    options["constants"] = options.pop("min_std"), options.pop("unimix"), 0.0
    plan = prepare(
        "rssm_imagine", Inputs(None, *args[:2], None, None, *args[2:4], None), args[-1], None,
        **options, groups=1, detach=False, backend=None,
    ).plan  # fmt: skip
    layouts = [[T, B, *plan.structure[:SIZES]] for T, B in ((1, 1), (50, 1), (1, 513))]
    for transposed in (False, True):
        given = (("torch.float32", "float32", layout, transposed) for layout in layouts)
        assert len({_native.rssm_scan_packed_bytes(*x) for x in given}) == 1
    kept = [_native.rssm_scan_saved_numel(layout) for layout in layouts]
    assert kept == [kept[0], 50 * kept[0], 513 * kept[0]]
