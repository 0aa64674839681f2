"""Lambda-returns: one reverse scan, and one forward scan for the gradient."""

import math

import triton
import triton.language as tl
from torch import Tensor

# columns that one program of one warp walks through time: a line of 16 bytes per thread
_COLUMNS = 128
# steps whose loads are under way at once: a step alone would wait for memory
_AHEAD = 6


@triton.jit(do_not_specialize=["N", "T"])
def lambda_return_forward_kernel(
    rewards, next_values, discounts,  # [N, T, B]
    returns,                          # [N, T, B]
    N, T, B, discount, lambda_,
    HAS_DISCOUNTS: tl.constexpr, BLOCK_B: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) % tl.cdiv(B, BLOCK_B) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = (tl.program_id(0) // tl.cdiv(B, BLOCK_B)).to(tl.int64)
    mask = b < B
    last = (n * T + T - 1) * B + b
    carry = tl.load(next_values + last, mask=mask, other=0.0).to(tl.float32)
    for i in tl.range(0, T, num_stages=AHEAD):
        at = (n * T + T - 1 - i) * B + b
        r = tl.load(rewards + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(next_values + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_DISCOUNTS:
            d = tl.load(discounts + at, mask=mask, other=0.0).to(tl.float32)
        else:
            d = discount
        carry = r + d * (1.0 - lambda_) * v + d * lambda_ * carry
        tl.store(returns + at, carry, mask=mask)


@triton.jit(do_not_specialize=["N", "T"])
def lambda_return_backward_kernel(
    grad, returns,                                 # [N, T, B]
    next_values, discounts,                        # [N, T, B]
    rewards_grad, next_values_grad, discounts_grad,  # [N, T, B]
    N, T, B, discount, lambda_,
    HAS_DISCOUNTS: tl.constexpr, BLOCK_B: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) % tl.cdiv(B, BLOCK_B) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = (tl.program_id(0) // tl.cdiv(B, BLOCK_B)).to(tl.int64)
    mask = b < B
    # what the earlier return passes on to this one
    carry = tl.zeros([BLOCK_B], tl.float32)
    for t in tl.range(0, T, num_stages=AHEAD):
        at = (n * T + t) * B + b
        is_last = t == T - 1
        reached = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) + carry
        if HAS_DISCOUNTS:
            d = tl.load(discounts + at, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(next_values + at, mask=mask, other=0.0).to(tl.float32)
            # after the last step the bootstrap takes the place of the next return
            following = tl.load(returns + at + B, mask=mask & (t < T - 1), other=0.0)
            following = tl.where(is_last, v, following)
            mixed = (1.0 - lambda_) * v + lambda_ * following
            tl.store(discounts_grad + at, reached * mixed, mask=mask)
        else:
            d = discount
        passed = d * reached
        # the last return contains its value twice: mixed in, and as the bootstrap
        share = tl.where(is_last, 1.0, 1.0 - lambda_)
        tl.store(rewards_grad + at, reached, mask=mask)
        tl.store(next_values_grad + at, share * passed, mask=mask)
        carry = lambda_ * passed


def _sizes(x: Tensor) -> tuple[int, int, int]:
    *batches, T, B = x.shape
    return math.prod(batches), T, B


def forward(
    rewards: Tensor,
    next_values: Tensor,
    discounts: Tensor,
    returns: Tensor,
    discount: float,
    lambda_: float,
) -> None:
    """Fill returns [..., T, B]; discounts [..., T, 0]: `discount` everywhere."""
    N, T, B = _sizes(rewards)
    if N * B > 0:
        # an int would be another type to the kernel
        lambda_return_forward_kernel[(N * triton.cdiv(B, _COLUMNS),)](
            rewards, next_values, discounts, returns, N, T, B, float(discount), float(lambda_),
            HAS_DISCOUNTS=discounts.shape[-1] > 0, BLOCK_B=_COLUMNS, AHEAD=_AHEAD, num_warps=1,
        )  # fmt: skip


def backward(
    grad: Tensor,
    returns: Tensor,
    next_values: Tensor,
    discounts: Tensor,
    rewards_grad: Tensor,
    next_values_grad: Tensor,
    discounts_grad: Tensor,
    discount: float,
    lambda_: float,
) -> None:
    """Fill the gradients [..., T, B] of what forward read."""
    N, T, B = _sizes(next_values)
    if N * B > 0:
        lambda_return_backward_kernel[(N * triton.cdiv(B, _COLUMNS),)](
            grad, returns, next_values, discounts, rewards_grad, next_values_grad, discounts_grad,
            N, T, B, float(discount), float(lambda_),
            HAS_DISCOUNTS=discounts.shape[-1] > 0, BLOCK_B=_COLUMNS, AHEAD=_AHEAD, num_warps=1,
        )  # fmt: skip
