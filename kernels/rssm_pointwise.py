"""The scalar formulas of the scans on tiles, and rows of memory; all arithmetic in float32.

Only exp, log and sqrt are called: the interpreter knows no other function of the device.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    # 1 - e has few digits left near 0: the series, to its x^9
    q = x * x
    near = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    y = tl.where(size < 0.25, size * near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(x):
    # log(1 + e) of tiny e through the quotient, in which the rounding of 1 + e cancels
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    small = u == 1.0
    log1p = tl.where(small, e, tl.log(u) * e / tl.where(small, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def elu(x):
    low = tl.minimum(x, 0.0)
    # exp(x) - 1 has few digits left near 0: the series, to its x^7
    near = 1.0 + low * (1 / 5) * (1.0 + low * (1 / 6) * (1.0 + low * (1 / 7)))
    near = low * (1.0 + low * 0.5 * (1.0 + low * (1 / 3) * (1.0 + low * 0.25 * near)))
    return tl.where(x > 0, x, tl.where(low > -0.25, near, tl.exp(low) - 1.0))


@triton.jit
def elu_slope(y):
    # from the value y = elu(x)
    return tl.where(y > 0, 1.0, y + 1.0)


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def std_of(raw, min_std, SPLIT: tl.constexpr):
    return (softplus(raw) if SPLIT else 2.0 * sigmoid(0.5 * raw)) + min_std


@triton.jit
def std_slope(raw, SPLIT: tl.constexpr):
    s = sigmoid(raw if SPLIT else 0.5 * raw)
    return s if SPLIT else s * (1.0 - s)


@triton.jit
def torch_gru_backward(g, r, z, n, hn, h):
    """Gradients of r, z, xn, hn before their functions, and what passes the cell by."""
    dn = g * (1.0 - z) * (1.0 - n * n)
    return dn * hn * r * (1.0 - r), g * (h - n) * z * (1.0 - z), dn, dn * r, g * z


@triton.jit
def ln_gates(reset, candidate, update, D_FORM: tl.constexpr):
    """Return r, z (the share of the old state) and n from pre-activations after the norm."""
    r = sigmoid(reset)
    z = sigmoid(1.0 - update) if D_FORM else sigmoid(update)
    return r, z, tanh(r * candidate)


@triton.jit
def ln_gates_backward(g, r, z, n, candidate, h, D_FORM: tl.constexpr):
    """Gradients of reset, candidate, update after the norm, and what passes the cell by."""
    dn = g * (1.0 - z) * (1.0 - n * n)
    dz = g * (h - n) * z * (1.0 - z)
    return dn * candidate * r * (1.0 - r), dn * r, -dz if D_FORM else dz, g * z


@triton.jit
def class_probs(logits, real):
    """Softmax over the last axis; classes that are not real get 0."""
    e = tl.exp(logits - tl.max(tl.where(real, logits, float("-inf")), axis=1)[:, None])
    e = tl.where(real, e, 0.0)
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def row_of(base, ARRAY: tl.constexpr, rows, row):
    """Where the rows of an array of a buffer begin; rows: of the whole buffer."""
    return base + rows * ARRAY.at + row * ARRAY.ld + ARRAY.column


@triton.jit
def read(row, column, mask):
    return tl.load(row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(row, column, value, mask):
    tl.store(row[:, None] + column[None, :], value.to(row.dtype.element_ty), mask=mask)


@triton.jit
def vector(vectors, AT: tl.constexpr, column, N):
    """Some numbers of a bias, scale or shift, as a row; an absent bias is 0."""
    if AT < 0:
        x = tl.zeros_like(column).to(tl.float32)
    else:
        x = tl.load(vectors + AT + column, mask=column < N, other=0.0)
    return x[None, :]


@triton.jit
def before(first, later, row, b, t, B, W: tl.constexpr, column, mask):
    """A state before step t: the initial one [B, W], or that of the step before [T, B, W]."""
    return read(later + (row - B) * W, column, mask & (t > 0)) + read(
        first + b * W, column, mask & (t == 0)
    )


@triton.jit
def kept_rows(is_first, row, ok, t, T):
    """Rows in which no episode begins at step t; beyond the end none does."""
    if is_first is not None:
        ok = ok & (tl.load(is_first + row, mask=ok & (t < T), other=0) == 0)
    return ok


@triton.jit
def zero_tile(ok, M: tl.constexpr):
    ROWS: tl.constexpr = ok.shape[0]
    BN: tl.constexpr = M.BN
    return tl.zeros([ROWS, BN], tl.float32)


@triton.jit
def zero_sums(ok):
    return tl.zeros_like(ok).to(tl.float32)


@triton.jit
def product(acc, x, ok, weights, M: tl.constexpr, n, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add x [rows, K] @ weight [K, columns from n] to a tile; `weights` is its first block."""
    k = tl.arange(0, M.BK)
    w = weights + M.at + k[:, None] * M.ld + n + tl.arange(0, M.BN)[None, :]
    for k0 in range(0, M.K, M.BK):
        mask = ok[:, None]
        if M.K % M.BK != 0:
            mask = mask & (k0 + k < M.K)[None, :]
        a = tl.load(x[:, None] + (k0 + k)[None, :], mask=mask, other=0.0)
        v = tl.load(w + k0 * M.ld)
        # the interpreter multiplies bit patterns of bfloat16
        if UPCAST:
            a, v = a.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(a, v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product3(
    one, two, three, x, ok, weights,
    M: tl.constexpr, n, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `product` for three blocks of weights."""
    k = tl.arange(0, M.BK)
    w = weights + M.at + k[:, None] * M.ld + n + tl.arange(0, M.BN)[None, :]
    for k0 in range(0, M.K, M.BK):
        mask = ok[:, None]
        if M.K % M.BK != 0:
            mask = mask & (k0 + k < M.K)[None, :]
        a = tl.load(x[:, None] + (k0 + k)[None, :], mask=mask, other=0.0)
        u = tl.load(w + k0 * M.ld)
        v = tl.load(w + k0 * M.ld + M.block)
        y = tl.load(w + k0 * M.ld + 2 * M.block)
        if UPCAST:
            a, u = a.to(tl.float32), u.to(tl.float32)
            v, y = v.to(tl.float32), y.to(tl.float32)
        one = tl.dot(a, u, one, input_precision=PRECISION)
        two = tl.dot(a, v, two, input_precision=PRECISION)
        three = tl.dot(a, y, three, input_precision=PRECISION)
    return one, two, three
