"""What every test runs under: no spinning threads, Triton without a GPU, memory full of NaN."""

import os
import sys
from pathlib import Path

# read when libgomp and triton are loaded, so set before anything imports them
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `tests.checks` and `bench` are not installed

import pytest  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not GPU:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    """In tests of ops fresh memory holds NaN, so that an element nobody wrote is seen."""
    if request.path.parent.name != "ops":
        return

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                # a checkpoint of torch 2.11 makes a leaf that requires a gradient
                fresh.detach().fill_(float("nan"))
            return fresh

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
