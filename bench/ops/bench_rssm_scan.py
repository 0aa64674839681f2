"""RSSM sequences against what one would write without this package: workloads W1 to W6, DV3.

A call filters a batch of sequences, from embeddings and actions to states, and compares the
posterior with the prior; or imagines them (rssm_problem.py). Peers compute the same numbers from
the same modules and noise, which is checked against float64 before anything is timed; the note of
a provider is its relative error, and what its first calls took (compilation, with the caches that
there were). torchrl has weights and noise of its own, and but for DreamerV3 networks without norms.

float32: where products of "medium" precision do not round to bfloat16, because the processor has
no units for it, they are torch's fastest in float32; peers that use them end in "-onednn".
bfloat16: products of bfloat16 numbers, sums and states in float32. With a categorical latent such
rounding draws other classes, so only the first step is compared.
"""

import copy
import functools
import importlib.util
import os
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch

from bench import peak
from bench.harness import ROUNDS, Workload
from bench.ops import rssm_jax
from bench.ops.rssm_peers import hoisted, textbook, textbook_step
from bench.ops.rssm_problem import Case, Exact, Problem, outputs
from fastrssm import use_backend
from fastrssm.models.config import AIME_RSSM, AIME_RSSMO, AIME_V2_DISCRETE, DREAMER_V3_1M

MODES = ("fwd", "fwdbwd")
DTYPES = ("float32", "bfloat16")
W1 = Case("W1 rssm, 50 x 50", AIME_RSSM, embed=24, batch=50, length=50)
# relative errors that no rounding explains; products of AMX or vdpbf16ps round to 2^-9
_LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}
# graphs of all providers share the counter of one function
torch._dynamo.config.recompile_limit = 64


class Calls(NamedTuple):
    """A provider: calls for results and gradients, and their error."""

    forward: object
    gradients: object
    merged: bool = False  # gradients of the layers, not of the modules

    def of(self, mode):
        return self.forward if mode == "fwd" else self.gradients


