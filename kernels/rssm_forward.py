"""A scan forward: each program takes some rows of the batch through all steps.

Weights stream through the cache, packed as `rssm_layout` says. Triton cannot cut a tile in
registers along the dimension that is summed next, so what a stage leaves lies in memory of the
program's own and is read again: a barrier after every stage, for the threads of a program do not
see each other's stores before it.
"""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_blocks import block_gru, shared_layers
from fastrssm.kernels.rssm_layers import hidden_layer, moments
from fastrssm.kernels.rssm_pointwise import (
    before,
    kept_rows,
    product,
    product3,
    read,
    row_of,
    vector,
    write,
    zero_sums,
    zero_tile,
)
from fastrssm.kernels.rssm_tiles import (
    act_tile,
    drawn_class,
    gaussian_tile,
    ln_gru_tile,
    torch_gru_tile,
)


@triton.jit
def network(
    x, x2, proj, raw, slot, rows, ok, weights, vectors, operands, reals,
    NET: tl.constexpr, KEEP: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All hidden layers; the last of them is kept as NET.y[-1]."""
    for i in tl.static_range(len(NET.y)):
        hidden_layer(
            x if i == 0 else row_of(operands, NET.y[i - 1], rows, slot),
            x2 if i == 0 else None,
            proj if i == 0 else None,
            row_of(operands, NET.y[i], rows, slot),
            None if NET.split else row_of(operands, NET.hat[i], rows, slot),
            None if NET.split else row_of(reals, NET.rstd[i], rows, slot),
            raw, ok, weights, vectors, NET.split,
            NET.first if i == 0 else NET.later[i - 1],
            NET.second,
            2 if NET.split and i > 0 else 1,
            NET.bias[i], NET.scale[i], NET.shift[i], KEEP, BP, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def mean_and_raw(
    x, ok, weights, vectors, n, NET: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """Columns from n of the two halves of a network's last layer."""
    W: tl.constexpr = NET.later[len(NET.later) - 1]
    BIAS: tl.constexpr = NET.bias[len(NET.later)]
    zero = zero_tile(ok, W)
    mean = product(zero, x, ok, weights, W, n, PRECISION, UPCAST)
    x += W.K if NET.split else 0
    raw = product(zero, x, ok, weights + W.block, W, n, PRECISION, UPCAST)
    column = n + tl.arange(0, W.BN)
    mean += vector(vectors, BIAS, column, W.N)
    return mean, raw + vector(vectors, BIAS, column + W.N, 2 * W.N)


@triton.jit
def enter(
    action, deter0, stoch0, deter, stoch, cell_in, deter_in, row, b, ok, keep, t, B,
    L: tl.constexpr,
):  # fmt: skip
    """Operands of a step: the state before it, zero where an episode begins, and the action."""
    for n in range(0, L.D, L.BP):
        column = n + tl.arange(0, L.BP)
        real = (column < L.D)[None, :]
        h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & real)
        write(deter_in, column, h, ok[:, None] & real)
    for n in range(0, L.S, L.BP):
        column = n + tl.arange(0, L.BP)
        real = (column < L.S)[None, :]
        s = before(stoch0, stoch, row, b, t, B, L.S, column, keep[:, None] & real)
        write(cell_in, column, s, ok[:, None] & real)
    if action is not None:
        for n in range(0, L.A, L.BP):
            column = n + tl.arange(0, L.BP)
            mask = ok[:, None] & (column < L.A)[None, :]
            a = read(action + row * L.A, column, mask)
            if L.cell == 3:
                a /= tl.maximum(tl.abs(a), 1.0)
            write(cell_in + L.S, column, a, mask)


