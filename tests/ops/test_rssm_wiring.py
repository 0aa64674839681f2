"""The RSSM scans under torch.compile, torch.func, checkpoints, hooks and modes."""

import warnings

import pytest
import torch
from scan_runs import CASES, EVERY_OP, results, same, sources, values_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fastrssm import ops

CASE = CASES["rssm"]


def imagine(args, options, backend="cpu", **changed):
    """deter of rssm_imagine with some arguments replaced."""
    action, noise, deter, stoch, weights = args
    gates = weights.cell_input._replace(weight=changed.get("gates", weights.cell_input.weight))
    given = changed.get("action", action), noise, changed.get("deter", deter), stoch
    weights = weights._replace(cell_input=gates)
    return ops.rssm_imagine(*given, weights, **options, backend=backend).deter


def fixed():
    args, options = CASE.arguments("rssm_imagine", torch.float64)
    return tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, args), options


def seen_by_the_op(op, case, monkeypatch):
    """All that the library's op gets in one call."""
    seen = []
    module = __import__("fastrssm.ops.rssm_scan", fromlist=["_scan"])
    whole = module._scan
    monkeypatch.setattr(module, "_scan", lambda *args: seen.append(args) or whole(*args))
    args, options = case.arguments(op)
    getattr(ops, op)(*args, **options, backend="cpu")
    *tensors, weights, structure, constants, precision, backend = seen[0]
    return [*tensors, [*weights], [*structure], [*constants], precision, backend, True]


# 4. registration


def test_opcheck(monkeypatch):
    args = seen_by_the_op("rssm_observe_policy", CASES["smallest"], monkeypatch)
    library = torch.ops.fastrssm
    torch.library.opcheck(library.rssm_scan.default, args)
    args = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, args)
    found = [*library.rssm_scan(*args)]
    grads = [torch.ones_like(x) if x.numel() else None for x in found[:5]]
    wanted = [i in (0, 1, 5, 6, 7) and x is not None for i, x in enumerate(args[:8])]
    wanted += [True] * len(args[8])
    torch.library.opcheck(
        library.rssm_scan_backward.default, [*grads, *args, found, wanted],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "compiler"), [("rssm_imagine", "aot_eager"), ("rssm_observe_policy", "inductor")]
)
def test_compile_fullgraph(op, compiler):
    def twice(*args, **options):
        return getattr(ops, op)(2 * args[0], *args[1:], **options, backend="cpu")

    args, options = CASES["smallest"].arguments(op)
    torch.compiler.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=compiler)
    for one, other in zip(
        values_and_gradients(compiled, args, options),
        values_and_gradients(twice, args, options),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert same(results(compiled(*args, **options)), results(twice(*args, **options)))


def test_function_transforms():
    args, options = fixed()
    first = args[2]
    stacked = torch.stack((first, first + 1, first - 2))

    def square(deter, backend="cpu"):
        return imagine(args, options, backend, deter=deter).square().sum()

    def gradient(deter):
        return torch.func.grad(lambda x: square(x, "reference"))(deter)

    with warnings.catch_warnings():  # a slow fallback of vmap would warn
        warnings.filterwarnings("error", message=".*performance drop.*")
        merged = torch.vmap(lambda x: imagine(args, options, deter=x), in_dims=1)
        per_entry = merged(stacked.movedim(0, 1))
        whole = torch.func.grad(lambda x: torch.vmap(square)(x).sum())(stacked)
        each = torch.vmap(torch.func.grad(square))(stacked)
        jacobian = torch.func.jacrev(lambda x: imagine(args, options, deter=x)[-1, 0, :2])(first)
    want = torch.stack([imagine(args, options, "reference", deter=x) for x in stacked])
    torch.testing.assert_close(per_entry, want)
    torch.testing.assert_close(torch.func.grad(square)(first), gradient(first))
    for found in (whole, each):
        torch.testing.assert_close(found, torch.stack([gradient(x) for x in stacked]))
    by_rows = torch.func.jacrev(lambda x: imagine(args, options, "reference", deter=x)[-1, 0, :2])
    torch.testing.assert_close(jacobian, by_rows(first))


@pytest.mark.parametrize("mapped", [(None, 0), (0, None)])
def test_each_entry_has_its_own_gradient_of_the_weights(mapped):
    args, options = fixed()
    pair = args[-1].cell_input.weight, args[2]

    def square(gates, deter, backend):
        return imagine(args, options, backend, gates=gates, deter=deter).square().sum()

    def given(i):
        return [x if d is None else x + 0.1 * i for x, d in zip(pair, mapped, strict=True)]

    several = [torch.stack([given(i)[k] for i in range(3)]) for k in range(2)]
    several = [x if dim == 0 else x[0] for x, dim in zip(several, mapped, strict=True)]
    got = torch.vmap(torch.func.grad(lambda g, d: square(g, d, "cpu")), mapped)(*several)
    one = torch.func.grad(lambda g, d: square(g, d, "reference"))
    torch.testing.assert_close(got, torch.stack([one(*given(i)) for i in range(3)]))


@EVERY_OP
def test_checkpoint_and_hooks(op):
    args, options = CASE.arguments(op)
    function = getattr(ops, op)
    values, gradients = values_and_gradients(function, args, options, backend="cpu")

    def recomputed(*args, **options):
        return checkpoint(function, *args, use_reentrant=False, **options)

    again = values_and_gradients(recomputed, args, options, backend="cpu")
    assert same(again, [values, gradients])
    # as data parallel training averages: a hook runs as soon as a gradient is complete
    seen = []
    leaves = sources(args, options)
    for x in leaves:
        x.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad))
    states = function(*args, **options, backend="cpu")
    states.deter.sum().backward()
    assert len(seen) == len(leaves)


def test_modes_see_the_op_and_inference_mode_runs():
    args, options = CASE.arguments("rssm_imagine")
    with FakeTensorMode() as mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if torch.is_tensor(x) else x, args)
        assert ops.rssm_imagine(*fake, **options, backend="cpu").deter.shape == (6, 7, 37)
    plain = ops.rssm_imagine(*args, **options)
    with torch.inference_mode():
        copies = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, args)
        for given in (args, copies, copies):
            assert torch.equal(ops.rssm_imagine(*given, **options).stoch, plain.stoch)


def test_second_derivative_raises():
    args, options = CASE.arguments("rssm_imagine", torch.float64)
    deter = args[2]
    (gradient,) = torch.autograd.grad(
        imagine(args, options).square().sum(), deter, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    args, options = fixed()
    once = torch.func.grad(lambda x: imagine(args, options, deter=x).square().sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: once(x).sum())(args[2])
