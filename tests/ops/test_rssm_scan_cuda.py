"""The four RSSM scans on a GPU, on every backend that they have there: values and all gradients."""

from contextlib import nullcontext

import pytest
import scan_runs
import torch
from rounded import RoundedProducts
from scan_runs import EVERY_OP, matmul_precision, same, settled, values_and_gradients
from torch.utils._pytree import tree_map

from fastrssm import ops
from fastrssm._dispatch import OPS
from tests.checks import assert_matches
from tests.op_cases import SCANS, ScanCase

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
# clusters have tests of their own: not all cells, and bfloat16 products only
BACKENDS = pytest.mark.parametrize(
    "backend", [name for name in OPS["rssm_observe"] if name == "triton"]
)
EVERY_CASE = pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
# the published sizes; more steps than a tile has rows
AIME = ScanCase("aime", T=64, B=50, D=512, S=128, A=6, width=128)
DISCRETE = ScanCase(
    "dreamer", T=64, B=16, D=512, S=1024, A=6, width=512, cell="ln_gru_d", heads="joint",
    groups=32, unimix=0.01, pre=512, hidden=1, policy_hidden=1,
)  # fmt: skip
DREAMER_V3 = ScanCase(
    "dreamer v3", T=64, B=16, D=512, S=128, A=6, width=64, cell="block_gru", heads="joint",
    groups=32, unimix=0.01, hidden=1, policy_hidden=1, blocks=8, branch=64,
)  # fmt: skip
LARGE = pytest.mark.parametrize("case", [AIME, DISCRETE, DREAMER_V3], ids=lambda case: case.name)
# largest relative 2-norm of states and of gradients
CAPS = {"highest": (1e-5, 1e-4), "high": (3e-3, 1e-2), "medium": (3e-2, 5e-2)}


def arguments(op, case, dtype, noise=None):
    args, options = case.arguments(op, dtype)
    if noise is not None:
        args = [noise.to(dtype) if x.shape == noise.shape else x for x in args[:3]] + args[3:]

    def moved(x):
        is_tensor = torch.is_tensor(x)
        return x.detach().to(DEVICE).requires_grad_(x.requires_grad) if is_tensor else x

    return tree_map(moved, (args, options))


def run(op, case, dtype, backend, noise=None):
    args, options = arguments(op, case, dtype, noise)
    return values_and_gradients(getattr(ops, op), args, options, backend=backend)


def errors(got, exact):
    norm = torch.linalg.vector_norm
    return [
        (norm(x.double() - y) / norm(y).clamp_min(1e-9)).item()
        for x, y in zip(got, exact, strict=True)
    ]


def assert_all_match(got, exact, plains):
    """`plains`: two draws of the error of plain PyTorch, since one may be lucky in few numbers.

    Activations made of exponentials alone round once more than those of a library.
    """
    for kind, *four in zip(("value", "gradient"), got, exact, *plains, strict=True):
        for i, (x, y, *two) in enumerate(zip(*four, strict=True)):
            plain = max(two, key=lambda p, y=y: torch.linalg.vector_norm(p.double() - y).item())
            assert_matches(f"{kind} {i}", x, y, plain, factor=3.0)


def plains(op, case, noise):
    """The reference in float32 on the GPU, and as other libraries round it on the CPU."""
    on_cpu = scan_runs.run(op, case, torch.float32, "reference", noise)
    return run(op, case, torch.float32, "reference", noise), [
        [x.to(DEVICE) for x in part] for part in on_cpu
    ]


@BACKENDS
@EVERY_OP
@EVERY_CASE
def test_float32_agrees_with_the_reference(case, op, backend):
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    got = run(op, case, torch.float32, backend, noise)
    assert_all_match(got, exact, plains(op, case, noise))
    assert errors(got[0], exact[0])[0] < CAPS["highest"][0]


@BACKENDS
@EVERY_OP
@EVERY_CASE
def test_bfloat16_agrees_with_rounded_products(case, op, backend):
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    with RoundedProducts("bfloat16"):
        plain = plains(op, case, noise)
    with matmul_precision("medium"):
        got = run(op, case, torch.float32, backend, noise)
    assert_all_match(got, exact, plain)


@BACKENDS
@LARGE
@pytest.mark.parametrize("precision", CAPS)
@pytest.mark.parametrize("op", ["rssm_observe", "rssm_observe_policy"])
def test_published_sizes_stay_within_the_caps(op, precision, case, backend):
    noise = settled(op, case)
    exact = run(op, case, torch.float64, "reference", noise)
    with matmul_precision(precision):
        got = run(op, case, torch.float32, backend, noise)
    states, gradients = CAPS[precision]
    assert max(errors(got[0][:2], exact[0][:2])) < states
    assert max(errors(got[1], exact[1])) < gradients


@BACKENDS
def test_bfloat16_is_no_worse_than_autocast(backend):
    """Half as wrong again as what one would use without it; the reference does not autocast."""
    exact = run("rssm_observe", AIME, torch.float64, "reference")
    with RoundedProducts("bfloat16"):
        plain = run("rssm_observe", AIME, torch.float32, "reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run("rssm_observe", AIME, torch.float32, backend)
    for one, other in zip(errors(got[0], exact[0]), errors(plain[0], exact[0]), strict=True):
        assert one < 1.5 * other + 1e-5


@BACKENDS
@EVERY_OP
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_runs_are_equal_bit_for_bit_wherever_a_sequence_stands(op, precision, backend):
    case = ScanCase("many rows", T=3, B=131, D=37, S=11, cell="ln_gru_a", hidden=1)
    with matmul_precision(precision):
        first = run(op, case, torch.float32, backend)
        assert all(same(run(op, case, torch.float32, backend), first) for _ in range(4))
        args, options = arguments(op, case, torch.float32)

        def rolled(x):
            if not torch.is_tensor(x) or case.B not in x.shape:
                return x
            return x.detach().roll(20, x.shape.index(case.B))

        args, options = tree_map(rolled, (args, options))
        found = getattr(ops, op)(*args, **options, backend=backend)
    assert torch.equal(found.deter, first[0][0].roll(20, 1))


@BACKENDS
@EVERY_OP
def test_frozen_weights_and_no_gradient_change_nothing(op, backend):
    case = SCANS[1]
    values, _ = run(op, case, torch.float32, backend)
    args, options = arguments(op, case, torch.float32)
    with torch.no_grad():
        states = getattr(ops, op)(*args, **options, backend=backend)
    assert torch.equal(states.deter, values[0])
    frozen = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, args[-1])
    states = getattr(ops, op)(*args[:-1], frozen, **options, backend=backend)
    assert torch.equal(states.stoch, values[1])


@BACKENDS
@pytest.mark.parametrize("transform", [nullcontext, torch.inference_mode])
def test_an_empty_batch(transform, backend):
    case = ScanCase("empty", B=0)
    args, options = arguments("rssm_observe", case, torch.float32)
    with transform():
        states = ops.rssm_observe(*args, **options, backend=backend)
    assert states.deter.shape == (case.T, 0, case.D)
