"""DreamerV3's cell in streamed scans: blocks that share three layers of what they read."""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_layers import hidden_backward, hidden_layer
from fastrssm.kernels.rssm_pointwise import (
    before,
    product,
    product3,
    read,
    row_of,
    write,
    zero_tile,
)
from fastrssm.kernels.rssm_tiles import block_gru_tile


@triton.jit
def shared_layers(
    deter_in, cell_in, y, hat, rstd, raw, ok, weights, vectors,
    L: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What all blocks read of state, latent and action."""
    M: tl.constexpr = L.blocks.width
    for i in tl.static_range(3):
        hidden_layer(
            deter_in if i == 0 else cell_in + (L.S if i == 2 else 0), None, None,
            y + i * M, hat + i * M, rstd + i, raw, ok, weights, vectors + i * M, False,
            L.blocks.layers[i], L.blocks.layers[i], 1, L.blocks.bias, L.blocks.scale, -1,
            KEEP, L.BP, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def block_gru(
    x, gates, deter0, deter, deter_out, row, b, ok, keep, t, B, weights, vectors,
    L: tl.constexpr, KEEP: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    OWN: tl.constexpr = L.blocks.own
    for g in range(L.blocks.count):
        w = weights + g * (3 * L.x.block)
        for n in range(0, OWN, L.x.BN):
            column = n + tl.arange(0, L.x.BN)
            real = (column < OWN)[None, :]
            column += g * OWN
            mask = ok[:, None] & real
            zero = zero_tile(ok, L.x)
            r, c, u = product3(zero, zero, zero, x + g * OWN, ok, w, L.x, n, PRECISION, UPCAST)
            h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & real)
            new = block_gru_tile(r, c, u, h, gates, vectors, column, mask, L, KEEP)
            write(deter + row * L.D, column, new, mask)
            if NARROW:
                write(deter_out, column, new, mask)


@triton.jit
def blocks_backward(
    d_gates, past, action,  # rows
    to_deter, to_stoch, to_action, raw, row, rows, slot, d_rows, ok, keep,
    weights, vectors, operands, reals, gradients,
    L: tl.constexpr, LEARN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the gates to the state before the step and to the action."""
    M: tl.constexpr = L.blocks.width
    OWN: tl.constexpr = L.blocks.own
    d_mixed = row_of(gradients, L.d_pre, d_rows, slot)
    hidden_backward(
        d_gates, d_mixed, row_of(gradients, L.d_pre_affine, d_rows, slot), None,
        row_of(operands, L.pre_hat, rows, row), row_of(reals, L.pre_rstd, rows, row),
        raw, ok, weights, vectors, False, L.x, L.blocks.count, L.vectors[1], -1,
        LEARN, L.BP, PRECISION, UPCAST,
    )  # fmt: skip
    d_shared = row_of(gradients, L.blocks.d, d_rows, slot)
    affine = row_of(gradients, L.blocks.affine, d_rows, slot)
    hat = row_of(operands, L.blocks.hat, rows, row)
    rstd = row_of(reals, L.blocks.rstd, rows, row)
    for i in range(3):
        hidden_backward(
            d_mixed, d_shared + i * M, affine + i * M, None, hat + i * M, rstd + i,
            raw, ok, weights + i * L.blocks.shared.block, vectors + i * M, False,
            L.blocks.shared, 1, L.blocks.scale, -1, LEARN, L.BP, PRECISION, UPCAST,
        )  # fmt: skip
    OF: tl.constexpr = L.blocks.layers[0]
    for g in range(L.blocks.count):
        for n in range(0, OWN, L.h.BN):
            acc = zero_tile(ok, L.h)
            w = weights + g * L.h.block
            acc = product(acc, d_mixed + g * OWN, ok, w, L.h, n, PRECISION, UPCAST)
            acc = product(acc, d_shared, ok, weights + g * OF.block, OF, n, PRECISION, UPCAST)
            column = n + tl.arange(0, L.h.BN)
            mask = ok[:, None] & (column < OWN)[None, :]
            column += g * OWN
            acc += read(past, column, mask)
            write(to_deter, column, tl.where(keep[:, None], acc, 0.0), mask)
    STOCH: tl.constexpr = L.blocks.layers[1]
    for n in range(0, L.S, STOCH.BN):
        acc = zero_tile(ok, STOCH)
        acc = product(acc, d_shared + M, ok, weights, STOCH, n, PRECISION, UPCAST)
        column = n + tl.arange(0, STOCH.BN)
        mask = ok[:, None] & (column < L.S)[None, :]
        write(to_stoch, column, tl.where(keep[:, None], acc, 0.0), mask)
    if to_action is not None:
        ACTION: tl.constexpr = L.blocks.layers[2]
        for n in range(0, L.A, ACTION.BN):
            acc = zero_tile(ok, ACTION)
            acc = product(acc, d_shared + 2 * M, ok, weights, ACTION, n, PRECISION, UPCAST)
            column = n + tl.arange(0, ACTION.BN)
            mask = ok[:, None] & (column < L.A)[None, :]
            acc /= tl.maximum(tl.abs(read(action, column, mask)), 1.0)
            write(to_action, column, acc, mask)
