"""The packed products of the CPU scans against torch's: the layers of W1, one step and a sequence.

A step multiplies M rows with packed weights, on one thread: the scans split rows over threads. Rows
are packed inside the measured time, weights outside, as the scans do; torch packs both every time.
The floor is a copy of the bytes that one product touches; it binds at one row only.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Workload
from fastrssm import _native

ISA = _native.gemm_isa()
# K, N of input gates, state gates, posterior's first layer and heads, and of the gates' way back
LAYERS = ((134, 1536), (512, 1536), (512, 256), (128, 128), (1536, 512))
ROWS = (1, 16, 25, 50, 512)
SEQUENCE = 2500
PRECISIONS = ("float32", "bfloat16")


def aligned(size):
    storage = torch.empty(size + 64, dtype=torch.uint8)
    return storage[-storage.data_ptr() % 64 :]


def packed_product(a, w, precision):
    """Return a call that multiplies a with weights packed now."""
    (M, K), N, kind = a.shape, w.shape[0], (str(a.dtype), precision, ISA)
    weight_bytes, row_bytes, _ = _native.gemm_bytes(*kind, M, N, K, 1)
    weights, rows, c = aligned(weight_bytes), aligned(row_bytes), torch.empty(M, N)
    _native.gemm_pack_weights(*kind, w.data_ptr(), K, 1, N, K, weights.data_ptr())
    sources = a.data_ptr(), K, K, 0, 0, 0
    target = rows.data_ptr(), weights.data_ptr(), M, N, c.data_ptr(), N, False
    # the tensors must outlive the call
    return lambda _keep=(a, weights, rows, c): _native.gemm_multiply(*kind, *sources, *target)


def packed_gradient(dy, x, precision, threads):
    (R, N), K, kind = dy.shape, x.shape[1], (str(dy.dtype), precision, ISA)
    workspace = aligned(_native.gemm_bytes(*kind, 1, N, K, threads)[2])
    dw = torch.zeros(N, K)
    sources = dy.data_ptr(), N, x.data_ptr(), K, R, N, K
    target = dw.data_ptr(), K, workspace.data_ptr(), threads
    return lambda _keep=(dy, x, workspace, dw): _native.gemm_add_outer_products(
        *kind, *sources, *target
    )


def step(K, N, M, precision):
    a, w = torch.randn(M, K), torch.randn(N, K) * K**-0.5
    dtype = getattr(torch, precision)
    x, weight = a.to(dtype), w.to(dtype)
    moved = dtype.itemsize * K * N + 4 * M * (K + N)
    providers = {
        "torch": lambda: F.linear(x, weight),
        "fastrssm-cpu": packed_product(a, w, precision),
    }
    return Workload("gemm", f"{M} rows, {K} to {N}", "fwd", precision, "cpu", moved, providers)


def gradient(K, N, precision, threads):
    dy, x = torch.randn(SEQUENCE, N), torch.randn(SEQUENCE, K)
    dtype = getattr(torch, precision)
    dys, xs, dw = dy.to(dtype), x.to(dtype), torch.zeros(N, K, dtype=dtype)
    moved = dtype.itemsize * SEQUENCE * (K + N) + 8 * K * N
    providers = {
        "torch": lambda: dw.addmm_(dys.T, xs),
        "fastrssm-cpu": packed_gradient(dy, x, precision, threads),
    }
    name = f"weight gradient of {SEQUENCE} rows, {K} to {N}"
    return Workload("gemm", name, "bwd", precision, "cpu", moved, providers)


def workloads(threads):
    for precision in PRECISIONS:
        for K, N in LAYERS if threads == 1 else ():
            for M in ROWS:
                yield step(K, N, M, precision)
        for K, N in LAYERS[:3]:
            yield gradient(K, N, precision, threads)


CASES = {
    "step": partial(step, 512, 1536, 50),
    "gradient": partial(gradient, 512, 256, threads=1),
}


@pytest.mark.parametrize("provider", ["torch", "fastrssm-cpu"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_speed(benchmark, case, precision, provider):
    torch.set_num_threads(1)
    call = CASES[case](precision=precision).providers[provider]
    benchmark.pedantic(call, rounds=30, warmup_rounds=5)
