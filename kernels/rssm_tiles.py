"""What follows the products of a step, on tiles: the same for streamed and for hoisted scans."""

import triton
import triton.language as tl

from fastrssm.kernels.rssm_pointwise import (
    class_probs,
    ln_gates,
    ln_gates_backward,
    read,
    sigmoid,
    std_of,
    tanh,
    torch_gru_backward,
    vector,
    write,
)


@triton.jit
def gate_affine(reset, candidate, update, vectors, column, L: tl.constexpr):
    """Scale and shift of the three gates of a unit, which lie in the cell's own order."""
    RESET: tl.constexpr = L.D if L.cell == 1 else 0
    CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
    UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
    SCALE: tl.constexpr = L.vectors[4]
    SHIFT: tl.constexpr = L.vectors[5]
    N: tl.constexpr = 3 * L.D
    reset *= vector(vectors, SCALE, RESET + column, N)
    candidate *= vector(vectors, SCALE, CANDIDATE + column, N)
    update *= vector(vectors, SCALE, UPDATE + column, N)
    reset += vector(vectors, SHIFT, RESET + column, N)
    candidate += vector(vectors, SHIFT, CANDIDATE + column, N)
    update += vector(vectors, SHIFT, UPDATE + column, N)
    return reset, candidate, update


@triton.jit
def torch_gru_tile(
    r, z, xn, hn, h, gates, vectors, column, mask, L: tl.constexpr, KEEP: tl.constexpr
):
    """The new state from the old one and from products without biases."""
    IN_BIAS: tl.constexpr = L.vectors[3]
    BIAS: tl.constexpr = L.vectors[6]
    r += vector(vectors, IN_BIAS, column, L.D) + vector(vectors, BIAS, column, L.D)
    at = column + L.D
    z += vector(vectors, IN_BIAS, at, 2 * L.D) + vector(vectors, BIAS, at, 2 * L.D)
    at += L.D
    xn += vector(vectors, IN_BIAS, at, 3 * L.D)
    hn += vector(vectors, BIAS, at, 3 * L.D)
    r, z = sigmoid(r), sigmoid(z)
    new = tanh(xn + r * hn)
    if KEEP:
        write(gates, column, r, mask)
        write(gates + L.D, column, z, mask)
        write(gates + 2 * L.D, column, new, mask)
        write(gates + 3 * L.D, column, hn, mask)
    return new + z * (h - new)


@triton.jit
def ln_gru_tile(
    reset, candidate, update, h, gates, vectors, column, mask, L: tl.constexpr, KEEP: tl.constexpr
):
    """The new state from the old one and from normalised pre-activations."""
    RESET: tl.constexpr = L.D if L.cell == 1 else 0
    CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
    UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
    if KEEP:
        write(gates + RESET, column, reset, mask)
        write(gates + CANDIDATE, column, candidate, mask)
        write(gates + UPDATE, column, update, mask)
    reset, candidate, update = gate_affine(reset, candidate, update, vectors, column, L)
    _, z, new = ln_gates(reset, candidate, update, L.cell == 2)
    return new + z * (h - new)


