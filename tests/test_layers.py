"""Who may import whom."""

import ast
import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ROOT = CSRC.parent / "python/fastrssm"
# a layer is a folder or a top file; its value: the layers of the package it may import
LAYERS = {
    "reference": {"reference"},
    "kernels": {"kernels"},
    "_dispatch": {"_native"},
    "_library": {"_native"},
    "ops": {"reference", "kernels", "_dispatch", "_library", "_native", "ops"},
    "models": {"ops", "models"},
    "envs": {"_stepper", "envs"},
    "data": {"data"},
    "run": {"models", "envs", "data", "run"},
    "distributed": set(),
    "algos": {"ops", "models", "envs", "data", "run"},
    "interop": {"models", "ops"},
    "convert": {"data"},
    "demo": {"algos", "envs", "models", "run"},
    "doctor": {"", "envs", "ops"},
    "cli": {"", "algos", "data", "demo", "doctor", "interop", "run"},
    "__main__": {"cli"},
    "__init__": {"_dispatch", "ops"},
}
# all that these layers may import from outside the standard library
OUTSIDE = {
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "_dispatch": {"torch"},
    "_library": {"torch"},
    "ops": {"torch"},
    "models": {"torch"},
    "envs": {
        "numpy",
        "llvmlite",
        "numba",
        "gymnasium",
        "mujoco",
        "dm_control",
        "dm_env",
        "imageio",
    },
}
# and these packages belong to these files or folders alone
OWNERS = {
    "tyro": {"cli.py"},
    "rich": {"run/log.py"},
    "tensorboard": {"run/log.py"},
    "wandb": {"run/log.py"},
    "triton": {"kernels/"},
    "matplotlib": {"run/report.py"},
    "sbx": {"run/expert.py"},
    "stable_baselines3": {"run/expert.py"},
}


NAMES = {*LAYERS, "_native", "_stepper"}


def imports(path):
    """Yield (package, layer of ours or "") for every import of a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "fastrssm":
                names = [f"fastrssm.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            layer = rest.partition(".")[0]
            yield package, layer if layer in NAMES else ""


def may_import(file, package, ours):
    layer = file.parts[0].removesuffix(".py")
    if package == "fastrssm":
        return ours in LAYERS[layer]
    if package in sys.stdlib_module_names:
        return True
    if package in OWNERS:
        return file.as_posix().startswith(tuple(OWNERS[package]))
    return package in OUTSIDE.get(layer, {package})


def test_layers():
    files = list(ROOT.rglob("*.py")) + list((ROOT / "kernels").glob("*.py"))
    assert len(files) > len(LAYERS)
    wrong = {
        f"{path.relative_to(ROOT)} imports {package} {ours}"
        for path in files
        for package, ours in imports(path)
        if not may_import(path.relative_to(ROOT), package, ours)
    }
    assert wrong == set()


def test_native_layers():
    """C++: cpu and cuda include common only, env neither; pybind11 stays in the bindings."""
    allowed = {
        "common": {"common"},
        "cpu": {"common", "cpu"},
        "cuda": {"common", "cuda"},
        "env": {"env"},
    }
    wrong = []
    for path in sorted(CSRC.rglob("*.*")):
        if path.suffix not in (".h", ".cpp", ".cu") or "bindings" in path.stem:
            continue
        for include in re.findall(r"#include [<\"](\w+)(?:/|\.h)", path.read_text()):
            ours = include in allowed and include not in allowed[path.parent.name]
            if ours or include in ("pybind11", "Python", "torch"):
                wrong.append(f"{path.relative_to(CSRC)} includes {include}")
    assert wrong == []
