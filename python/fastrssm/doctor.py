"""What this installation can do, why it cannot do the rest, and whether it computes correctly."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch

import fastrssm
from fastrssm import ops

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "mujoco",
    "dm-control",
    "numba",
    "gymnasium",
    "tyro",
    "rich",
    "tensorboard",
    "safetensors",
    "imageio-ffmpeg",
)
_GL = {"egl": ("libEGL.so.1", "libegl1"), "osmesa": ("libOSMesa.so.8", "libosmesa6")}
_DRAW = "import mujoco; c = mujoco.GLContext(64, 64); c.make_current(); c.free()"
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def main() -> int:
    """Print the report; returns 0, or 1 if something that is installed does not work."""
    sections: dict[str, Callable[[], tuple[dict[str, str], bool]]] = {
        "versions": _versions,
        "machine": _machine,
        "backends": _backends,
        "OpenGL (only for videos and images)": _opengl,
        "self-test": _self_test,
    }
    healthy = True
    for title, section in sections.items():
        lines, good = section()
        healthy = healthy and good
        print(title)
        width = max(map(len, lines))
        for name, text in lines.items():
            print(f"  {name:{width}}  {text}")
    print("all is well" if healthy else "something is broken, see above")
    return 0 if healthy else 1


def _versions() -> tuple[dict[str, str], bool]:
    lines = {"python": platform.python_version(), "fastrssm": fastrssm.__version__}
    for name in _PACKAGES:
        try:
            lines[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines[name] = "not installed"
    good = True
    if lines["mujoco"][0].isdigit():
        major, minor = map(int, lines["mujoco"].split(".")[:2])
        if not (3, 17) <= (major, minor) < (4, 0):
            lines["mujoco"] += ": too old or too new, pip install 'mujoco>=3.17,<4'"
            good = False
    return lines, good


def _machine() -> tuple[dict[str, str], bool]:
    words: set[str] = set()
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    model = value.strip()
                if name.strip() in ("flags", "Features"):
                    words = set(value.split())
    gpu = "none"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {
        "cpu": f"{model}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable",
        "instructions": " ".join(name for name in _ISA if name in words) or "unknown",
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'not set')})",
        "gpu": gpu,
    }, True


def _backends() -> tuple[dict[str, str], bool]:
    table = fastrssm.backends()
    lines = {
        op: ", ".join(name for name, reason in row.items() if reason is None)
        for op, row in table.items()
    }
    for op, row in table.items():
        for name, reason in row.items():
            # what an op never had is no fault of this installation
            if reason is not None and not reason.startswith(op):
                lines[f"no {name}"] = reason
    return lines, True


def _opengl() -> tuple[dict[str, str], bool]:
    lines: dict[str, str] = {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "not set")}
    for name, (library, package) in _GL.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            lines[name] = f"{library} is missing: apt install {package}"
            continue
        # a failing driver may end the process, so it is another one
        done = subprocess.run(
            [sys.executable, "-c", _DRAW],
            env={**os.environ, "MUJOCO_GL": name},
            capture_output=True,
            text=True,
            check=False,
        )
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        lines[name] = "usable" if done.returncode == 0 else f"not usable: {reason}"
    return lines, True


def _self_test() -> tuple[dict[str, str], bool]:
    tests = {"gaussian_kl": _test_kl, "environment": _test_environment}
    lines: dict[str, str] = {}
    good = True
    for name, test in tests.items():
        try:
            lines[name] = test()
        except Exception as error:  # whatever it is, the user wants to read it here
            lines[name] = f"FAILED: {type(error).__name__}: {error}"
            good = False
    return lines, good


def _test_kl() -> str:
    random = torch.Generator().manual_seed(0)
    sizes = (2, 64, 32)
    means = torch.randn(sizes, generator=random)
    stds = torch.rand(sizes, generator=random) + 0.5
    inputs = (means[0], stds[0], means[1], stds[1])
    exact = ops.gaussian_kl(*(x.double() for x in inputs), backend="reference")
    got = ops.gaussian_kl(*inputs, backend="cpu").double()
    error = float(((got - exact).abs() / exact).max())
    # 32 terms, each a few roundings of float32
    if not error < 32 * torch.finfo(torch.float32).eps:
        raise ArithmeticError(f"cpu differs from the reference by {error:.1e}")
    return f"cpu agrees with the reference to {error:.1e}"


def _test_environment() -> str:
    try:
        from fastrssm.envs import make_vec
    except ModuleNotFoundError as error:
        return f"skipped: {error.name} is not installed, pip install 'fastrssm[sim]'"
    env = make_vec("walker-walk", 2)
    env.reset(seed=0)
    obs, reward, *_ = env.step(np.zeros((2, env.task.action_size)))
    env.close()
    finite = all(np.isfinite(value).all() for value in obs.values())
    if not (finite and ((reward >= 0) & (reward <= env.action_repeat)).all()):
        raise ArithmeticError(f"a step of walker-walk gives rewards {reward.tolist()}")
    return f"walker-walk steps, height {float(obs['height'][0, 0]):.3f} m"
