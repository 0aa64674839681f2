"""The packed products that the CPU scans stand on."""

import os
import subprocess
import sys

import pytest
import torch

from fastrssm import _native

ISAS = _native.gemm_isas()
PRECISIONS = ("float32", "bfloat16", "split3", "split6")
# M, K of the first and of the second source, N: one row, odd pairs, a line shared by both sources,
# panels and tiles that are not filled, more than one tile, more than one row of tiles
SHAPES = (
    (1, 24, 0, 140),
    (2, 33, 0, 31),
    (5, 16, 7, 64),
    (7, 1, 1, 1),
    (13, 35, 6, 60),
    (29, 300, 0, 33),
    (50, 30, 6, 96),
    (97, 64, 0, 40),
)
KINDS = [(isa, precision) for isa in ISAS for precision in PRECISIONS]
EACH_KIND = pytest.mark.parametrize(("isa", "precision"), KINDS)


def close(got, exact, size, terms, precision):
    """Compare with the float64 result; `size` is the same product of absolute values.

    A sum of n terms in float32 errs by at most n u size, u = 2^-24; independent roundings add up as
    sqrt(n) (Higham and Mary 2019), and 6 of these are exceeded once in 1e8 elements. Operands are
    rounded by 2^-9 each for bfloat16. split3 drops 2^-18 of each and the product of both
    remainders; split6 2^-27 of each and two products of 2^-27.
    """
    u = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    operands = {"float32": 0.0, "bfloat16": 2.0**-8, "split3": 3 * 2.0**-18, "split6": 2.0**-25}
    products = {"float32": 1, "bfloat16": 1, "split3": 3, "split6": 6}
    allowed = (6 * (products[precision] * terms) ** 0.5 * u + operands[precision]) * size
    worst = ((got.double() - exact).abs() / allowed.clamp_min(1e-300)).max()
    assert worst <= 1, f"{worst:.2f} times the error allowed"


def bytes_of(size):
    storage = torch.empty(size // 4 + 16)
    # NaN, aligned to 64 bytes
    return storage[-storage.data_ptr() % 64 // 4 :]


def pack(w, precision, isa, transposed=False):
    N, K = w.shape[::-1] if transposed else w.shape
    dtype = str(w.dtype)
    packed = bytes_of(_native.gemm_bytes(dtype, precision, isa, 1, N, K, 1)[0])
    strides = (1, N) if transposed else (K, 1)
    _native.gemm_pack_weights(
        dtype, precision, isa, w.data_ptr(), *strides, N, K, packed.data_ptr()
    )
    return packed, N, K


def product(a, packed, precision, isa, second=None, c=None):
    """[a | second] W^T, added to c if it is given; rows may lie apart."""
    weights, N, K = packed
    M, dtype = a.shape[0], str(a.dtype)
    rows = bytes_of(_native.gemm_bytes(dtype, precision, isa, M, N, K, 1)[1])
    out = torch.full((M, N + 3), 7.0, dtype=a.dtype)
    if c is not None:
        out[:, :N] = c
    other = (0, 0, 0) if second is None else (second.data_ptr(), second.stride(0), second.shape[1])
    _native.gemm_multiply(
        *(dtype, precision, isa, a.data_ptr(), a.stride(0), a.shape[1], *other),
        *(rows.data_ptr(), weights.data_ptr(), M, N, out.data_ptr(), N + 3, c is not None),
    )
    assert (out[:, N:] == 7.0).all()
    return out[:, :N]


def outer(dy, x, dw, precision, isa, threads=1):
    (R, N), K, dtype = dy.shape, x.shape[1], str(dy.dtype)
    workspace = bytes_of(_native.gemm_bytes(dtype, precision, isa, 1, N, K, threads)[2])
    out = dw.clone()
    _native.gemm_add_outer_products(
        *(dtype, precision, isa, dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0)),
        *(R, N, K, out.data_ptr(), K, workspace.data_ptr(), threads),
    )
    return out


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# 1. against float64


@EACH_KIND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, isa, precision):
    M, K1, K2, N = shape
    a, w, c = normal(M, K1 + K2, seed=1), normal(N, K1 + K2, seed=2), normal(M, N, seed=3)
    wide = normal(M, K1 + 5, seed=4)
    wide[:, :K1] = a[:, :K1]
    first, second = wide[:, :K1], a[:, K1:] if K2 else None
    packed = pack(w, precision, isa)
    exact, size = a.double() @ w.double().T, a.double().abs() @ w.double().abs().T
    close(product(first, packed, precision, isa, second), exact, size, K1 + K2, precision)
    added = product(first, packed, precision, isa, second, c=c)
    close(added, exact + c, size + c.abs(), K1 + K2, precision)


@EACH_KIND
def test_product_with_the_transpose(isa, precision):
    dy, w = normal(21, 50), normal(50, 39, seed=1)
    got = product(dy, pack(w, precision, isa, transposed=True), precision, isa)
    size = dy.double().abs() @ w.double().abs()
    close(got, dy.double() @ w.double(), size, 50, precision)