@functools.cache
def exact_medium():
    """Whether products of medium precision keep float32."""
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(64, 512, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    got = (a @ w.T).double()
    torch.set_float32_matmul_precision(before)
    exact = a.double() @ w.double().T
    return bool((got - exact).norm() < 1e-5 * exact.norm())


def at(precision, function):
    def call():
        torch.set_float32_matmul_precision(precision)
        return function()

    return call


def of_torch(problem, run, precision, learnt=None):
    learnt = problem.learnt() if learnt is None else learnt

    def gradients():
        return torch.autograd.grad(run(), learnt, problem.upstream)

    return Calls(at(precision, torch.no_grad()(run)), at(precision, gradients))


def ours(problem, backend):
    def run():
        with use_backend(backend):
            return outputs(problem)

    return run


def autocast(run):
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return call


def _has_torchrl(case):
    """Whether it is installed and has such a network."""
    joint = case.config.heads == "joint" and not case.policy
    return joint and importlib.util.find_spec("torchrl") is not None


def providers(problem, dtype, lean=False):
    """All providers; lean: without eager loops, which others beat, and JAX, which needs 12 GB."""
    run, case = partial(of_torch, problem), problem.case
    if dtype == "float32":
        fastest, suffix = ("medium", "-onednn") if exact_medium() else ("highest", "")
        found = {
            "textbook": run(textbook(problem), "highest"),
            f"textbook-compiled{suffix}": run(textbook(problem, compiled=True), fastest),
            f"hoisted-compiled{suffix}": run(hoisted(problem, compiled=True), fastest),
        }
        if suffix:
            found[f"hoisted{suffix}"] = run(hoisted(problem), fastest)
        precision = "highest"
    else:
        bfloat16 = torch.bfloat16
        found = {
            "textbook-autocast": run(autocast(textbook(problem)), "highest"),
            "textbook-compiled": run(autocast(textbook(problem, compiled=True)), "highest"),
            "hoisted": run(hoisted(problem, bfloat16), "highest"),
            "hoisted-compiled": run(hoisted(problem, bfloat16, compiled=True), "highest"),
        }
        precision = "medium"
    if lean:
        del found["textbook" if dtype == "float32" else "textbook-autocast"]
    else:
        found["jax"] = Calls(*rssm_jax.calls(problem, dtype), merged=True)
    if _has_torchrl(case) and not lean:
        from bench.ops import rssm_torchrl

        for name, (call, learnt) in rssm_torchrl.sequences(problem).items():
            call = call if dtype == "float32" else autocast(call)
            found[name] = run(call, "medium", learnt)
    if not lean:
        found["fastrssm-reference"] = run(ours(problem, "reference"), precision)
    found["fastrssm-cpu"] = run(ours(problem, "cpu"), precision)
    return found


def checked(name, calls, exact, dtype, categorical):
    """Call once and compare; return what is said of the provider."""
    start = time.perf_counter()
    states, gradients = calls.forward(), calls.gradients()
    took = f"first calls {time.perf_counter() - start:.1f} s"
    if name.startswith("torchrl"):
        return f"weights and noise of its own, {took}"
    if calls.merged:
        states, gradients = rssm_jax.tensors(states), rssm_jax.tensors(gradients)
    redrawn = categorical and dtype == "bfloat16"
    error = exact.states_error(states, 1 if redrawn else None)
    assert error < _LIMITS[dtype], f"{name}: error {error:.1e}"
    said = f"error {error:.1e}{' of the first step' if redrawn else ''}"
    if exact.whole and not redrawn:
        error = exact.gradients_error(gradients, calls.merged)
        assert error < _LIMITS[dtype], f"{name}: error {error:.1e} of the gradient"
        said += f", of the gradient {error:.1e}"
    return f"{said}, {took}"


def pin(threads):
    """JAX has as many threads as the process has processors when it starts."""
    if threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def sequences(case, threads, *, rounds=ROUNDS, modes=MODES, lean=False):
    pin(threads)
    problem = Problem(case)
    exact = Exact(problem)
    for dtype in DTYPES:
        torch.compiler.reset()
        found = providers(problem, dtype, lean)
        categorical = case.config.latent == "categorical"
        notes = {
            name: checked(name, calls, exact, dtype, categorical) for name, calls in found.items()
        }
        plain = of_torch(problem, ours(problem, "reference"), "highest")
        for mode in modes:
            limit, run = peak.limit(peak.flop(plain.of(mode)), dtype, threads)
            calls = {limit: run, **{name: calls.of(mode) for name, calls in found.items()}}
            yield Workload(
                "rssm_scan", case.name, mode, dtype, "cpu", None, calls, limit, notes, rounds
            )
    torch.set_float32_matmul_precision("highest")


def w1(threads):
    return sequences(W1, threads)


def w2(threads):
    case = Case("W2 rssmo, 50 x 50", AIME_RSSMO, embed=512, batch=50, length=50)
    return sequences(case, threads)


def w3(threads):
    case = Case("W3 discrete, 16 x 64", AIME_V2_DISCRETE, embed=1024, batch=16, length=64)
    return sequences(case, threads)


def dv3(threads):
    case = Case("DV3 dreamer v3 1M, 16 x 64", DREAMER_V3_1M, embed=1024, batch=16, length=64)
    return sequences(case, threads)


def w3_imagine(threads):
    name = "W3 imagination, 1024 x 15"
    case = Case(name, AIME_V2_DISCRETE, embed=0, batch=1024, length=15, policy=True)
    return sequences(case, threads, rounds=5)


def w4(threads):
    case = Case("W4 rssm, 512 x 50", AIME_RSSM, embed=24, batch=512, length=50)
    return sequences(case, threads, rounds=5)


def w4_2048(threads):
    case = Case("W4 rssm, 2048 x 50", AIME_RSSM, embed=24, batch=2048, length=50)
    return sequences(case, threads, rounds=3, modes=("fwdbwd",), lean=True)


def w6(threads):
    name = "W6 rssm with a policy, 50 x 50"
    return sequences(Case(name, AIME_RSSM, 24, 50, 50, policy=True), threads)


def w5(threads):
    """One acting step as an acting loop calls it; its bound is that the weights are read once."""
    pin(threads)
    problem = Problem(Case("W5 rssm, one step", AIME_RSSM, embed=24, batch=1, length=1))
    exact, rssm = Exact(problem), problem.rssm
    embed, action, noise = (x[0].detach() for x in (problem.embed, problem.action, problem.noise))
    parameters = sum(
        p.numel() for name, p in rssm.named_parameters() if not name.startswith("prior")
    )
    ours = partial(rssm.step, embed, action, problem.state, noise=noise)

    def reference():
        with use_backend("reference"):
            return ours()

    def plainly(dtype, compiled):
        given = (x.to(dtype) for x in (*problem.state, action, embed, noise))
        step = partial(textbook_step, copy.deepcopy(rssm).to(dtype), None, False)
        step = torch.compile(step, dynamic=False) if compiled else step
        return lambda given=tuple(given): step(*given, None)[:2]

    # fails where ours would not run on what its row names
    with use_backend("cpu"):
        ours()
    for name, precision in zip(DTYPES, ("highest", "medium"), strict=True):
        torch.compiler.reset()
        torch.set_float32_matmul_precision(precision)
        dtype = getattr(torch, name)
        steps = {
            "textbook": plainly(dtype, compiled=False),
            "textbook-compiled": plainly(dtype, compiled=True),
            "jax": rssm_jax.acting(problem),
            "fastrssm-reference": reference,
            "fastrssm-cpu": ours,
        }
        # while they are checked and timed
        with torch.no_grad():
            notes = {}
            for provider, step in steps.items():
                found = rssm_jax.tensors(step()) if provider == "jax" else step()
                error = exact.states_error([x.unsqueeze(0) for x in found], None)
                assert error < _LIMITS[name], f"{provider}: error {error:.1e}"
                notes[provider] = f"error {error:.1e}"
            limit = "weights read once"
            calls = {limit: peak.reading(parameters * dtype.itemsize), **steps}
            yield Workload(
                "rssm_scan", problem.case.name, "step", name, "cpu", None, calls, limit, notes
            )
    torch.set_float32_matmul_precision("highest")


PROVIDERS = ("textbook", "jax", "fastrssm-reference", "fastrssm-cpu")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
def test_speed(benchmark, mode, provider):
    torch.set_num_threads(1)
    pin(1)
    call = providers(Problem(W1), "float32")[provider].of(mode)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
