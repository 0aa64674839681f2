"""The stubs of the native modules that are checked in are the ones their binaries give."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastrssm import _native

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", ["_native", "_stepper"])
def test_stub_is_current(tmp_path, module):
    if module == "_native" and _native.cuda_status() == "built without CUDA":
        pytest.skip("the stub describes the build with CUDA")
    command = [sys.executable, "-m", "pybind11_stubgen", f"fastrssm.{module}", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    fresh = (tmp_path / f"fastrssm/{module}.pyi").read_text()
    assert fresh == (ROOT / f"python/fastrssm/{module}.pyi").read_text(), "run `make stubs`"
