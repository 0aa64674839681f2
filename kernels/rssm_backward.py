"""A scan backward: each program takes some rows of the batch through all steps, last one first.

It leaves the gradients of pre-activations; those of weights follow as products over all steps.
What a stage reads and another row's thread might still have to read is never written in place.
"""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_blocks import blocks_backward
from fastrssm.kernels.rssm_layers import hidden_backward, norm_backward
from fastrssm.kernels.rssm_pointwise import (
    before,
    class_probs,
    kept_rows,
    product,
    read,
    row_of,
    std_slope,
    write,
    zero_sums,
    zero_tile,
)
from fastrssm.kernels.rssm_tiles import (
    block_gru_backward_tile,
    ln_gru_backward_tile,
    torch_gru_backward_tile,
)


@triton.jit
def network_backward(
    raw, row, slot, rows, d_rows, ok, weights, vectors, operands, reals, gradients,
    NET: tl.constexpr, LEARN: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the last layer's gradient to the first one's, NET.d[0]."""
    for i in tl.static_range(len(NET.y)):
        hidden_backward(
            row_of(gradients, NET.d[len(NET.y) - i], d_rows, slot),
            row_of(gradients, NET.d[len(NET.y) - 1 - i], d_rows, slot),
            None if NET.split
            else row_of(gradients, NET.affine[len(NET.y) - 1 - i], d_rows, slot),
            row_of(operands, NET.y[len(NET.y) - 1 - i], rows, row),
            None if NET.split else row_of(operands, NET.hat[len(NET.y) - 1 - i], rows, row),
            None if NET.split else row_of(reals, NET.rstd[len(NET.y) - 1 - i], rows, row),
            raw, ok, weights, vectors, NET.split, NET.later[len(NET.y) - 1 - i],
            2 if NET.split else 1,
            NET.scale[len(NET.y) - 1 - i], NET.shift[len(NET.y) - 1 - i],
            LEARN, BP, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def gaussian_backward(
    stoch_grad, mean_grad, std_grad, noise, kept_raw, carry, carry2, d, row, ok, later,
    L: tl.constexpr,
):  # fmt: skip
    """From the latent to mean and raw std; what the next step wants comes in up to two parts."""
    for n in range(0, L.S, L.BP):
        column = n + tl.arange(0, L.BP)
        mask = ok[:, None] & (column < L.S)[None, :]
        g = read(carry, column, mask & later[:, None])
        if carry2 is not None:
            g += read(carry2, column, mask & later[:, None])
        if stoch_grad is not None:
            g += read(stoch_grad + row * L.S, column, mask)
        dstd = g * read(noise + row * L.S, column, mask)
        if mean_grad is not None:
            g += read(mean_grad + row * L.S, column, mask)
        if std_grad is not None:
            dstd += read(std_grad + row * L.S, column, mask)
        write(d, column, g, mask)
        write(d + L.S, column, dstd * std_slope(read(kept_raw, column, mask), L.head.split), mask)


@triton.jit
def categorical_backward(
    stoch_grad, logits_grad, logits, carry, carry2, d, row, ok, later, unimix, L: tl.constexpr,
    BG: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """From the one-hot latent, straight through, to the logits."""
    CLASSES: tl.constexpr = L.S // L.groups
    k = tl.arange(0, K_TILE)
    real = (k < CLASSES)[None, :]
    for g0 in range(0, L.groups, BG):
        # rows of (row of the batch, group)
        g = g0 + tl.arange(0, BG)
        n: tl.constexpr = ok.shape[0] * BG
        mask = tl.reshape(ok[:, None] & (g < L.groups)[None, :], [n])[:, None] & real
        at = tl.reshape(row[:, None] * L.groups + g[None, :], [n])
        to = tl.reshape(d[:, None] + (g * CLASSES)[None, :], [n])
        wanted = tl.reshape(later[:, None] & (g < L.groups)[None, :], [n])[:, None] & mask
        ds = read(tl.reshape(carry[:, None] + (g * CLASSES)[None, :], [n]), k, wanted)
        if carry2 is not None:
            ds += read(tl.reshape(carry2[:, None] + (g * CLASSES)[None, :], [n]), k, wanted)
        if stoch_grad is not None:
            ds += read(stoch_grad + at * CLASSES, k, mask)
        probs = class_probs(read(logits + at * CLASSES, k, mask), real)
        dot = tl.sum(probs * ds, axis=1)[:, None]
        dl = (1.0 - unimix) * probs * (ds - dot)
        if logits_grad is not None:
            dl += read(logits_grad + at * CLASSES, k, mask)
        write(to, k, dl, mask)


@triton.jit
def cell_backward(
    deter_grad, deter0, deter, carry_deter, past, d_head, gates, rstd, d, affine, raw,
    row, b, ok, keep, later, t, B, weights, vectors, L: tl.constexpr, LEARN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the head and the future to the gates; what passes the cell by goes to past."""
    W: tl.constexpr = L.head.first
    RESET: tl.constexpr = L.D if L.cell == 1 else 0
    CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
    UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
    total = zero_sums(ok)
    dot = zero_sums(ok)
    for n in range(0, L.D, W.BN):
        g = zero_tile(ok, W)
        g = product(g, d_head, ok, weights, W, n, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        real = (column < L.D)[None, :]
        mask = ok[:, None] & real
        g += read(carry_deter + b * L.D, column, mask & later[:, None])
        if deter_grad is not None:
            g += read(deter_grad + row * L.D, column, mask)
        h = before(deter0, deter, row, b, t, B, L.D, column, keep[:, None] & real)
        if L.cell == 0:
            by = torch_gru_backward_tile(g, h, gates, d, column, mask, L)
        elif L.cell == 3:
            by = block_gru_backward_tile(g, h, gates, d, column, mask, L)
        else:
            dr, dc, du, sum1, sum2, by = ln_gru_backward_tile(
                g, h, gates, affine, vectors, column, mask, L, LEARN
            )
            write(raw + RESET, column, dr, mask)
            write(raw + CANDIDATE, column, dc, mask)
            write(raw + UPDATE, column, du, mask)
            total += sum1
            dot += sum2
        write(past, column, by, mask)
    tl.debug_barrier()
    if L.cell == 1 or L.cell == 2:
        norm_backward(raw, gates, rstd, d, total, dot, ok, 3 * L.D, L.vectors[5], L.BP)


@triton.jit
def state_backward(
    d, past, to, ok, keep, weights,
    L: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the gates to the state before the step."""
    for n in range(0, L.D, L.h.BN):
        acc = zero_tile(ok, L.h)
        x = d + (L.D if L.cell == 0 else 0)
        acc = product(acc, x, ok, weights, L.h, n, PRECISION, UPCAST)
        column = n + tl.arange(0, L.h.BN)
        mask = ok[:, None] & (column < L.D)[None, :]
        acc += read(past, column, mask)
        write(to, column, tl.where(keep[:, None], acc, 0.0), mask)


@triton.jit
def input_backward(
    d, to_stoch, to_action, ok, keep, weights,
    L: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From what reads [stoch | action] to them."""
    for n in range(0, W.N, W.BN):
        acc = zero_tile(ok, W)
        acc = product(acc, d, ok, weights, W, n, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        stoch = ok[:, None] & (column < L.S)[None, :]
        write(to_stoch, column, tl.where(keep[:, None], acc, 0.0), stoch)
        if to_action is not None:
            real = (column >= L.S) & (column < L.S + L.A)
            write(to_action, column - L.S, acc, ok[:, None] & real[None, :])


@triton.jit
def act_backward(action_grad, from_action, action, noise, kept_raw, d, row, ok, L: tl.constexpr):
    for n in range(0, L.A, L.BP):
        column = n + tl.arange(0, L.BP)
        mask = ok[:, None] & (column < L.A)[None, :]
        g = read(from_action, column, mask)
        if action_grad is not None:
            g += read(action_grad + row * L.A, column, mask)
        a = read(action + row * L.A, column, mask)
        g *= 1.0 - a * a
        write(d, column, g, mask)
        g *= read(noise + row * L.A, column, mask)
        write(d + L.A, column, g * std_slope(read(kept_raw, column, mask), True), mask)


@triton.jit
def feature_backward(
    d, between, to, ok, keep, weights,
    W: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From what the policy reads to a part of the state before the step."""
    for n in range(0, W.N, W.BN):
        acc = zero_tile(ok, W)
        acc = product(acc, d, ok, weights, W, n, PRECISION, UPCAST)
        column = n + tl.arange(0, W.BN)
        mask = ok[:, None] & (column < W.N)[None, :]
        acc += read(between, column, mask)
        write(to, column, tl.where(keep[:, None], acc, 0.0), mask)


@triton.jit(do_not_specialize=["T", "B"])
def rssm_backward_kernel(
    weights, vectors,                                            # packed
    deter_grad, stoch_grad, stats0_grad, stats1_grad, action_grad,  # [T, B, ...] or None
    noise, action_noise,                                         # [T, B, S], [T, B, A] or None
    is_first,                                                    # [T, B] or None
    deter0,                                                      # [B, D]
    deter, stats0, action,                      # [T, B, ...]; actions given or drawn
    operands, reals,                                             # kept [T * B, ...]
    gradients,            # of pre-activations [T * B, ...], or [B, ...] if no weight learns
    carry_deter, carry_stoch,                                    # [B, D], [B, S]: the results
    given_action_grad,                                           # [T, B, A]: result, or None
    between,                                                     # [B, 2 D + S + A]
    scratch,                                                     # [B, L.scratch]
    T, B, unimix,
    L: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr, K_TILE: tl.constexpr,
    LEARN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    ok = b < B
    rows = tl.cast(T, tl.int64) * B
    d_rows = rows if LEARN else tl.cast(B, tl.int64)
    raw = scratch + b * L.scratch
    THROUGH: tl.constexpr = L.policy is not None and not L.detach
    past = between + b * (2 * L.D + L.S + L.A)
    for i in range(T):
        t = T - 1 - i
        row = tl.cast(t, tl.int64) * B + b
        slot = row if LEARN else b
        later = ok & (t < T - 1)
        carry = carry_stoch + b * L.S
        keep = kept_rows(is_first, row, ok, t, T)
        d_last = row_of(gradients, L.head.d[len(L.head.later)], d_rows, slot)
        if L.categorical:
            categorical_backward(stoch_grad, stats0_grad, stats0, carry, None, d_last, row, ok,
                                 later, unimix, L, BG, K_TILE)  # fmt: skip
        else:
            kept = row_of(reals, L.raw, rows, row)
            gaussian_backward(stoch_grad, stats0_grad, stats1_grad, noise, kept, carry, None,
                              d_last, row, ok, later, L)  # fmt: skip
        tl.debug_barrier()
        network_backward(raw, row, slot, rows, d_rows, ok, weights, vectors, operands, reals,
                         gradients, L.head, LEARN, L.BP, PRECISION, UPCAST)  # fmt: skip
        d_head = row_of(gradients, L.head.d[0], d_rows, slot)
        gates = row_of(operands, L.gates, rows, row)
        d_gates = row_of(gradients, L.d_gates, d_rows, slot)
        cell_backward(
            deter_grad, deter0, deter, carry_deter, past, d_head, gates,
            row_of(reals, L.gates_rstd, rows, row), d_gates,
            row_of(gradients, L.d_gates_affine, d_rows, slot), raw, row, b, ok, keep, later, t, B,
            weights, vectors, L, LEARN, PRECISION, UPCAST,
        )  # fmt: skip
        # what the policy read adds to both parts of the state
        whole = ok if THROUGH else keep
        mid = past + L.D
        to_stoch = mid + L.D if THROUGH else carry_stoch + b * L.S
        to_deter = mid if THROUGH else carry_deter + b * L.D
        to_action = mid + L.D + L.S
        if L.policy is None:
            to_action = None if given_action_grad is None else given_action_grad + row * L.A
        if L.blocks is None:
            state_backward(d_gates, past, to_deter, ok, whole, weights, L, PRECISION, UPCAST)
        if L.blocks is not None:
            blocks_backward(
                d_gates, past, action + row * L.A, to_deter, to_stoch, to_action,
                raw, row, rows, slot, d_rows, ok, whole, weights, vectors,
                operands, reals, gradients, L, LEARN, PRECISION, UPCAST,
            )  # fmt: skip
        elif L.pre is None:
            input_backward(d_gates, to_stoch, to_action, ok, whole, weights, L, L.x,
                           PRECISION, UPCAST)  # fmt: skip
        else:
            d_pre = row_of(gradients, L.d_pre, d_rows, slot)
            hidden_backward(
                d_gates, d_pre, row_of(gradients, L.d_pre_affine, d_rows, slot), None,
                row_of(operands, L.pre_hat, rows, row), row_of(reals, L.pre_rstd, rows, row),
                raw, ok, weights, vectors, False, L.x, 1, L.vectors[1], L.vectors[2],
                LEARN, L.BP, PRECISION, UPCAST,
            )  # fmt: skip
            input_backward(d_pre, to_stoch, to_action, ok, whole, weights, L, L.pre,
                           PRECISION, UPCAST)  # fmt: skip
        tl.debug_barrier()
        if L.policy is not None:
            d_act = row_of(gradients, L.policy.d[len(L.policy.later)], d_rows, slot)
            kept = row_of(reals, L.action_raw, rows, row)
            act_backward(action_grad, to_action, action, action_noise, kept, d_act, row, ok, L)
            tl.debug_barrier()
            network_backward(raw, row, slot, rows, d_rows, ok, weights, vectors, operands, reals,
                             gradients, L.policy, LEARN, L.BP, PRECISION, UPCAST)  # fmt: skip
            if THROUGH:
                d_first = row_of(gradients, L.policy.d[0], d_rows, slot)
                feature_backward(d_first, mid, carry_deter + b * L.D, ok, keep, weights,
                                 L.policy.first, PRECISION, UPCAST)  # fmt: skip
                feature_backward(d_first, mid + L.D, carry_stoch + b * L.S, ok, keep, weights,
                                 L.policy.second, PRECISION, UPCAST)  # fmt: skip
            tl.debug_barrier()
