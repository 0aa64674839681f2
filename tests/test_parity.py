"""An op name is a file stem everywhere: whoever knows one path knows all."""

from pathlib import Path

import pytest

from fastrssm._dispatch import OPS

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = (
    "python/fastrssm/ops/{}.py",
    "tests/ops/test_{}.py",
    "bench/ops/bench_{}.py",
)
PER_BACKEND = {
    "reference": "python/fastrssm/reference/{}.py",
    "cpu": "csrc/cpu/{}.cpp",
    "triton": "kernels/{}.py",
    "cuda": "csrc/cuda/{}.cu",
}


def test_every_card_is_in_the_table():
    cards = {path.stem for path in (ROOT / "python/fastrssm/ops").glob("*.py")} - {"__init__"}
    assert cards == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_has_all_its_files_and_no_other(op):
    for pattern in ALWAYS:
        assert (ROOT / pattern.format(op)).is_file()
    for backend, pattern in PER_BACKEND.items():
        assert (ROOT / pattern.format(op)).is_file() == (backend in OPS[op]), pattern.format(op)


@pytest.mark.parametrize("op", OPS)
def test_op_is_in_the_changelog(op):
    assert f"`ops.{op}`" in (ROOT / "CHANGELOG.md").read_text()


def test_no_kernel_without_a_card():
    for pattern in list(PER_BACKEND.values())[1:]:
        folder, name = pattern.rsplit("/", 1)
        stems = {path.stem for path in (ROOT / folder).glob(name.format("*"))}
        assert stems - {"__init__", "probe"} <= set(OPS)
