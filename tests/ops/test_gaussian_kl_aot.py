"""gaussian_kl compiled for GPUs that are not here: registers, spills, vectorised loads."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ahead_of_time import compile_kernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INPUTS = ("post_mean", "post_std", "prior_mean", "prior_std")
SCALARS = {"N": "i32", "S": "i32", "post_scale": "fp32", "prior_scale": "fp32", "free_nats": "fp32"}
KERNELS = {
    "gaussian_kl_forward_kernel": (("kl",), (), ("N", "S")),
    "gaussian_kl_backward_kernel": (("grad", "kl"), [f"{name}_grad" for name in INPUTS], SCALARS),
}


def test_triton_kernels_compile_without_spills():
    jobs = [
        (
            "fastrssm.kernels.gaussian_kl",
            kernel,
            capability,
            dict.fromkeys((*INPUTS, *outputs), f"*{dtype}") | dict.fromkeys(per_row, "*fp32"),
            {name: SCALARS[name] for name in scalars},
            {"BLOCK_N": 8, "BLOCK_S": 128},
        )
        for kernel, (per_row, outputs, scalars) in KERNELS.items()
        for dtype in ("fp32", "bf16")
        for capability in (80, 90)
    ]
    for job, found in zip(jobs, compile_kernels(jobs), strict=True):
        assert found["stack"] == 0, job
        assert found["registers"] <= 255, job
        assert found["load_bits"] >= 64, job


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_compile_without_spills(tmp_path):
    architectures = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    command = ["nvcc", "-std=c++17", "-O3", "-I", CSRC, *architectures, "-Xptxas", "-v"]
    source = CSRC / "cuda/gaussian_kl.cu"
    command += ["-c", source, "-o", tmp_path / "gaussian_kl.o"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
    # forward and backward, float32 and bfloat16, two architectures
    assert frames == [("0", "0")] * 8
