"""Clusters or Triton: chosen by the number of rows, on fake tensors of a GPU."""

from dataclasses import replace

import pytest
import torch
from cluster_emulation import Emulator, forget
from scan_runs import CASES, matmul_precision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from fastrssm import _dispatch
from fastrssm.ops import rssm_cuda
from fastrssm.ops.rssm_scan import Inputs, prepare


class _Hopper(Emulator):
    """A device that has room for every cluster."""

    def rssm_cluster_refusal(self, layout, backward, ranks, rows):
        return (self._sizes(layout, backward, ranks, rows)[0] or b"").decode()

    def cuda_status(self):
        return ""


@pytest.fixture(autouse=True)
def _everything_is_there(monkeypatch):
    monkeypatch.setattr(_dispatch, "_ON_REQUEST", frozenset())
    monkeypatch.setattr(_dispatch, "_absence", lambda backend: None)
    hopper = _Hopper()
    monkeypatch.setattr(rssm_cuda, "_native", lambda: hopper)
    forget()
    yield
    forget()


def chosen(case, B, backend=None, precision="medium"):
    args, options = replace(case, T=1, B=B).arguments("rssm_imagine")
    constants = options.pop("min_std"), options.pop("unimix"), 0.0
    options = {"groups": 1, **options}
    with matmul_precision(precision), FakeTensorMode():
        action, noise, deter, stoch, weights = tree_map(
            lambda x: torch.empty(x.shape, device="cuda") if torch.is_tensor(x) else x, args
        )
        inputs = Inputs(None, action, noise, None, None, deter, stoch, None)
        return prepare(
            "rssm_imagine", inputs, weights, None, constants=constants, detach=False,
            backend=backend, **options,
        ).backend  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows"),
    [("rssm", 2000), ("rssmo", 1500), ("rssmo_v2", 1500), ("dreamer v3", 1000)],
    ids=str,
)
def test_many_rows_are_left_to_triton(name, rows):
    case = CASES[name]
    assert chosen(case, rows - 1) == "cuda"
    assert chosen(case, rows) == "triton"
    # asked for, it runs whatever the batch
    assert chosen(case, rows, backend="cuda") == "cuda"
    with _dispatch.use_backend("cuda"):
        assert chosen(case, rows) == "cuda"


def test_what_clusters_cannot_run_is_left_to_triton():
    for wide in (replace(CASES["rssmo_v2"], D=1200), replace(CASES["dreamer v3"], branch=80)):
        assert chosen(wide, 50) == "triton"
        with pytest.raises(RuntimeError, match="a layer is too wide"):
            chosen(wide, 50, backend="cuda")
    assert chosen(CASES["rssm"], 50, precision="highest") == "triton"


def test_until_a_gpu_has_run_them_they_wait_to_be_asked_for(monkeypatch):
    scans = frozenset((op, "cuda") for op in _dispatch.OPS if op.startswith("rssm_"))
    monkeypatch.setattr(_dispatch, "_ON_REQUEST", scans)
    assert chosen(CASES["rssm"], 50) == "triton"
    assert chosen(CASES["rssm"], 50, backend="cuda") == "cuda"


def test_float32_products_are_refused():
    structure = (6, 4, 2, 1, 0, 0, 0, 0, 3, 5, 0, 0, 1, 0, 0, 0)
    assert "bfloat16" in rssm_cuda.refusal(structure, "float32", 0)


def test_a_compiler_takes_the_refusal_as_a_constant():
    structure = (6, 4, 2, 1, 0, 0, 0, 0, 3, 5, 0, 0, 1, 0, 0, 0)

    def function(x):
        return x + len(rssm_cuda.refusal((*structure,), "float32", 0) or "")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), function(torch.zeros(2)))
