"""What stands between the products of a hoisted scan: one program for one row of the batch.

A row fits into the registers of a program, so norms need neither memory nor barriers.
"""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_pointwise import (
    before,
    elu,
    kept_rows,
    read,
    row_of,
    sigmoid,
    vector,
    write,
)
from fastrssm.kernels.rssm_tiles import (
    act_tile,
    block_gru_tile,
    drawn_class,
    gaussian_tile,
    in_blocks,
    ln_gru_tile,
    torch_gru_tile,
)


@triton.jit
def place(t, T, B, KEEP: tl.constexpr):
    """Row of the batch; its row at step t, in what is kept, and how many rows are kept."""
    b = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = tl.cast(t, tl.int64) * B + b
    steps = T if KEEP else 1
    return b, row, row if KEEP else b, tl.cast(B, tl.int64) * steps


@triton.jit
def normed_row(
    x, column, mask, y, hat, rstd, vectors, N: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """SiLU behind LayerNorm, or behind an RMS norm if there is no shift."""
    EPS: tl.constexpr = 1e-4 if SHIFT < 0 else 1e-5
    x = tl.where(mask, x, 0.0)
    if SHIFT >= 0:
        x = tl.where(mask, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + EPS)
    h = x * scale[:, None]
    if KEEP:
        tl.store(rstd, scale)
        write(hat, column, h, mask)
    a = h * row_vector(vectors, SCALE, column, mask) + row_vector(vectors, SHIFT, column, mask)
    write(y, column, a * sigmoid(a), mask)


@triton.jit
def row_vector(vectors, AT: tl.constexpr, column, mask):
    """As `vector`, of a tile that is a row."""
    if AT < 0:
        x = tl.zeros_like(mask).to(tl.float32)
    else:
        x = tl.load(vectors + AT + column[None, :], mask=mask, other=0.0)
    return x


@triton.jit(do_not_specialize=["t", "T", "B"])
def hidden_step_kernel(
    raw,              # [blocks, B, N] products
    proj,             # [T, B, blocks * N] or None
    vectors, operands, reals,
    t, T, B, N: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    Y: tl.constexpr, HAT: tl.constexpr, RSTD: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, row, slot, rows = place(t, T, B, KEEP)
    g = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BN)
    mask = (column < N)[None, :]
    x = read(raw + (g * B + b) * N, column, mask)
    column += tl.program_id(1) * N
    if proj is not None:
        x += read(proj + row * (BLOCKS * N), column, mask)
    x += vector(vectors, BIAS, column, BLOCKS * N)
    y = row_of(operands, Y, rows, slot)
    if SPLIT:
        write(y, column, elu(x), mask)
    else:
        hat, rstd = row_of(operands, HAT, rows, slot), row_of(reals, RSTD, rows, slot) + g
        normed_row(x, column, mask, y, hat, rstd, vectors, N, SCALE, SHIFT, KEEP)


@triton.jit(do_not_specialize=["t", "T", "B"])
def mix_step_kernel(
    from_state,    # [blocks, B, D / blocks] products
    from_shared,   # [B, D] products
    vectors, operands, reals,
    t, T, B, L: tl.constexpr, KEEP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, row, slot, rows = place(t, T, B, KEEP)
    BIAS: tl.constexpr = L.vectors[0]
    OWN: tl.constexpr = L.blocks.own
    column = tl.arange(0, BD)
    mask = (column < L.D)[None, :]
    x = read(from_shared + b * L.D, column, mask)
    x += read(from_state + b * OWN, by_block(column, B, OWN), mask)
    x += vector(vectors, BIAS, column, L.D)
    y, hat = row_of(operands, L.pre_y, rows, slot), row_of(operands, L.pre_hat, rows, slot)
    rstd = row_of(reals, L.pre_rstd, rows, slot)
    normed_row(x, column, mask, y, hat, rstd, vectors, L.D, L.vectors[1], L.vectors[2], KEEP)


@triton.jit
def by_block(column, B, WIDTH: tl.constexpr):
    """Where the columns of the first row lie in [blocks, B, WIDTH]."""
    return (column // WIDTH).to(tl.int64) * B * WIDTH + column % WIDTH


@triton.jit(do_not_specialize=["t", "T", "B"])
def cell_step_kernel(
    from_input, from_state,   # [B, 3 D] products; block_gru: [blocks, B, 3 D / blocks] and None
    vectors, is_first, deter0, deter, operands, reals,
    t, T, B, L: tl.constexpr, KEEP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = operands.dtype.element_ty != tl.float32
    b, row, slot, rows = place(t, T, B, KEEP)
    ok = b < B
    column = tl.arange(0, BD)
    mask = (column < L.D)[None, :]
    keep = kept_rows(is_first, row, ok, t, T)
    h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & mask)
    gates = row_of(operands, L.gates, rows, slot)
    if L.blocks is None:
        x, s = from_input + b * (3 * L.D), from_state + b * (3 * L.D)
        one = read(x, column, mask) + read(s, column, mask)
        two = read(x + L.D, column, mask) + read(s + L.D, column, mask)
        three, four = read(x + 2 * L.D, column, mask), read(s + 2 * L.D, column, mask)
    if L.blocks is not None:
        OWN: tl.constexpr = L.blocks.own
        x = from_input + b * (3 * OWN)
        at = by_block(in_blocks(column, OWN), B, 3 * OWN)
        one, two, three = read(x, at, mask), read(x + OWN, at, mask), read(x + 2 * OWN, at, mask)
        new = block_gru_tile(one, two, three, h, gates, vectors, column, mask, L, KEEP)
    elif L.cell == 0:
        new = torch_gru_tile(one, two, three, four, h, gates, vectors, column, mask, L, KEEP)
    else:
        BIAS: tl.constexpr = L.vectors[3]
        N: tl.constexpr = 3 * L.D
        one += vector(vectors, BIAS, column, N)
        two += vector(vectors, BIAS, column + L.D, N)
        three += four + vector(vectors, BIAS, column + 2 * L.D, N)
        one, two = tl.where(mask, one, 0.0), tl.where(mask, two, 0.0)
        three = tl.where(mask, three, 0.0)
        mean = (tl.sum(one + two + three, axis=1) / N)[:, None]
        one, two = tl.where(mask, one - mean, 0.0), tl.where(mask, two - mean, 0.0)
        three = tl.where(mask, three - mean, 0.0)
        square = tl.sum(one * one + two * two + three * three, axis=1)
        rstd = 1.0 / tl.sqrt(square / N + L.eps)
        if KEEP:
            tl.store(row_of(reals, L.gates_rstd, rows, slot), rstd)
        one, two, three = one * rstd[:, None], two * rstd[:, None], three * rstd[:, None]
        # the cell's own order: z, r, o or r, c, u
        if L.cell == 1:
            new = ln_gru_tile(two, three, one, h, gates, vectors, column, mask, L, KEEP)
        else:
            new = ln_gru_tile(one, two, three, h, gates, vectors, column, mask, L, KEEP)
    write(deter + row * L.D, column, new, mask)
    if NARROW:
        write(row_of(operands, L.deter_out, rows, slot), column, new, mask)
    enter_next(new, L.deter_in, is_first, operands, column, mask, b, row, t, T, B, rows, KEEP)


@triton.jit
def enter_next(
    x, TO: tl.constexpr, is_first, operands, column, mask, b, row, t, T, B, rows,
    KEEP: tl.constexpr,
):  # fmt: skip
    """A part of the state as the next step reads it, zero where an episode begins."""
    there = (b < B) & (t + 1 < T)
    keep = kept_rows(is_first, row + B, there, t + 1, T)
    to = row_of(operands, TO, rows, row + B if KEEP else b)
    write(to, column, tl.where(keep[:, None], x, 0.0), mask & there[:, None])


@triton.jit(do_not_specialize=["t", "T", "B"])
def act_step_kernel(
    raw,    # [2, B, A] products
    vectors, action_noise, action, operands, reals,
    t, T, B, min_std, L: tl.constexpr, KEEP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b, row, slot, rows = place(t, T, B, KEEP)
    BIAS: tl.constexpr = L.policy.bias[len(L.policy.later)]
    column = tl.arange(0, BN)
    mask = (column < L.A)[None, :]
    mean = read(raw + b * L.A, column, mask) + vector(vectors, BIAS, column, L.A)
    half = raw + (b + B) * L.A
    std = read(half, column, mask) + vector(vectors, BIAS, column + L.A, 2 * L.A)
    cell_in = row_of(operands, L.cell_in, rows, slot)
    kept = row_of(reals, L.action_raw, rows, slot)
    act_tile(action_noise, action, cell_in, kept, row, mean, std, column, mask, min_std, L, KEEP)


@triton.jit(do_not_specialize=["t", "T", "B"])
def draw_step_kernel(
    raw,    # products: split [2, B, S], joint [B, 2 S], categorical [B, S]
    vectors, noise, is_first, stoch, stats0, stats1, operands, reals,
    t, T, B, min_std, unimix, L: tl.constexpr, KEEP: tl.constexpr,
    BS: tl.constexpr, BG: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    b, row, slot, rows = place(t, T, B, KEEP)
    BIAS: tl.constexpr = L.head.bias[len(L.head.later)]
    if L.categorical:
        CLASSES: tl.constexpr = L.S // L.groups
        k = tl.arange(0, K_TILE)
        g = tl.arange(0, BG)
        real = (k < CLASSES)[None, :]
        mask = (g < L.groups)[:, None] & real
        column = g[:, None] * CLASSES + k[None, :]
        logits = tl.load(raw + b * L.S + column, mask=mask, other=0.0)
        if BIAS >= 0:
            logits += tl.load(vectors + BIAS + column, mask=mask, other=0.0)
        tl.store(stats0 + row * L.S + column, logits, mask=mask)
        u = tl.load(noise + row * L.groups + g, mask=g < L.groups, other=0.0)
        s = drawn_class(logits, u, real, unimix, CLASSES)
        tl.store(stoch + row * L.S + column, s, mask=mask)
        there = (b < B) & (t + 1 < T)
        keep = kept_rows(is_first, row + B, there, t + 1, T)
        to = row_of(operands, L.cell_in, rows, row + B if KEEP else b) + column
        s = tl.where(keep[:, None], s, 0.0).to(operands.dtype.element_ty)
        tl.store(to, s, mask=mask & there[:, None])
    else:
        column = tl.arange(0, BS)
        mask = (column < L.S)[None, :]
        one = raw + (b if L.head.split else 2 * b) * L.S
        two = raw + (b + B if L.head.split else 2 * b + 1) * L.S
        mean = read(one, column, mask) + vector(vectors, BIAS, column, L.S)
        std = read(two, column, mask) + vector(vectors, BIAS, column + L.S, 2 * L.S)
        kept = row_of(reals, L.raw, rows, slot)
        s = gaussian_tile(noise, stoch, stats0, stats1, kept, row, mean, std, column, mask,
                          min_std, L, KEEP)  # fmt: skip
        enter_next(s, L.cell_in, is_first, operands, column, mask, b, row, t, T, B, rows, KEEP)
