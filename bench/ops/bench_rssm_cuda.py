"""The sequences of bench_rssm_scan on a GPU: W1, W2, W3, DV3 and W6, and larger batches of two.

Peers: the textbook loop as it is, in one CUDA graph, and with its step compiled by the mode
reduce-overhead; the hoisted loop in one graph, plain and with its step compiled; torchrl's rollouts
where it is installed and has such a network (but for DreamerV3 without norms). Nothing of
torch.distributions, and so no validation, is in the others. Each is compared with float64 before it
is timed; its note is its relative error, what its first calls took, and the memory they needed.

tf32: float32 with products of TF32. bfloat16: autocast, and a hoisted peer whose products alone are
bfloat16. With a categorical latent such rounding draws other classes, so only the first step is
compared. The limit is one large product of cuBLAS with as many operations.
"""

import importlib.util
import time
from dataclasses import replace
from functools import partial

import torch

import fastrssm
from bench import cuda, peak
from bench.harness import ROUNDS, Workload
from bench.ops.rssm_peers import hoisted, textbook
from bench.ops.rssm_problem import Case, Exact, Problem, outputs
from fastrssm import use_backend
from fastrssm.models.config import AIME_RSSM, AIME_RSSMO, AIME_V2_DISCRETE, DREAMER_V3_1M

MODES = ("fwd", "fwdbwd")
W1 = Case("W1 rssm, 50 x 50", AIME_RSSM, embed=24, batch=50, length=50)
W2 = Case("W2 rssmo, 50 x 50", AIME_RSSMO, embed=512, batch=50, length=50)
W3 = Case("W3 discrete, 16 x 64", AIME_V2_DISCRETE, embed=1024, batch=16, length=64)
DV3 = Case("DV3 dreamer v3 1M, 16 x 64", DREAMER_V3_1M, embed=1024, batch=16, length=64)
BATCHES = (1024, 16384, 256, 16, 4096, 1)
# a graph beats a loop, and compiling takes most of the time there is
SLOW = ("textbook", "textbook-reduce-overhead", "torchrl", "torchrl-compiled")
TINY = replace(AIME_RSSM, deter=16, stoch=4, hidden=8)
TINY_DV3 = replace(DREAMER_V3_1M, deter=16, stoch=6, groups=2, hidden=8, blocks=2)
# a relative error that no rounding explains
_WRONG = 0.2
# graphs of all providers share the counter of one function
torch._dynamo.config.recompile_limit = 64


def ours(problem, backend):
    def whole():
        with use_backend(backend):
            return outputs(problem)

    # the losses have not all the backends of the scans
    return whole if backend == "reference" else partial(outputs, problem, backend)


def backends(device):
    """Those of the scans that run here."""
    names = ("triton", "cuda", "reference") if device == "cuda" else ("reference",)
    able = fastrssm.backends()["rssm_observe"]
    return [name for name in names if able[name] is None]


def calls(problem, run, modes, capture, mixed, learnt=None):
    """The calls of a provider by mode, as they are or `capture`d; mixed: under autocast."""
    learnt = problem.learnt() if learnt is None else learnt
    device = problem.noise.device.type

    def results():
        # what autocast leaves in float32 is TF32 as well
        torch.set_float32_matmul_precision("high")
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            return [x.float() for x in run()]

    def gradients():
        return torch.autograd.grad(results(), learnt, problem.upstream)

    found = {"fwd": torch.no_grad()(results), "fwdbwd": gradients}
    return {mode: capture(found[mode]) for mode in modes}


def makers(problem, dtype, modes):
    """{provider: function that makes its calls}.

    On a CPU, which is a rehearsal, nothing is captured or compiled.
    """
    device = problem.noise.device.type
    graph, compiled = (cuda.captured, True) if device == "cuda" else (_as_it_is, False)
    bfloat16 = dtype == "bfloat16"

    def make(run, capture, mixed=bfloat16):
        # autocast would repeat the casts of a hoisted peer
        return lambda: calls(problem, run(), modes, capture, mixed)

    def hoist(compiled=False):
        return hoisted(problem, getattr(torch, "bfloat16" if bfloat16 else "float32"), compiled)

    found = {
        "textbook": make(lambda: textbook(problem), _as_it_is),
        "textbook-graph": make(lambda: textbook(problem), graph),
        "textbook-reduce-overhead": make(
            lambda: textbook(problem, compiled and "reduce-overhead"), _as_it_is
        ),
        "hoisted-graph": make(hoist, graph, mixed=False),
        "hoisted-compiled-graph": make(lambda: hoist(compiled), graph, mixed=False),
    }
    joint = problem.rssm.config.heads == "joint" and problem.policy is None
    if joint and importlib.util.find_spec("torchrl") is not None:
        from bench.ops import rssm_torchrl

        for name, (run, learnt) in rssm_torchrl.sequences(problem).items():
            found[name] = partial(calls, problem, run, modes, _as_it_is, bfloat16, learnt)
    for backend in backends(device):
        found[f"fastrssm-{backend}"] = make(lambda b=backend: ours(problem, b), _as_it_is)
        found[f"fastrssm-{backend}-graph"] = make(lambda b=backend: ours(problem, b), graph)
    return found