@triton.jit
def act(
    action_noise, action, cell_in, kept_raw, row, ok, x, weights, vectors, min_std,
    L: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = L.policy.later[len(L.policy.later) - 1]
    for n in range(0, L.A, W.BN):
        mean, raw = mean_and_raw(x, ok, weights, vectors, n, L.policy, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        mask = ok[:, None] & (column < L.A)[None, :]
        act_tile(action_noise, action, cell_in, kept_raw, row, mean, raw, column, mask, min_std,
                 L, KEEP)  # fmt: skip


@triton.jit
def torch_gru(
    x, h_in, gates, deter0, deter, deter_out, row, b, ok, keep, t, B, weights, vectors,
    L: tl.constexpr, KEEP: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for n in range(0, L.D, L.x.BN):
        column = n + tl.arange(0, L.x.BN)
        real = (column < L.D)[None, :]
        mask = ok[:, None] & real
        zero = zero_tile(ok, L.x)
        r, z, xn = product3(zero, zero, zero, x, ok, weights, L.x, n, PRECISION, UPCAST)
        r, z, hn = product3(r, z, zero, h_in, ok, weights, L.h, n, PRECISION, UPCAST)
        h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & real)
        new = torch_gru_tile(r, z, xn, hn, h, gates, vectors, column, mask, L, KEEP)
        write(deter + row * L.D, column, new, mask)
        if NARROW:
            write(deter_out, column, new, mask)


@triton.jit
def ln_gru(
    x, h_in, gates, rstd, raw, deter0, deter, deter_out, row, b, ok, keep, t, B,
    weights, vectors, L: tl.constexpr, KEEP: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    total = zero_sums(ok)
    for n in range(0, L.x.N, L.x.BN):
        acc = zero_tile(ok, L.x)
        acc = product(acc, x, ok, weights, L.x, n, PRECISION, UPCAST)
        acc = product(acc, h_in, ok, weights, L.h, n, PRECISION, UPCAST)
        column = n + tl.arange(0, L.x.BN)
        mask = ok[:, None] & (column < L.x.N)[None, :]
        acc = tl.where(mask, acc + vector(vectors, L.vectors[3], column, L.x.N), 0.0)
        write(raw, column, acc, mask)
        total += tl.sum(acc, axis=1)
    tl.debug_barrier()
    mean, scale = moments(raw, total, ok, L.x.N, L.eps, L.BP)
    if KEEP:
        tl.store(rstd, scale, mask=ok)
    RESET: tl.constexpr = L.D if L.cell == 1 else 0
    CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
    UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
    for n in range(0, L.D, L.BP):
        column = n + tl.arange(0, L.BP)
        real = (column < L.D)[None, :]
        mask = ok[:, None] & real
        reset = (read(raw + RESET, column, mask) - mean[:, None]) * scale[:, None]
        candidate = (read(raw + CANDIDATE, column, mask) - mean[:, None]) * scale[:, None]
        update = (read(raw + UPDATE, column, mask) - mean[:, None]) * scale[:, None]
        h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & real)
        new = ln_gru_tile(reset, candidate, update, h, gates, vectors, column, mask, L, KEEP)
        write(deter + row * L.D, column, new, mask)
        if NARROW:
            write(deter_out, column, new, mask)


@triton.jit
def draw_gaussian(
    noise, stoch, mean_to, std_to, kept_raw, row, ok, x, weights, vectors, min_std,
    L: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = L.head.later[len(L.head.later) - 1]
    for n in range(0, L.S, W.BN):
        mean, raw = mean_and_raw(x, ok, weights, vectors, n, L.head, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        mask = ok[:, None] & (column < L.S)[None, :]
        gaussian_tile(noise, stoch, mean_to, std_to, kept_raw, row, mean, raw, column, mask,
                      min_std, L, KEEP)  # fmt: skip


@triton.jit
def draw_categorical(
    noise, stoch, logits_to, row, ok, x, weights, vectors, unimix, L: tl.constexpr,
    BG: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = L.head.later[len(L.head.later) - 1]
    for n in range(0, L.S, W.BN):
        acc = zero_tile(ok, W)
        acc = product(acc, x, ok, weights, W, n, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        acc += vector(vectors, L.head.bias[len(L.head.later)], column, L.S)
        write(logits_to + row * L.S, column, acc, ok[:, None] & (column < L.S)[None, :])
    tl.debug_barrier()
    CLASSES: tl.constexpr = L.S // L.groups
    k = tl.arange(0, K_TILE)
    real = (k < CLASSES)[None, :]
    for g0 in range(0, L.groups, BG):
        # rows of (row of the batch, group)
        g = g0 + tl.arange(0, BG)
        there = tl.reshape(ok[:, None] & (g < L.groups)[None, :], [ok.shape[0] * BG])
        at = tl.reshape(row[:, None] * L.groups + g[None, :], [ok.shape[0] * BG])
        mask = there[:, None] & real
        u = tl.load(noise + at, mask=there, other=0.0)
        one_hot = drawn_class(read(logits_to + at * CLASSES, k, mask), u, real, unimix, CLASSES)
        write(stoch + at * CLASSES, k, one_hot, mask)


@triton.jit(do_not_specialize=["T", "B"])
def rssm_forward_kernel(
    weights, vectors,               # packed
    embed_proj,                     # [T, B, hidden of the head] or None
    action,                         # [T, B, A]; with a policy the result
    noise, action_noise,            # [T, B, S or groups], [T, B, A] or None
    is_first,                       # [T, B] or None
    deter0, stoch0,                 # [B, D], [B, S]
    policy_proj,                    # [T, B, hidden of the policy] or None
    deter, stoch, stats0, stats1,   # [T, B, ...]
    operands, reals,                # kept [T * B, ...], or [B, ...] if nothing is kept
    scratch,                        # [B, L.scratch]
    T, B, min_std, unimix, action_min_std,
    L: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr, K_TILE: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = operands.dtype.element_ty != tl.float32
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    ok = b < B
    steps = T if KEEP else 1
    rows = tl.cast(B, tl.int64) * steps
    raw = scratch + b * L.scratch
    for t in range(T):
        row = tl.cast(t, tl.int64) * B + b
        slot = row if KEEP else b
        keep = kept_rows(is_first, row, ok, t, T)
        cell_in = row_of(operands, L.cell_in, rows, slot)
        deter_in = row_of(operands, L.deter_in, rows, slot)
        given = action if L.policy is None else None
        enter(given, deter0, stoch0, deter, stoch, cell_in, deter_in, row, b, ok, keep, t, B, L)
        tl.debug_barrier()
        if L.policy is not None:
            network(
                deter_in, cell_in,
                None if policy_proj is None else policy_proj + row * L.policy.hidden,
                raw, slot, rows, ok, weights, vectors, operands, reals,
                L.policy, KEEP, L.BP, PRECISION, UPCAST,
            )  # fmt: skip
            x = row_of(operands, L.policy.y[len(L.policy.y) - 1], rows, slot)
            kept = row_of(reals, L.action_raw, rows, slot)
            act(action_noise, action, cell_in, kept, row, ok, x, weights, vectors,
                action_min_std, L, KEEP, PRECISION, UPCAST)  # fmt: skip
            tl.debug_barrier()
        x = cell_in
        if L.blocks is not None:
            shared = row_of(operands, L.blocks.y, rows, slot)
            shared_layers(deter_in, cell_in, shared, row_of(operands, L.blocks.hat, rows, slot),
                          row_of(reals, L.blocks.rstd, rows, slot), raw, ok, weights, vectors, L,
                          KEEP, PRECISION, UPCAST)  # fmt: skip
        if L.pre is not None:
            x = row_of(operands, L.pre_y, rows, slot)
            hidden_layer(
                cell_in if L.blocks is None else deter_in, None if L.blocks is None else shared,
                None, x, row_of(operands, L.pre_hat, rows, slot),
                row_of(reals, L.pre_rstd, rows, slot), raw, ok, weights, vectors, False,
                L.pre, None if L.blocks is None else L.blocks.shared,
                1 if L.blocks is None else L.blocks.count, L.vectors[0], L.vectors[1], L.vectors[2],
                KEEP, L.BP, PRECISION, UPCAST,
            )  # fmt: skip
        gates = row_of(operands, L.gates, rows, slot)
        deter_out = row_of(operands, L.deter_out, rows, slot)
        if L.cell == 0:
            torch_gru(x, deter_in, gates, deter0, deter, deter_out, row, b, ok, keep, t, B,
                      weights, vectors, L, KEEP, NARROW, PRECISION, UPCAST)  # fmt: skip
        elif L.cell == 3:
            block_gru(x, gates, deter0, deter, deter_out, row, b, ok, keep, t, B, weights, vectors,
                      L, KEEP, NARROW, PRECISION, UPCAST)  # fmt: skip
        else:
            rstd = row_of(reals, L.gates_rstd, rows, slot)
            ln_gru(x, deter_in, gates, rstd, raw, deter0, deter, deter_out, row, b, ok, keep,
                   t, B, weights, vectors, L, KEEP, NARROW, PRECISION, UPCAST)  # fmt: skip
        tl.debug_barrier()
        network(
            deter_out if NARROW else deter + row * L.D, None,
            None if embed_proj is None else embed_proj + row * L.head.hidden,
            raw, slot, rows, ok, weights, vectors, operands, reals,
            L.head, KEEP, L.BP, PRECISION, UPCAST,
        )  # fmt: skip
        x = row_of(operands, L.head.y[len(L.head.y) - 1], rows, slot)
        if L.categorical:
            draw_categorical(noise, stoch, stats0, row, ok, x, weights, vectors, unimix, L,
                             BG, K_TILE, PRECISION, UPCAST)  # fmt: skip
        else:
            kept = row_of(reals, L.raw, rows, slot)
            draw_gaussian(noise, stoch, stats0, stats1, kept, row, ok, x, weights, vectors,
                          min_std, L, KEEP, PRECISION, UPCAST)  # fmt: skip
        tl.debug_barrier()