@triton.jit
def gaussian_tile(
    noise, stoch, mean_to, std_to, kept_raw, row, mean, raw, column, mask, min_std,
    L: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Draw from mean and raw std and return what was drawn."""
    std = std_of(raw, min_std, L.head.split)
    s = mean + std * read(noise + row * L.S, column, mask)
    write(mean_to + row * L.S, column, mean, mask)
    write(std_to + row * L.S, column, std, mask)
    write(stoch + row * L.S, column, s, mask)
    if KEEP:
        write(kept_raw, column, raw, mask)
    return s


@triton.jit
def act_tile(
    action_noise, action, cell_in, kept_raw, row, mean, raw, column, mask, min_std,
    L: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    e = read(action_noise + row * L.A, column, mask)
    a = tanh(mean + std_of(raw, min_std, True) * e)
    write(action + row * L.A, column, a, mask)
    write(cell_in + L.S, column, a, mask)
    if KEEP:
        write(kept_raw, column, raw, mask)


@triton.jit
def drawn_class(logits, u, real, unimix, CLASSES: tl.constexpr):
    """One-hot classes from uniform numbers, by the inverse of the distribution."""
    k = tl.arange(0, logits.shape[1])
    probs = (1.0 - unimix) * class_probs(logits, real) + unimix / CLASSES
    below = (tl.cumsum(probs, axis=1) <= u[:, None]) & real
    # the last class covers a total rounded to below 1
    index = tl.minimum(tl.sum(below.to(tl.int32), axis=1), CLASSES - 1)
    return (k[None, :] == index[:, None]).to(tl.float32)


@triton.jit
def torch_gru_backward_tile(g, h, gates, d, column, mask, L: tl.constexpr):
    """Write the gates' gradients and return what passes the cell by."""
    r, z = read(gates, column, mask), read(gates + L.D, column, mask)
    new, hn = read(gates + 2 * L.D, column, mask), read(gates + 3 * L.D, column, mask)
    dr, dz, dxn, dhn, by = torch_gru_backward(g, r, z, new, hn, h)
    write(d, column, dxn, mask)
    write(d + L.D, column, dr, mask)
    write(d + 2 * L.D, column, dz, mask)
    write(d + 3 * L.D, column, dhn, mask)
    return by


@triton.jit
def ln_gru_backward_tile(
    g, h, gates, affine, vectors, column, mask, L: tl.constexpr, LEARN: tl.constexpr
):
    """Gradients of the normalised gates, their two row sums, and what passes the cell by."""
    RESET: tl.constexpr = L.D if L.cell == 1 else 0
    CANDIDATE: tl.constexpr = 2 * L.D if L.cell == 1 else L.D
    UPDATE: tl.constexpr = 0 if L.cell == 1 else 2 * L.D
    SCALE: tl.constexpr = L.vectors[4]
    hat_r, hat_c = read(gates + RESET, column, mask), read(gates + CANDIDATE, column, mask)
    hat_u = read(gates + UPDATE, column, mask)
    reset, c, update = gate_affine(hat_r, hat_c, hat_u, vectors, column, L)
    r, z, new = ln_gates(reset, c, update, L.cell == 2)
    dr, dc, du, by = ln_gates_backward(g, r, z, new, c, h, L.cell == 2)
    if LEARN:
        write(affine + RESET, column, dr, mask)
        write(affine + CANDIDATE, column, dc, mask)
        write(affine + UPDATE, column, du, mask)
    dr = tl.where(mask, dr * vector(vectors, SCALE, RESET + column, 3 * L.D), 0.0)
    dc = tl.where(mask, dc * vector(vectors, SCALE, CANDIDATE + column, 3 * L.D), 0.0)
    du = tl.where(mask, du * vector(vectors, SCALE, UPDATE + column, 3 * L.D), 0.0)
    total = tl.sum(dr + dc + du, axis=1)
    dot = tl.sum(dr * hat_r + dc * hat_c + du * hat_u, axis=1)
    return dr, dc, du, total, dot, by


@triton.jit
def in_blocks(column, OWN: tl.constexpr):
    """Where the reset gate of a unit lies; the other two follow at distances of OWN."""
    return column + 2 * OWN * (column // OWN)


@triton.jit
def block_gru_tile(
    reset, candidate, update, h, gates, vectors, column, mask, L: tl.constexpr, KEEP: tl.constexpr
):
    """The new state from the old one and from products without biases."""
    BIAS: tl.constexpr = L.vectors[3]
    OWN: tl.constexpr = L.blocks.own
    N: tl.constexpr = 3 * L.D
    at = in_blocks(column, OWN)
    # columns beyond the state reach no further than the gates do, and are not stored
    reset += vector(vectors, BIAS, at, N)
    candidate += vector(vectors, BIAS, at + OWN, N)
    update += vector(vectors, BIAS, at + 2 * OWN, N)
    if KEEP:
        write(gates, at, reset, mask)
        write(gates, at + OWN, candidate, mask)
        write(gates, at + 2 * OWN, update, mask)
    _, z, new = ln_gates(reset, candidate, update, True)
    return new + z * (h - new)


@triton.jit
def block_gru_backward_tile(g, h, gates, d, column, mask, L: tl.constexpr):
    """Write the gates' gradients and return what passes the cell by."""
    OWN: tl.constexpr = L.blocks.own
    at = in_blocks(column, OWN)
    reset, c = read(gates, at, mask), read(gates, at + OWN, mask)
    r, z, new = ln_gates(reset, c, read(gates, at + 2 * OWN, mask), True)
    dr, dc, du, by = ln_gates_backward(g, r, z, new, c, h, True)
    write(d, at, dr, mask)
    write(d, at + OWN, dc, mask)
    write(d, at + 2 * OWN, du, mask)
    return by
