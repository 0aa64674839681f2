"""The scans as the host code launches them, compiled for GPUs that are not here.

In a process without the interpreter the ops run on tensors without memory, and a driver that knows
an architecture but no device stands in for CUDA's: what it is asked to launch is compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.op_cases import ScanCase

ROOT = Path(__file__).resolve().parents[2]
# the published sizes
BASE = ScanCase("", T=1, B=1, D=512, S=128, A=6, width=128)
JOINT = replace(BASE, S=30, heads="joint", pre=512, hidden=1, width=512)
DISCRETE = replace(JOINT, S=1024, groups=32)
CASES = {
    "rssm": BASE,
    "rssmo": JOINT,
    "rssmo_v2": replace(JOINT, cell="ln_gru_a"),
    "discrete": replace(DISCRETE, cell="ln_gru_a"),
    "dreamer": replace(DISCRETE, cell="ln_gru_d", unimix=0.01),
    "dreamer_v3": replace(
        DISCRETE, cell="block_gru", S=128, pre=0, width=64, unimix=0.01, blocks=8, branch=64
    ),
}
CASES["dreamer_v3_12m"] = replace(CASES["dreamer_v3"], D=2048, S=512, width=256, branch=256)
STREAMED = ("rssm_forward_kernel", "rssm_backward_kernel")
# bytes of shared memory that a program may have
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# An allowance: presumably addresses of weights, the same at all steps, that are computed before the
# loop. 160 bytes are some dozens of loads a step among thousands.
STACK = 160


def launches(jobs):
    """What each kernel that a job launches needs; a job: case, op, precision, B, capability."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, json.dumps(jobs)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def check(jobs):
    for job, kernels in zip(jobs, launches(jobs), strict=True):
        name, _, precision, B, capability = job
        streamed = [x for x in kernels if x["name"] in STREAMED]
        assert len(streamed) == (2 if len(kernels) == 2 else 0), job
        for found in kernels:
            assert found["shared"] <= SHARED[capability], (job, found)
            assert found["stack"] <= (STACK if streamed else 0), (job, found)
        for found in streamed:
            # what a stage leaves is read behind a barrier, and never through the cache of constants
            assert found["barriers"] >= 4, (job, found)
            assert found["constant_loads"] == 0, (job, found)
            if precision == "float32":
                assert found["products"] == 0, (job, found)
                continue
            assert found["products"] > 0, (job, found)
            assert found["asynchronous"] > 0, (job, found)
            # wgmma with its left operand in registers may be compiled wrongly
            assert found["from_registers"] == 0, (job, found)
            if found["name"] == "rssm_forward_kernel":
                wide = capability == 90 and B > 4224 and not CASES[name].blocks
                assert (found["wgmma"] > 0) == wide, (job, found)


def test_common_launches_fit():
    check([
        ("rssm", "rssm_observe", "bfloat16", 50, 90),
        ("dreamer_v3", "rssm_imagine", "bfloat16", 50, 80),
        # hoisted
        ("rssmo_v2", "rssm_imagine", "split3", 50, 90),
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_all_launches_fit(name, capability):
    sizes = [("bfloat16", 50), ("bfloat16", 4000), ("bfloat16", 16384), ("split3", 50)]
    sizes += [("split3", 4000), ("float32", 50)]
    check([(name, "rssm_observe_policy", *size, capability) for size in sizes])
    check([(name, "rssm_imagine", *size, capability) for size in sizes[:3]])


class _Driver:
    """All that compiling asks of a driver."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def _needs(compiled):
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "name": compiled.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "barriers": ptx.count("bar.sync"),
        "asynchronous": ptx.count("cp.async.c"),
        "constant_loads": ptx.count("ld.global.nc"),
        "products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "from_registers": len(re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{", ptx)),
    }


def _compile(name, op, precision, B, capability):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastrssm import ops
    from fastrssm.ops import rssm_scan

    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.append(_needs(run(self, *args, grid=grid, warmup=True, **kwargs)))

    def of_batch(x, axis):
        shape = *x.shape[:axis], B, *x.shape[axis + 1 :]
        return torch.empty(shape, dtype=x.dtype, device="meta")

    def on_triton(*args):
        *inputs, weights, structure, constants, _, _ = args
        inputs = [
            None if x is None else of_batch(x, axis)
            for x, axis in zip(inputs, rssm_scan._AXES, strict=True)
        ]
        weights = [x.detach().to("meta") for x in weights]
        given = [*inputs, weights, structure, constants, precision, "triton", True]
        results = rssm_scan._forward(*given)
        grads = [x if x.numel() else None for x in results[:5]]
        wanted = [i not in (2, 3, 4) and x is not None for i, x in enumerate(inputs)]
        wanted += [True] * len(weights)
        rssm_scan._backward(*grads, *given, results, wanted)
        return results

    driver.set_active(_Driver(capability))
    JITFunction.run, rssm_scan._scan = compile_only, on_triton
    args, options = CASES[name].arguments(op)
    rssm_scan.resolve = lambda *_: "triton"
    getattr(ops, op)(*args, **options)
    JITFunction.run = run
    return found


if __name__ == "__main__":
    print(json.dumps([_compile(*job) for job in json.loads(sys.argv[1])]))
