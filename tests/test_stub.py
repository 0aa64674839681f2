"""The stub of the native module that is checked in is the one its binary gives."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastrssm import _native

ROOT = Path(__file__).resolve().parents[1]


def test_stub_is_current(tmp_path):
    if _native.cuda_status() == "built without CUDA":
        pytest.skip("the stub describes the build with CUDA")
    command = [sys.executable, "-m", "pybind11_stubgen", "fastrssm._native", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    fresh = (tmp_path / "fastrssm/_native.pyi").read_text()
    assert fresh == (ROOT / "python/fastrssm/_native.pyi").read_text(), "run `make stubs`"
