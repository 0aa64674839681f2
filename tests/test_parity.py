"""An op name is a file stem everywhere: whoever knows one path knows all."""

from pathlib import Path

import pytest

from fastrssm._dispatch import OPS

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = (
    "python/fastrssm/ops/{}.py",
    "tests/ops/test_{}.py",
)
BENCH = "bench/ops/bench_{}.py"
PER_BACKEND = {
    "reference": "python/fastrssm/reference/{}.py",
    "cpu": "csrc/cpu/{}.cpp",
    "triton": "kernels/{}.py",
    "cuda": "csrc/cuda/{}.cu",
}
# behind their cards the four scans are one op: its files by backend, its benchmark and its parts
SCANS = {op for op in OPS if op.startswith("rssm_")}
SCAN_FILES = {"cpu": "csrc/cpu/rssm_scan.h", "triton": "kernels/rssm_scan.py"}
SCAN_CARDS = {"rssm_scan", "rssm_plan", "rssm_cpu", "acting", "rssm_triton", "rssm_cuda"}
SCAN_CARDS |= {"rssm_cuda_weights"}
# what kernels are made of
PARTS = {
    "csrc/cpu": {"acting", "buffer", "gemm", "rssm_forward", "rssm_backward", "rssm_plan"},
    "csrc/cuda": {"probe", "rssm_scan", "rssm_forward", "rssm_backward"},
    "kernels": {"__init__", "rssm_scan", "rssm_layout", "rssm_pointwise", "rssm_tiles"}
    | {"rssm_forward", "rssm_backward", "rssm_layers", "rssm_blocks"}
    | {"rssm_step", "rssm_step_backward", "rssm_hoisted"},
}


def file_of(op, backend):
    """Path of the kernel of an op on a backend."""
    if op in SCANS and backend != "reference":
        return SCAN_FILES.get(backend, PER_BACKEND[backend].format("rssm_scan"))
    return PER_BACKEND[backend].format(op)


def test_every_card_is_in_the_table():
    cards = {path.stem for path in (ROOT / "python/fastrssm/ops").glob("*.py")} - {"__init__"}
    assert cards - SCAN_CARDS == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_has_all_its_files_and_no_other(op):
    for pattern in ALWAYS:
        assert (ROOT / pattern.format(op)).is_file()
    assert (ROOT / BENCH.format("rssm_scan" if op in SCANS else op)).is_file()
    for backend in PER_BACKEND:
        path = file_of(op, backend)
        assert (ROOT / path).is_file() == (backend in OPS[op]), path


@pytest.mark.parametrize("op", OPS)
def test_op_is_in_the_changelog(op):
    assert f"`ops.{op}`" in (ROOT / "CHANGELOG.md").read_text()


def test_no_kernel_without_a_card():
    for pattern in list(PER_BACKEND.values())[1:]:
        folder, name = pattern.rsplit("/", 1)
        stems = {path.stem for path in (ROOT / folder).glob(name.format("*"))}
        assert stems - PARTS[folder] <= set(OPS)
