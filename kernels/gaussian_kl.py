"""KL divergence of diagonal Gaussians, summed over the latent."""

import triton
import triton.language as tl
from torch import Tensor

# elements of a tile; 8 per thread with the 4 warps that Triton takes by default
_TILE = 1024


@triton.jit(do_not_specialize=["N"])
def gaussian_kl_forward_kernel(
    post_mean, post_std, prior_mean, prior_std,  # [N, S]
    kl,                                          # [N]
    N, S,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (row < N)[:, None] & (s < S)[None, :]
        at = row[:, None] * S + s[None, :]
        # padded lanes contribute 0: both are the standard normal
        pm = tl.load(post_mean + at, mask=mask, other=0.0).to(tl.float32)
        ps = tl.load(post_std + at, mask=mask, other=1.0).to(tl.float32)
        qm = tl.load(prior_mean + at, mask=mask, other=0.0).to(tl.float32)
        qs = tl.load(prior_std + at, mask=mask, other=1.0).to(tl.float32)
        ratio = ps / qs
        shift = (pm - qm) / qs
        total += tl.sum(0.5 * (ratio * ratio + shift * shift - 1.0) - tl.log(ratio), axis=1)
    tl.store(kl + row, total, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def gaussian_kl_backward_kernel(
    grad, kl,                                                          # [N]
    post_mean, post_std, prior_mean, prior_std,                        # [N, S]
    post_mean_grad, post_std_grad, prior_mean_grad, prior_std_grad,    # [N, S]
    N, S, post_scale, prior_scale, free_nats,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (row < N)[:, None] & (s < S)[None, :]
    at = row[:, None] * S + s[None, :]
    # padded lanes divide by one and are not stored
    pm = tl.load(post_mean + at, mask=mask, other=0.0).to(tl.float32)
    ps = tl.load(post_std + at, mask=mask, other=1.0).to(tl.float32)
    qm = tl.load(prior_mean + at, mask=mask, other=0.0).to(tl.float32)
    qs = tl.load(prior_std + at, mask=mask, other=1.0).to(tl.float32)
    g = tl.load(grad + row, mask=row < N, other=0.0)
    value = tl.load(kl + row, mask=row < N, other=0.0)
    # without free nats no row is free, also none whose KL was rounded below zero
    g = tl.where((free_nats > 0.0) & (value < free_nats), 0.0, g)[:, None]
    inverse = 1.0 / qs
    ratio = ps * inverse
    shift = (pm - qm) * inverse
    mean = shift * inverse
    tl.store(post_mean_grad + at, post_scale * g * mean, mask=mask)
    tl.store(post_std_grad + at, post_scale * g * (ratio * inverse - 1.0 / ps), mask=mask)
    tl.store(prior_mean_grad + at, -prior_scale * g * mean, mask=mask)
    squares = ratio * ratio + shift * shift
    tl.store(prior_std_grad + at, prior_scale * g * (1.0 - squares) * inverse, mask=mask)


def _blocks(S: int) -> tuple[int, int]:
    block_s = min(triton.next_power_of_2(max(S, 1)), 256)
    return _TILE // block_s, block_s


def forward(
    post_mean: Tensor, post_std: Tensor, prior_mean: Tensor, prior_std: Tensor, kl: Tensor
) -> None:
    """Fill kl [...] from four tensors [..., S]."""
    N, S = kl.numel(), post_mean.shape[-1]
    block_n, block_s = _blocks(S)
    if N > 0:
        gaussian_kl_forward_kernel[(triton.cdiv(N, block_n),)](
            post_mean, post_std, prior_mean, prior_std, kl, N, S, BLOCK_N=block_n, BLOCK_S=block_s
        )


def backward(
    grad: Tensor,
    kl: Tensor,
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    post_mean_grad: Tensor,
    post_std_grad: Tensor,
    prior_mean_grad: Tensor,
    prior_std_grad: Tensor,
    post_scale: float,
    prior_scale: float,
    free_nats: float,
) -> None:
    """Fill four gradients [..., S] from grad and kl [...] and four tensors [..., S]."""
    N, S = kl.numel(), post_mean.shape[-1]
    block_n, block_s = _blocks(S)
    if N > 0 and S > 0:
        # an int would be another type to the kernel
        gaussian_kl_backward_kernel[(triton.cdiv(N, block_n), triton.cdiv(S, block_s))](
            grad, kl, post_mean, post_std, prior_mean, prior_std,
            post_mean_grad, post_std_grad, prior_mean_grad, prior_std_grad,
            N, S, float(post_scale), float(prior_scale), float(free_nats),
            BLOCK_N=block_n, BLOCK_S=block_s,
        )  # fmt: skip
