"""One layer of a streamed scan and its activation, forward and backward.

A norm with a shift is LayerNorm, one without is an RMS norm.
"""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_pointwise import (
    elu,
    elu_slope,
    product,
    read,
    sigmoid,
    silu_slope,
    vector,
    write,
    zero_sums,
    zero_tile,
)


@triton.jit
def moments(raw, total, ok, N: tl.constexpr, EPS: tl.constexpr, BP: tl.constexpr):
    """Mean and inverse deviation of rows whose sum is known."""
    mean = total / N
    squares = tl.zeros_like(total)
    for n in range(0, N, BP):
        column = n + tl.arange(0, BP)
        mask = ok[:, None] & (column < N)[None, :]
        x = tl.where(mask, read(raw, column, mask) - mean[:, None], 0.0)
        squares += tl.sum(x * x, axis=1)
    return mean, 1.0 / tl.sqrt(squares / N + EPS)


@triton.jit
def hidden_layer(
    x, x2, proj, y, hat, rstd, raw,  # rows
    ok, weights, vectors,
    SPLIT: tl.constexpr, W: tl.constexpr, W2: tl.constexpr, BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    KEEP: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ELU, or SiLU behind a norm; each block reads its part of x, and all of x2 if there is one."""
    N: tl.constexpr = BLOCKS * W.N
    total = zero_sums(ok)
    for g in range(BLOCKS):
        for n in range(0, W.N, W.BN):
            acc = zero_tile(ok, W)
            acc = product(acc, x + g * W.K, ok, weights + g * W.block, W, n, PRECISION, UPCAST)
            if x2 is not None:
                acc = product(acc, x2, ok, weights + g * W2.block, W2, n, PRECISION, UPCAST)
            column = n + tl.arange(0, W.BN)
            mask = ok[:, None] & (column < W.N)[None, :]
            column += g * W.N
            if proj is not None:
                acc += read(proj, column, mask)
            acc += vector(vectors, BIAS, column, N)
            if SPLIT:
                write(y, column, elu(acc), mask)
            else:
                acc = tl.where(mask, acc, 0.0)
                write(raw, column, acc, mask)
                total += tl.sum(acc * acc if SHIFT < 0 else acc, axis=1)
    tl.debug_barrier()
    if not SPLIT:
        if SHIFT < 0:
            mean, scale = zero_sums(ok), 1.0 / tl.sqrt(total / N + 1e-4)
        else:
            mean, scale = moments(raw, total, ok, N, 1e-5, BP)
        if KEEP:
            tl.store(rstd, scale, mask=ok)
        for n in range(0, N, BP):
            column = n + tl.arange(0, BP)
            mask = ok[:, None] & (column < N)[None, :]
            h = (read(raw, column, mask) - mean[:, None]) * scale[:, None]
            if KEEP:
                write(hat, column, h, mask)
            a = h * vector(vectors, SCALE, column, N) + vector(vectors, SHIFT, column, N)
            write(y, column, a * sigmoid(a), mask)
        tl.debug_barrier()


@triton.jit
def norm_backward(
    raw, hat, rstd, d, total, dot, ok, N: tl.constexpr, SHIFT: tl.constexpr, BP: tl.constexpr
):
    """Through a norm, from the gradient of its normalised values in raw and its two row sums."""
    scale = tl.load(rstd, mask=ok, other=0.0)[:, None]
    if SHIFT < 0:
        total = zero_sums(ok)
    for n in range(0, N, BP):
        column = n + tl.arange(0, BP)
        mask = ok[:, None] & (column < N)[None, :]
        x, h = read(raw, column, mask), read(hat, column, mask)
        write(d, column, (x - (total / N)[:, None] - h * (dot / N)[:, None]) * scale, mask)
    tl.debug_barrier()


@triton.jit
def hidden_backward(
    dy, d, affine, y, hat, rstd, raw,  # rows
    ok, weights, vectors,
    SPLIT: tl.constexpr, W: tl.constexpr, BLOCKS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,
    LEARN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the pre-activations of a layer to those of the one before it."""
    N: tl.constexpr = BLOCKS * W.N
    total = zero_sums(ok)
    dot = zero_sums(ok)
    for g in range(BLOCKS):
        for n in range(0, W.N, W.BN):
            acc = zero_tile(ok, W)
            acc = product(acc, dy + g * W.K, ok, weights + g * W.block, W, n, PRECISION, UPCAST)
            column = n + tl.arange(0, W.BN)
            mask = ok[:, None] & (column < W.N)[None, :]
            column += g * W.N
            if SPLIT:
                write(d, column, acc * elu_slope(read(y, column, mask)), mask)
            else:
                h = read(hat, column, mask)
                scale = vector(vectors, SCALE, column, N)
                acc *= silu_slope(h * scale + vector(vectors, SHIFT, column, N))
                acc = tl.where(mask, acc, 0.0)
                if LEARN:
                    write(affine, column, acc, mask)
                acc *= scale
                write(raw, column, acc, mask)
                total += tl.sum(acc, axis=1)
                dot += tl.sum(acc * h, axis=1)
    tl.debug_barrier()
    if not SPLIT:
        norm_backward(raw, hat, rstd, d, total, dot, ok, N, SHIFT, BP)
