"""KL divergence of diagonal Gaussians.

Saved for backward: the four inputs, which live anyway, and the KL: 4 bytes a row, 8 in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend, resolve
from fastrssm._library import call_cpu, call_cuda, check_same, define, differentiable, empty_again


def gaussian_kl(
    post_mean: Tensor,
    post_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    *,
    kl_balance: float | None = None,
    free_nats: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the KL divergence between two diagonal Gaussians over the latent dimension.

    All inputs share shape, device and dtype (float32, bfloat16; float64 on CPU); the result is
    float32, or float64 for float64. Under autocast inputs are cast to float32. An empty latent has
    a KL of 0. The result can be differentiated once; twice with backend="reference".

    Args:
        post_mean: [..., S] mean of q.
        post_std: [..., S] standard deviation of q, > 0.
        prior_mean: [..., S] mean of p.
        prior_std: [..., S] standard deviation of p, > 0.
        kl_balance: weight in [0, 1] of the term that trains only the prior: its gradient is scaled
            by kl_balance, that of the posterior by 1 - kl_balance. None: plain KL.
        free_nats: elements of the result below this many nats get no gradient; their value stays.
        backend: None picks the fastest one for this device.

    Returns:
        [...] KL(q || p) in nats.

    Raises:
        ValueError: shapes or devices differ, kl_balance is outside [0, 1], or free_nats is negative
            or infinite.
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        Eq. 2 and Alg. 2 of Hafner et al. 2021 (arXiv 2010.02193); free nats: Kingma et al. 2016.
    """
    tensors = check_same(
        post_mean=post_mean, post_std=post_std, prior_mean=prior_mean, prior_std=prior_std
    )
    if kl_balance is not None and not 0.0 <= kl_balance <= 1.0:
        raise ValueError(f"kl_balance is {kl_balance}, expected None or a number in [0, 1]")
    if not 0.0 <= free_nats < math.inf:
        raise ValueError(f"free_nats is {free_nats}, expected a finite number of at least 0")
    chosen = resolve("gaussian_kl", tensors[0], backend)
    if chosen == "reference":
        return reference.gaussian_kl(*tensors, kl_balance=kl_balance, free_nats=free_nats)
    post_scale, prior_scale = (1.0, 1.0) if kl_balance is None else (1.0 - kl_balance, kl_balance)
    return _gaussian_kl(*tensors, post_scale, prior_scale, free_nats, chosen)


def _empty_kl(post_mean: Tensor, *_: Any) -> Tensor:
    dtype = torch.float32 if post_mean.dtype == torch.bfloat16 else post_mean.dtype
    return torch.empty(post_mean.shape[:-1], dtype=dtype, device=post_mean.device)


def _empty_gradients(grad: Tensor, kl: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(empty_again(x.shape, dtype=x.dtype, device=x.device) for x in args[:4])


def _forward(*args: Any) -> Tensor:
    *inputs, _, _, _, backend = args
    kl = _empty_kl(*inputs)
    tensors: Any = (*inputs, kl)
    sizes = kl.numel(), inputs[0].shape[-1]
    match backend:
        case "cpu":
            from fastrssm import _native

            call_cpu(_native.gaussian_kl_forward, inputs[0].dtype, sizes, tensors)
        case "triton":
            from fastrssm.kernels import gaussian_kl as kernel

            with torch.cuda.device_of(kl):
                kernel.forward(*tensors)
        case _:
            from fastrssm import _native

            call_cuda(_native.gaussian_kl_forward_cuda, inputs[0].dtype, sizes, tensors)
    return kl


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, post_scale, prior_scale, free_nats, backend = args
    gradients = _empty_gradients(*inputs)
    tensors: Any = (*inputs, *gradients)
    options: Any = (post_scale, prior_scale, free_nats)
    _, kl, post_mean, *_ = inputs
    sizes = kl.numel(), post_mean.shape[-1]
    match backend:
        case "cpu":
            from fastrssm import _native

            call_cpu(_native.gaussian_kl_backward, post_mean.dtype, sizes, tensors, *options)
        case "triton":
            from fastrssm.kernels import gaussian_kl as kernel

            with torch.cuda.device_of(kl):
                kernel.backward(*tensors, *options)
        case _:
            from fastrssm import _native

            call_cuda(_native.gaussian_kl_backward_cuda, post_mean.dtype, sizes, tensors, *options)
    return gradients


_INPUTS = "Tensor post_mean, Tensor post_std, Tensor prior_mean, Tensor prior_std"
_OPTIONS = "float post_scale, float prior_scale, float free_nats, str backend"
_gaussian_kl = differentiable(
    define(f"gaussian_kl({_INPUTS}, {_OPTIONS}) -> Tensor", _forward, _empty_kl),
    define(
        f"gaussian_kl_backward(Tensor grad, Tensor kl, {_INPUTS}, {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _empty_gradients,
    ),
    tensors=4,
)
