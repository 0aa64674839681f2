"""The measure by which a kernel is right."""

import torch


def assert_matches(name, got, exact, plain, factor=2.0):
    """A kernel may be `factor` times as wrong as plain PyTorch in the same dtype.

    `exact`: the reference in float64; `plain`: the reference in got.dtype.
    """
    assert got.dtype == plain.dtype, f"{name}: {got.dtype}, expected {plain.dtype}"
    assert got.shape == exact.shape, f"{name}: {list(got.shape)}, expected {list(exact.shape)}"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} elements not finite"
    exact = exact.double()
    floor = 4 * torch.finfo(got.dtype).eps
    for norm in (float("inf"), 2.0):  # no single wrong element, and no general drift
        size = _norm(exact, norm).clamp_min(torch.finfo(torch.float64).tiny)
        error = _norm(got.double() - exact, norm) / size
        allowed = factor * _norm(plain.double() - exact, norm) / size + floor
        assert error <= allowed, f"{name}: {norm}-norm error {error:.2e} > allowed {allowed:.2e}"


def _norm(x, norm):
    # the largest element of nothing is 0
    return torch.linalg.vector_norm(x, norm) if x.numel() else x.new_zeros((), dtype=torch.float64)
