"""KL divergence of grouped categorical distributions, summed over all variables.

Nothing but the KL is kept for the gradient: to read the logits again costs less than to write the
gradients of the plain KL and to read those.
"""

import triton
import triton.language as tl
from torch import Tensor

# elements of a tile; 8 per thread with the 4 warps that Triton takes by default
_TILE = 1024


@triton.jit
def _shifted(logits, at, inside, k, K):
    """Return logits less the largest of their variable, and their exponentials."""
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    x -= tl.max(tl.where(k < K, x, float("-inf")), axis=2, keep_dims=True)
    # what pads a variable has no probability; a variable of padding alone is uniform in both
    x = tl.where(k < K, x, -1e4)
    return x, tl.exp(x)


@triton.jit
def _divergence(post, prior, at, inside, k, K, unimix, MIXED: tl.constexpr):
    """Return the KL of each variable and its gradients to the logits."""
    a, s = _shifted(post, at, inside, k, K)
    b, t = _shifted(prior, at, inside, k, K)
    post_sum = tl.sum(s, axis=2, keep_dims=True)
    prior_sum = tl.sum(t, axis=2, keep_dims=True)
    if MIXED:
        s /= post_sum
        t /= prior_sum
        q = (1.0 - unimix) * s + unimix / K
        p = (1.0 - unimix) * t + unimix / K
        log_ratio = tl.log(q) - tl.log(p)
        ratio = q / p
        kl = tl.sum(q * log_ratio, axis=2, keep_dims=True)
        mean = tl.sum(s * log_ratio, axis=2, keep_dims=True)
        mean_ratio = tl.sum(t * ratio, axis=2, keep_dims=True)
        post_unit = (1.0 - unimix) * s * (log_ratio - mean)
        prior_unit = (1.0 - unimix) * t * (mean_ratio - ratio)
    else:
        # the normalisers drop out of the gradient, and stay finite where a softmax is zero
        s /= post_sum
        t /= prior_sum
        mean = tl.sum(s * (a - b), axis=2, keep_dims=True)
        kl = mean + (tl.log(prior_sum) - tl.log(post_sum))
        post_unit = s * (a - b - mean)
        prior_unit = t - s
    return kl, post_unit, prior_unit


@triton.jit(do_not_specialize=["N"])
def categorical_kl_forward_kernel(
    post_logits, prior_logits,  # [N, G, K]
    kl,                         # [N]
    N, G, K, unimix,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, None, :]
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = (start + tl.arange(0, BLOCK_G))[None, :, None]
        inside = (n < N)[:, None, None] & (g < G) & (k < K)
        at = (n[:, None, None] * G + g) * K + k
        terms, _, _ = _divergence(post_logits, prior_logits, at, inside, k, K, unimix, MIXED)
        total += tl.sum(tl.reshape(terms, [BLOCK_N, BLOCK_G]), axis=1)
    tl.store(kl + n, total, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def categorical_kl_backward_kernel(
    grad, kl,                   # [N]
    post_logits, prior_logits,  # [N, G, K]
    post_grad, prior_grad,      # [N, G, K]
    N, G, K, unimix, post_scale, prior_scale, free_nats,
    MIXED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G))[None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    inside = (n < N)[:, None, None] & (g < G) & (k < K)
    at = (n[:, None, None] * G + g) * K + k
    value = tl.load(kl + n, mask=n < N, other=0.0)
    upstream = tl.load(grad + n, mask=n < N, other=0.0)
    # without free nats no row is free, also none whose KL was rounded below zero
    upstream = tl.where((free_nats > 0.0) & (value < free_nats), 0.0, upstream)[:, None, None]
    _, post_unit, prior_unit = _divergence(
        post_logits, prior_logits, at, inside, k, K, unimix, MIXED
    )
    tl.store(post_grad + at, post_scale * upstream * post_unit, mask=inside)
    tl.store(prior_grad + at, prior_scale * upstream * prior_unit, mask=inside)


def _blocks(G: int, K: int) -> tuple[int, int, int]:
    block_k = triton.next_power_of_2(K)
    block_g = min(triton.next_power_of_2(max(G, 1)), max(_TILE // block_k, 1))
    return max(_TILE // (block_g * block_k), 1), block_g, block_k


def forward(post_logits: Tensor, prior_logits: Tensor, kl: Tensor, unimix: float) -> None:
    """Fill kl [...] from two tensors [..., G, K]."""
    N, (G, K) = kl.numel(), post_logits.shape[-2:]
    block_n, block_g, block_k = _blocks(G, K)
    if N > 0:
        # an int would be another type to the kernel
        categorical_kl_forward_kernel[(triton.cdiv(N, block_n),)](
            post_logits, prior_logits, kl, N, G, K, float(unimix), MIXED=unimix > 0.0,
            BLOCK_N=block_n, BLOCK_G=block_g, BLOCK_K=block_k,
        )  # fmt: skip


def backward(
    grad: Tensor,
    kl: Tensor,
    post_logits: Tensor,
    prior_logits: Tensor,
    post_grad: Tensor,
    prior_grad: Tensor,
    unimix: float,
    post_scale: float,
    prior_scale: float,
    free_nats: float,
) -> None:
    """Fill two gradients [..., G, K] from grad and kl [...] and the logits."""
    N, (G, K) = kl.numel(), post_logits.shape[-2:]
    block_n, block_g, block_k = _blocks(G, K)
    if N > 0 and G > 0:
        categorical_kl_backward_kernel[(triton.cdiv(N, block_n), triton.cdiv(G, block_g))](
            grad, kl, post_logits, prior_logits, post_grad, prior_grad,
            N, G, K, float(unimix), float(post_scale), float(prior_scale), float(free_nats),
            MIXED=unimix > 0.0,
            BLOCK_N=block_n, BLOCK_G=block_g, BLOCK_K=block_k,
        )  # fmt: skip
