"""What stands between the products of a hoisted scan backward: as `rssm_step`."""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_backward import act_backward, categorical_backward, gaussian_backward
from fastrssm.kernels.rssm_pointwise import (
    before,
    elu_slope,
    kept_rows,
    read,
    row_of,
    silu_slope,
    write,
)
from fastrssm.kernels.rssm_step import by_block, place, row_vector
from fastrssm.kernels.rssm_tiles import (
    block_gru_backward_tile,
    ln_gru_backward_tile,
    torch_gru_backward_tile,
)


@triton.jit
def normed_row_backward(
    dy, column, mask, d, affine, hat, rstd, vectors, N: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    h = read(hat, column, mask)
    scale = row_vector(vectors, SCALE, column, mask)
    da = dy * silu_slope(h * scale + row_vector(vectors, SHIFT, column, mask))
    if LEARN:
        write(affine, column, da, mask)
    da = tl.where(mask, da * scale, 0.0)
    dot = tl.sum(da * h, axis=1) / N
    dx = da - h * dot[:, None]
    if SHIFT >= 0:
        dx -= (tl.sum(da, axis=1) / N)[:, None]
    write(d, column, dx * tl.load(rstd), mask)


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
    raw,       # products [blocks, B, N], or [B, LD] with the blocks side by side
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
    g = tl.program_id(1).to(tl.int64)
    dy = read(raw + (b * LD + g * N if LD > N else (g * B + b) * N), column, mask)
    column += tl.program_id(1) * N
    d = row_of(gradients, D, d_rows, slot)
    if SPLIT:
        y = read(row_of(operands, Y, rows, row), column, mask)
        write(d, column, dy * elu_slope(y), mask)
    else:
        affine = row_of(gradients, AFFINE, d_rows, slot)
        hat, rstd = row_of(operands, HAT, rows, row), row_of(reals, RSTD, rows, row) + g
        normed_row_backward(dy, column, mask, d, affine, hat, rstd, vectors, N, SCALE, SHIFT, LEARN)


@triton.jit(do_not_specialize=["t", "T", "B"])
def mix_back_kernel(
    raw,    # [blocks, B, D / blocks] products
    vectors, operands, reals, gradients,
    t, T, B, L: tl.constexpr, LEARN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, row, slot, d_rows = place(t, T, B, LEARN)
    rows = tl.cast(T, tl.int64) * B
    OWN: tl.constexpr = L.blocks.own
    column = tl.arange(0, BD)
    mask = (column < L.D)[None, :]
    dy = read(raw + b * OWN, by_block(column, B, OWN), mask)
    d = row_of(gradients, L.d_pre, d_rows, slot)
    affine = row_of(gradients, L.d_pre_affine, d_rows, slot)
    hat, rstd = row_of(operands, L.pre_hat, rows, row), row_of(reals, L.pre_rstd, rows, row)
    normed_row_backward(
        dy, column, mask, d, affine, hat, rstd, vectors, L.D, L.vectors[1], L.vectors[2], LEARN
    )


@triton.jit(do_not_specialize=["t", "T", "B"])
def cell_back_kernel(
    deter_grad, is_first, deter0, deter, vectors, operands, reals, gradients,
    from_head,      # [B, D] products
    from_state,     # [B, D] products of the next step
    from_blocks,    # [blocks, B, D / blocks] the others of block_gru, or None
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
    if from_blocks is not None:
        g += read(from_blocks + b * L.blocks.own, by_block(column, B, L.blocks.own), wanted)
    if feature is not None:
        g += read(feature + b * (L.D + L.S), column, wanted)
    if deter_grad is not None:
        g += read(deter_grad + row * L.D, column, mask)
    keep = kept_rows(is_first, row, ok, t, T)
    h = before(deter0, deter, row, b, t, B, L.D, column, mask & keep[:, None])
    gates = row_of(operands, L.gates, rows, row)
    d = row_of(gradients, L.d_gates, d_rows, slot)
    if L.blocks is not None:
        by = block_gru_backward_tile(g, h, gates, d, column, mask, L)
    elif L.cell == 0:
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
