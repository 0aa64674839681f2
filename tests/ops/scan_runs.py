"""Runs of the four RSSM scans with all their gradients, for the tests that compare backends."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastrssm import ops
from tests.op_cases import SCANS

NAMES = ("rssm_observe", "rssm_imagine", "rssm_observe_policy", "rssm_imagine_policy")
# those with float64; Triton has tests of its own
BACKENDS = ["cpu"]
EVERY_OP = pytest.mark.parametrize("op", NAMES)
FUSED = pytest.mark.parametrize("backend", BACKENDS)
CASES = {case.name: case for case in SCANS}


def results(trajectory):
    action = [trajectory.action] if hasattr(trajectory, "action") else []
    return [trajectory.deter, trajectory.stoch, *trajectory.stats, *action]


def sources(args, options):
    return [x for x in tree_leaves((args, options)) if torch.is_tensor(x) and x.requires_grad]


def values_and_gradients(function, args, options, **extra):
    values = results(function(*args, **options, **extra))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in values]
    total = sum((x * w.to(x)).sum() for x, w in zip(values, weights, strict=True))
    leaves = sources(args, options)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
    ]
    return [x.detach() for x in values], gradients


def run(op, case, dtype, backend, noise=None):
    args, options = case.arguments(op, dtype)
    if noise is not None:
        args = [noise.to(dtype) if x.shape == noise.shape else x for x in args[:3]] + args[3:]
    return values_and_gradients(getattr(ops, op), args, options, backend=backend)


def settled(op, case):
    """For categorical latents noise in the middle of its class, that rounding cannot leave."""
    if not case.groups:
        return None
    _, stoch, logits, *_ = run(op, case, torch.float64, "reference")[0]
    chosen = stoch.unflatten(-1, (case.groups, -1))
    probs = (1 - case.unimix) * logits.softmax(-1) + case.unimix / logits.shape[-1]
    return ((probs.cumsum(-1) - 0.5 * probs) * chosen).sum(-1)


@contextmanager
def matmul_precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def same(one, other):
    return all(map(torch.equal, tree_leaves(one), tree_leaves(other)))
