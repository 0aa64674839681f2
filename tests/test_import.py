"""`import fastrssm` is light, and the process has one OpenMP."""

import subprocess
import sys

HEAVY = {
    "triton", "mujoco", "dm_control", "numba", "matplotlib", "gymnasium", "tyro", "rich",
    "tensorboard", "safetensors", "torch._dynamo",
}  # fmt: skip


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_is_light():
    code = "import sys, fastrssm, fastrssm.ops, fastrssm.models; print(*sys.modules)"
    assert HEAVY & set(run(code).stdout.split()) == set()


def test_one_openmp_whichever_is_imported_first():
    maps = (
        "print(*{line.split()[-1] for line in open('/proc/self/maps')"
        " if 'libgomp' in line or 'libomp' in line or 'libiomp' in line}, sep='\\n')"
    )
    for first, second in (("torch", "fastrssm._native"), ("fastrssm._native", "torch")):
        assert len(run(f"import {first}, {second}; {maps}").stdout.split()) == 1


def test_native_module_loads_without_driver_and_says_why():
    code = "from fastrssm import _native; print(_native.cuda_status())"
    found = run(f"import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; {code}").stdout.strip()
    assert "CUDA" in found
