"""Negative log likelihood of a diagonal Gaussian, summed over the last dimension."""

import triton
import triton.language as tl
from torch import Tensor

# elements of a tile; 8 per thread with the 4 warps that Triton takes by default
_TILE = 1024
# MASK: what there is a factor for
_NOTHING, _ROWS, _ELEMENTS = 0, 1, 2


@triton.jit(do_not_specialize=["N"])
def gaussian_nll_forward_kernel(
    target, mean, std,  # [N, S]
    mask,               # [N, S], [N] or nothing
    nll,                # [N]
    N, S, constant,
    HAS_STD: tl.constexpr, WEIGHT_BY_STD: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (row < N)[:, None] & (s < S)[None, :]
        at = row[:, None] * S + s[None, :]
        z = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        z -= tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_STD:
            sigma = tl.load(std + at, mask=inside, other=1.0).to(tl.float32)
            z /= sigma
            term = 0.5 * z * z + (tl.log(sigma) + constant)
            if WEIGHT_BY_STD:
                term *= sigma
        else:
            term = 0.5 * z * z + constant
        if MASK == 2:
            term *= tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
        # padded lanes would add the constant
        total += tl.sum(tl.where(inside, term, 0.0), axis=1)
    if MASK == 1:
        total *= tl.load(mask + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(nll + row, total, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def gaussian_nll_backward_kernel(
    grad,                 # [N]
    target, mean, std,    # [N, S]
    mask,                 # [N, S], [N] or nothing
    mean_grad, std_grad,  # [N, S]
    N, S,
    HAS_STD: tl.constexpr, WEIGHT_BY_STD: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = (row < N)[:, None] & (s < S)[None, :]
    at = row[:, None] * S + s[None, :]
    g = tl.load(grad + row, mask=row < N, other=0.0)
    if MASK == 1:
        g *= tl.load(mask + row, mask=row < N, other=0.0).to(tl.float32)
    g = g[:, None]
    if MASK == 2:
        g = g * tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    z -= tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_STD:
        # padded lanes divide by one and are not stored
        sigma = tl.load(std + at, mask=inside, other=1.0).to(tl.float32)
        if WEIGHT_BY_STD:
            g = g * sigma
        inverse = 1.0 / sigma
        z *= inverse
        g = g * inverse
        tl.store(std_grad + at, g * (1.0 - z * z), mask=inside)
    tl.store(mean_grad + at, -g * z, mask=inside)


def _blocks(S: int) -> tuple[int, int]:
    block_s = min(triton.next_power_of_2(max(S, 1)), 256)
    return _TILE // block_s, block_s


def _kind(mask: Tensor, S: int) -> int:
    width = mask.shape[-1]
    return _NOTHING if width == 0 else _ELEMENTS if width == S else _ROWS


def forward(
    target: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor,
    nll: Tensor,
    constant: float,
    weight_by_std: bool,
) -> None:
    """Fill nll [...] from [..., S]; std and mask are absent where their last size is 0."""
    N, S = nll.numel(), mean.shape[-1]
    block_n, block_s = _blocks(S)
    if N > 0:
        # an int would be another type to the kernel
        gaussian_nll_forward_kernel[(triton.cdiv(N, block_n),)](
            target, mean, std, mask, nll, N, S, float(constant),
            HAS_STD=std.shape[-1] > 0, WEIGHT_BY_STD=weight_by_std, MASK=_kind(mask, S),
            BLOCK_N=block_n, BLOCK_S=block_s,
        )  # fmt: skip


def backward(
    grad: Tensor,
    target: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor,
    mean_grad: Tensor,
    std_grad: Tensor,
    weight_by_std: bool,
) -> None:
    """Fill the gradients [..., S] of mean and, where there is one, std."""
    N, S = grad.numel(), mean.shape[-1]
    block_n, block_s = _blocks(S)
    if N > 0 and S > 0:
        gaussian_nll_backward_kernel[(triton.cdiv(N, block_n), triton.cdiv(S, block_s))](
            grad, target, mean, std, mask, mean_grad, std_grad, N, S,
            HAS_STD=std.shape[-1] > 0, WEIGHT_BY_STD=weight_by_std, MASK=_kind(mask, S),
            BLOCK_N=block_n, BLOCK_S=block_s,
        )  # fmt: skip