@EACH_KIND
@pytest.mark.parametrize("shape", [(1, 5, 3), (300, 33, 35), (600, 20, 40)], ids=str)
def test_outer_products(shape, isa, precision):
    R, N, K = shape
    dy, x, dw = normal(R, N + 4)[:, :N], normal(R, K + 1, seed=1)[:, :K], normal(N, K, seed=2)
    got = outer(dy, x, dw, precision, isa)
    size = dy.double().abs().T @ x.double().abs() + dw.abs()
    close(got, dy.double().T @ x.double() + dw, size, R, precision)


def test_float64():
    a, w, dw = (normal(*s, dtype=torch.float64) for s in ((9, 41), (23, 41), (23, 41)))
    exact, size = a @ w.T, a.abs() @ w.abs().T
    got = product(a, pack(w, "float32", "portable"), "float32", "portable")
    close(got, exact, size, 41, "float32")
    dy = normal(9, 23, dtype=torch.float64)
    got = outer(dy, a, dw, "float32", "portable")
    close(got, dy.T @ a + dw, dy.abs().T @ a.abs() + dw.abs(), 9, "float32")


@pytest.mark.skipif("amx_emulated" not in ISAS, reason="needs bfloat16 instructions to pack")
def test_every_term_of_a_split_counts():
    a, w = normal(8, 40), normal(32, 40, seed=1)
    exact = a.double() @ w.double().T
    errors = [
        (product(a, pack(w, p, "amx_emulated"), p, "amx_emulated").double() - exact).norm()
        for p in ("bfloat16", "split3", "split6")
    ]
    # 2^-9 of an operand each; the last is bounded by the sums in float32
    assert errors[0] > 100 * errors[1]
    assert errors[1] > 10 * errors[2]


# 2. repeatability


@EACH_KIND
def test_a_row_does_not_depend_on_the_others(isa, precision):
    a, w = normal(67, 70), normal(150, 70, seed=1)
    packed = pack(w, precision, isa)
    whole = product(a, packed, precision, isa)
    for begin, end in ((0, 1), (3, 5), (5, 8), (8, 12), (12, 17), (17, 42), (16, 66), (66, 67)):
        part = product(a[begin:end], packed, precision, isa)
        assert torch.equal(part, whole[begin:end]), (begin, end)


@EACH_KIND
def test_outer_products_do_not_depend_on_the_threads(isa, precision):
    dy, x, dw = normal(270, 45), normal(270, 37, seed=1), normal(45, 37, seed=2)
    one, *others = (outer(dy, x, dw, precision, isa, threads) for threads in (1, 2, 3, 64))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.skipif("avx512" not in ISAS, reason="needs AVX-512")
def test_fused_multiply_adds_give_the_same_bits_in_any_width():
    a, w = normal(30, 70), normal(150, 70, seed=1)
    wide, narrow = (
        product(a, pack(w, "float32", isa), "float32", isa) for isa in ("avx512", "avx2")
    )
    assert torch.equal(wide, narrow)


# 3. edges


@EACH_KIND
def test_bad_numbers_stay_in_their_row_and_column(isa, precision):
    a, w = normal(20, 37), normal(40, 37, seed=1)
    a[3, 36], w[39, 0] = float("nan"), float("inf")
    finite = product(a, pack(w, precision, isa), precision, isa).isfinite()
    expected = torch.ones(20, 40, dtype=torch.bool)
    expected[3], expected[:, 39] = False, False
    assert torch.equal(finite, expected)


@EACH_KIND
def test_no_rows(isa, precision):
    packed = pack(normal(40, 37), precision, isa)
    assert product(normal(0, 37), packed, precision, isa).shape == (0, 40)
    dw = normal(40, 37)
    assert torch.equal(outer(normal(0, 40), normal(0, 37), dw, precision, isa), dw)


def test_errors():
    def refused(error, match, *kind):
        with pytest.raises(error, match=match):
            _native.gemm_bytes(*kind, 1, 1, 1, 1)

    refused(TypeError, "dtype is torch.int8, expected", "torch.int8", "float32", "avx2")
    refused(ValueError, "precision is 'half', expected", "torch.float32", "half", "avx2")
    refused(ValueError, "isa is 'sse', expected", "torch.float32", "float32", "sse")
    if "amx" not in ISAS:
        lacks = "isa is 'amx', which this processor lacks"
        refused(RuntimeError, lacks, "torch.float32", "float32", "amx")


@pytest.mark.parametrize(
    ("name", "answer"), [("portable", "portable"), ("sse", "FASTRSSM_ISA is 'sse', expected")]
)
def test_a_variable_lowers_the_instruction_set(name, answer):
    # the module alone: importing the package takes a second
    code = (
        "from importlib.util import module_from_spec, spec_from_file_location as at\n"
        f"spec = at('_native', {_native.__file__!r})\n"
        "module = module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.gemm_isa())"
    )
    environment = os.environ | {"FASTRSSM_ISA": name}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert answer in run.stdout + run.stderr
