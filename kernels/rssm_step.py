"""What stands between the products of a hoisted scan: one program for one row of the batch.

A row fits into the registers of a program, so norms need neither memory nor barriers.
"""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_backward import act_backward, categorical_backward, gaussian_backward
from fastrssm.kernels.rssm_pointwise import (
    before,
    elu,
    elu_slope,
    kept_rows,
    read,
    row_of,
    sigmoid,
    silu_slope,
    vector,
    write,
)
from fastrssm.kernels.rssm_tiles import (
    act_tile,
    drawn_class,
    gaussian_tile,
    ln_gru_backward_tile,
    ln_gru_tile,
    torch_gru_backward_tile,
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
def norm_row(x, mask, N: tl.constexpr, EPS: tl.constexpr):
    x = tl.where(mask, x, 0.0)
    x = tl.where(mask, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + EPS)
    return x * scale[:, None], scale


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
        h, scale = norm_row(x, mask, N, 1e-5)
        if KEEP:
            tl.store(row_of(reals, RSTD, rows, slot), scale)
            write(row_of(operands, HAT, rows, slot), column, h, mask)
        a = h * vector(vectors, SCALE, column, N) + vector(vectors, SHIFT, column, N)
        write(y, column, a * sigmoid(a), mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def cell_step_kernel(
    from_input, from_state,   # [B, 3 D] products
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
    x, s = from_input + b * (3 * L.D), from_state + b * (3 * L.D)
    gates = row_of(operands, L.gates, rows, slot)
    one = read(x, column, mask) + read(s, column, mask)
    two = read(x + L.D, column, mask) + read(s + L.D, column, mask)
    three, four = read(x + 2 * L.D, column, mask), read(s + 2 * L.D, column, mask)
    if L.cell == 0:
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


@triton.jit(do_not_specialize=["t", "T", "B"])
def draw_back_kernel(
    stoch_grad, stats0_grad, stats1_grad, noise, is_first, stats0,
    carry,     # [B, ld]: gradient of the stoch part of the next step's input
    feature,   # [B, D + S]: the same from the policy, or None
    reals, gradients, t, T, B, unimix, LD: tl.constexpr, L: tl.constexpr, LEARN: tl.constexpr,
    BG: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    b, row, slot, d_rows = place(t, T, B, LEARN)
    ok = b < B
    later = kept_rows(is_first, row + B, ok & (t + 1 < T), t + 1, T)
    d = row_of(gradients, L.head.d[len(L.head.later)], d_rows, slot)
    one = carry + b * LD
    two = None if feature is None else feature + b * (L.D + L.S) + L.D
    if L.categorical:
        categorical_backward(stoch_grad, stats0_grad, stats0, one, two, d, row, ok, later, unimix,
                             L, BG, K_TILE)  # fmt: skip
    else:
        kept = row_of(reals, L.raw, tl.cast(T, tl.int64) * B, row)
        gaussian_backward(stoch_grad, stats0_grad, stats1_grad, noise, kept, one, two, d, row, ok,
                          later, L)  # fmt: skip


@triton.jit(do_not_specialize=["t", "T", "B"])
def hidden_back_kernel(
    raw,       # [blocks, B, N] products, rows at a distance of LD
    vectors, operands, reals, gradients,
    t, T, B, N: tl.constexpr, LD: tl.constexpr, SPLIT: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, Y: tl.constexpr, HAT: tl.constexpr,
    RSTD: tl.constexpr, D: tl.constexpr, AFFINE: tl.constexpr, LEARN: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b, row, slot, d_rows = place(t, T, B, LEARN)
    rows = tl.cast(T, tl.int64) * B
    column = tl.arange(0, BN)
    mask = (column < N)[None, :]
    dy = read(raw + (tl.program_id(1).to(tl.int64) * B + b) * LD, column, mask)
    column += tl.program_id(1) * N
    d = row_of(gradients, D, d_rows, slot)
    if SPLIT:
        y = read(row_of(operands, Y, rows, row), column, mask)
        write(d, column, dy * elu_slope(y), mask)
    else:
        h = read(row_of(operands, HAT, rows, row), column, mask)
        scale = vector(vectors, SCALE, column, N)
        da = dy * silu_slope(h * scale + vector(vectors, SHIFT, column, N))
        if LEARN:
            write(row_of(gradients, AFFINE, d_rows, slot), column, da, mask)
        da = tl.where(mask, da * scale, 0.0)
        mean, dot = tl.sum(da, axis=1) / N, tl.sum(da * h, axis=1) / N
        rstd = tl.load(row_of(reals, RSTD, rows, row))
        write(d, column, (da - mean[:, None] - h * dot[:, None]) * rstd[:, None], mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def cell_back_kernel(
    deter_grad, is_first, deter0, deter, vectors, operands, reals, gradients,
    from_head,      # [B, D] products
    from_state,     # [B, D] products of the next step
    feature,        # [B, D + S] products of the next step's policy, or None
    past_in, past,  # [B, D] what passed the next step's cell by, and this one's
    t, T, B, L: tl.constexpr, LEARN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, row, slot, d_rows = place(t, T, B, LEARN)
    rows = tl.cast(T, tl.int64) * B
    ok = b < B
    column = tl.arange(0, BD)
    mask = (column < L.D)[None, :]
    later = kept_rows(is_first, row + B, ok & (t + 1 < T), t + 1, T)
    wanted = mask & later[:, None]
    g = read(from_head + b * L.D, column, mask)
    g += read(past_in + b * L.D, column, wanted) + read(from_state + b * L.D, column, wanted)
    if feature is not None:
        g += read(feature + b * (L.D + L.S), column, wanted)
    if deter_grad is not None:
        g += read(deter_grad + row * L.D, column, mask)
    keep = kept_rows(is_first, row, ok, t, T)
    h = before(deter0, deter, row, b, t, B, L.D, column, mask & keep[:, None])
    gates = row_of(operands, L.gates, rows, row)
    d = row_of(gradients, L.d_gates, d_rows, slot)
    if L.cell == 0:
        by = torch_gru_backward_tile(g, h, gates, d, column, mask, L)
    else:
        affine = row_of(gradients, L.d_gates_affine, d_rows, slot)
        dr, dc, du, total, dot, by = ln_gru_backward_tile(
            g, h, gates, affine, vectors, column, mask, L, LEARN
        )
        mean, dot = (total / (3 * L.D))[:, None], (dot / (3 * L.D))[:, None]
        rstd = tl.load(row_of(reals, L.gates_rstd, rows, row))[:, None]
        RESET: tl.constexpr = L.D if L.cell == 1 else 0
        CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
        UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
        h_r, h_c = read(gates + RESET, column, mask), read(gates + CANDIDATE, column, mask)
        h_u = read(gates + UPDATE, column, mask)
        write(d + RESET, column, (dr - mean - h_r * dot) * rstd, mask)
        write(d + CANDIDATE, column, (dc - mean - h_c * dot) * rstd, mask)
        write(d + UPDATE, column, (du - mean - h_u * dot) * rstd, mask)
    write(past + b * L.D, column, by, mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def act_back_kernel(
    action_grad, from_input, action, noise, reals, gradients,
    t, T, B, LD: tl.constexpr, L: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    b, row, slot, d_rows = place(t, T, B, LEARN)
    d = row_of(gradients, L.policy.d[len(L.policy.later)], d_rows, slot)
    kept = row_of(reals, L.action_raw, tl.cast(T, tl.int64) * B, row)
    act_backward(action_grad, from_input + b * LD + L.S, action, noise, kept, d, row, b < B, L)