def _as_it_is(call):
    return call


def checked(name, made, exact, first_step_only):
    """Call once and compare; return what is said of the provider."""
    if name.startswith("torchrl"):
        for call in made.values():
            call()
        return ["weights and noise of its own"]
    error = exact.states_error(made["fwd"](), 1 if first_step_only else None)
    said = [f"error {error:.1e}{' of the first step' if first_step_only else ''}"]
    gradients = made["fwdbwd"]() if "fwdbwd" in made else None
    if gradients is not None and exact.whole and not first_step_only:
        of_gradient = exact.gradients_error(gradients, merged=False)
        said.append(f"of the gradient {of_gradient:.1e}")
        error = max(error, of_gradient)
    if not error < _WRONG:
        raise ArithmeticError(", ".join(said))
    return said


def operations(case, mode):
    """Of the products of a case; they are proportional to the batch."""
    problem = Problem(replace(case, batch=1))
    run = calls(problem, ours(problem, "reference"), (mode,), _as_it_is, mixed=False)
    return case.batch * peak.flop(run[mode])


def prepared(name, maker, exact, first_step_only, device):
    """Make a provider; return its calls and what is said of it."""
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    made = maker()
    said = checked(name, made, exact, first_step_only)
    said.append(f"first calls {time.perf_counter() - start:.1f} s")
    if device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated() - before
        said.append(f"memory {peak_bytes / 1e6:.0f} MB")
    return made, ", ".join(said)


def sequences(case, dtypes, *, rounds=50, modes=MODES, without=(), device="cuda"):
    problem = Problem(case, device)
    exact = Exact(problem)
    first_step_only = case.config.latent == "categorical"
    for dtype in dtypes:
        torch.compiler.reset()
        found, notes, failed = {}, {}, {}
        for name, maker in makers(problem, dtype, modes).items():
            if name in without:
                continue
            try:
                made = prepared(name, maker, exact, first_step_only, device)
                found[name], notes[name] = made
            except Exception as error:
                # it becomes the row of the provider
                reason = str(error).strip().splitlines() or [""]
                failed[name] = f"failed: {type(error).__name__}: {reason[0][:200]}"
        for mode in modes:
            timed, limit = {name: made[mode] for name, made in found.items()}, None
            if device == "cuda":
                limit, run = cuda.limit(operations(case, mode), dtype)
                timed = {limit: run, **timed}
            yield Workload(
                "rssm_scan", case.name, mode, dtype, device, 1 << 20, timed, limit, notes, rounds,
                failed,
            )  # fmt: skip
    torch.set_float32_matmul_precision("highest")


def w1(threads):
    yield from sequences(W1, ("bfloat16",))
    yield from sequences(W1, ("tf32",), without=SLOW)


def w2(threads):
    return sequences(W2, ("bfloat16", "tf32"), without=SLOW)


def w3(threads):
    return sequences(W3, ("bfloat16", "tf32"), without=SLOW)


def dv3(threads):
    yield from sequences(DV3, ("bfloat16", "tf32"), without=SLOW)
    many = replace(DV3, name="dreamer v3 1M, 4096 x 64", batch=4096)
    without = (*SLOW, "hoisted-compiled-graph")
    yield from sequences(many, ("bfloat16",), rounds=30, without=without)


def torchrl(threads):
    """Measure torchrl beside ours, apart from the other peers: it compiles for a minute."""
    others = ("textbook", "textbook-reduce-overhead", "textbook-graph", "hoisted-compiled-graph")
    for case in (DV3, W3, W2):
        yield from sequences(case, ("bfloat16",), without=others)


def w3_imagine(threads):
    name = "W3 imagination, 1024 x 15"
    case = Case(name, AIME_V2_DISCRETE, embed=0, batch=1024, length=15, policy=True)
    return sequences(case, ("bfloat16",), without=SLOW)


def w6(threads):
    case = Case("W6 rssm with a policy, 50 x 50", AIME_RSSM, 24, 50, 50, policy=True)
    return sequences(case, ("bfloat16",), without=SLOW)


def batches(threads):
    for batch in BATCHES:
        case = replace(W1, name=f"rssm, {batch} x 50", batch=batch)
        largest = batch == max(BATCHES)
        # the graphs of all peers hold their memory at once
        modes = ("fwd",) if largest else MODES
        without = SLOW if largest else (*SLOW, "hoisted-compiled-graph")
        yield from sequences(case, ("bfloat16",), rounds=30, modes=modes, without=without)


def rehearsal(threads):
    """Everything but the GPU, on sequences that take no time."""
    for name, config in (("rehearsal", TINY), ("rehearsal of dreamer v3", TINY_DV3)):
        case = Case(name, config, embed=5, batch=3, length=2)
        yield from sequences(case, ("tf32",), rounds=ROUNDS, device="cpu")
