"""Which backend runs, and what an impossible request says."""

import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fastrssm
from fastrssm import _dispatch
from fastrssm.ops import gaussian_kl

X = torch.ones(2, 3)


def resolve(requested=None, x=X):
    return _dispatch.resolve("gaussian_kl", x, requested)


def run(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_argument_wins_over_context_over_order():
    assert resolve() == "cpu"
    with fastrssm.use_backend("reference"):
        assert resolve() == "reference"
        assert resolve("cpu") == "cpu"
        with fastrssm.use_backend("cpu"):
            assert resolve() == "cpu"
        assert resolve() == "reference"
    assert resolve() == "cpu"


def test_kernels_that_no_gpu_has_run_are_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(_dispatch, "_absence", lambda backend: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert _dispatch.resolve("gaussian_kl", on_gpu, None) == "cuda"
    assert _dispatch.resolve("rssm_observe", on_gpu, None) == "triton"
    assert _dispatch.resolve("rssm_observe", on_gpu, "cuda") == "cuda"


def test_context_ends_with_an_error_and_stays_in_its_thread():
    seen = []

    def fail():
        with fastrssm.use_backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(resolve()))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == ["cpu"]
    assert resolve() == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_explicit_request_never_falls_back():
    with pytest.raises(RuntimeError, match=r"gaussian_kl: backend 'cuda' is not available: .*CUDA"):
        gaussian_kl(X, X, X, X, backend="cuda")
    with fastrssm.use_backend("cuda"), pytest.raises(RuntimeError, match="not available"):
        gaussian_kl(X, X, X, X)
    with pytest.raises(RuntimeError, match="'triton' is not available: float64"):
        resolve("triton", X.double())


def test_unknown_name_is_an_error():
    for ask in (lambda: resolve("gpu"), lambda: fastrssm.use_backend("gpu").__enter__()):
        with pytest.raises(ValueError, match="backend is 'gpu', expected one of reference, cpu"):
            ask()
    assert (
        "FASTRSSM_BACKEND is 'gpu', expected"
        in run("import fastrssm", FASTRSSM_BACKEND="gpu").stderr
    )


def test_environment_variable_and_its_absence():
    code = """
import torch
from fastrssm._dispatch import _refusal, resolve
print(resolve("gaussian_kl", torch.ones(1), None), resolve("gaussian_kl", torch.ones(1), "cpu"))
print(_refusal("gaussian_kl", "triton", "cpu", torch.float32))
"""
    choices, absence = run(code, FASTRSSM_BACKEND="reference").stdout.splitlines()
    assert choices == "reference cpu"
    assert "no GPU is visible" in absence or "tensor is on cpu" in absence


def test_automatic_choice_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "_absence", lambda backend: "not built")
    _dispatch._log_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastrssm"):
        assert [resolve(), resolve()] == ["reference", "reference"]
    assert [r.getMessage() for r in caplog.records] == [
        "gaussian_kl does not run on cpu: not built"
    ]


def test_table():
    table = fastrssm.backends()
    assert set(table["gaussian_kl"]) == {"reference", "cpu", "triton", "cuda"}
    assert table["gaussian_kl"]["reference"] is None
    assert table["gaussian_kl"]["cpu"] is None


def test_compiled_function_follows_the_context():
    def choose(x):
        return x * {"reference": 3.0, "cpu": 2.0}[resolve(x=x)]

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), 2 * X)
    with fastrssm.use_backend("reference"):
        assert torch.equal(compiled(X), 3 * X)
