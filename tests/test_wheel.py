"""What is packed is all that is needed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_holds_kernels_actors_and_modules(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = [*ROOT.glob("python/fastrssm/**/*.py"), *ROOT.glob("kernels/*.py")]
    wanted = {str(path.relative_to(ROOT)).removeprefix("python/fastrssm/") for path in sources}
    assert {f"fastrssm/{name}" for name in wanted} <= set(names)
    assert any(name.startswith("fastrssm/_native.") for name in names)
    assert any(name.startswith("fastrssm/_stepper.") for name in names)
    assert "fastrssm/data/experts/walker-walk.safetensors" in names
    assert "fastrssm/py.typed" in names
