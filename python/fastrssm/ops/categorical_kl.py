"""KL divergence of grouped categorical distributions.

Saved for backward: the logits, which live anyway, and on cpu six numbers a variable, 24 bytes, 48
in float64, from which every gradient is found on its own: to write and read saved ones would take
longer. On triton the KL: 4 bytes a row.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend, resolve
from fastrssm._library import call_cpu, check_same, define, differentiable, empty_again

# kMostClasses and kStatistics of csrc/cpu/ops.h
_MOST_CLASSES = 1024
_STATISTICS = 6


def categorical_kl(
    post_logits: Tensor,
    prior_logits: Tensor,
    *,
    unimix: float = 0.0,
    kl_balance: float | None = None,
    free_nats: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the KL divergence between two sets of categoricals over all of their variables.

    Both inputs share shape, device and dtype (float32, bfloat16; float64 on CPU); the result is
    float32, or float64 for float64. Under autocast inputs are cast to float32. The result can be
    differentiated once; twice with backend="reference".

    Args:
        post_logits: [..., G, K] unnormalised log probabilities of q.
        prior_logits: [..., G, K] the same of p.
        unimix: share in [0, 1] of the uniform distribution in both.
        kl_balance: weight in [0, 1] of the term that trains only the prior: its gradient is scaled
            by kl_balance, that of the posterior by 1 - kl_balance. None: plain KL.
        free_nats: elements of the result below this many nats get no gradient; their value stays.
        backend: None picks the fastest one for this device; more than 1024 classes have no kernel.

    Returns:
        [...] KL(q || p) in nats.

    Raises:
        ValueError: shapes or devices differ, there is no class, unimix or kl_balance is outside
            [0, 1], or free_nats is negative or infinite.
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        Eq. 2 and Alg. 2 of DreamerV2 (2010.02193); unimix: DreamerV3 (2301.04104).
    """
    post_logits, prior_logits = check_same(post_logits=post_logits, prior_logits=prior_logits)
    if post_logits.ndim < 2 or post_logits.shape[-1] == 0:
        shape = list(post_logits.shape)
        raise ValueError(
            f"post_logits has shape {shape}, expected [..., G, K] with K of at least 1"
        )
    if not 0.0 <= unimix <= 1.0:
        raise ValueError(f"unimix is {unimix}, expected a number in [0, 1]")
    if kl_balance is not None and not 0.0 <= kl_balance <= 1.0:
        raise ValueError(f"kl_balance is {kl_balance}, expected None or a number in [0, 1]")
    if not 0.0 <= free_nats < math.inf:
        raise ValueError(f"free_nats is {free_nats}, expected a finite number of at least 0")
    classes = post_logits.shape[-1]
    refused: dict[Backend, str] = {}
    if classes > _MOST_CLASSES:
        refused["cpu"] = refused["triton"] = f"{classes} classes are more than {_MOST_CLASSES}"
    chosen = resolve("categorical_kl", post_logits, backend, refused)
    if chosen == "reference":
        if post_logits.dtype == torch.bfloat16:
            post_logits, prior_logits = post_logits.float(), prior_logits.float()
        return reference.categorical_kl(
            post_logits, prior_logits, unimix=unimix, kl_balance=kl_balance, free_nats=free_nats
        )
    post_scale, prior_scale = (1.0, 1.0) if kl_balance is None else (1.0 - kl_balance, kl_balance)
    options = unimix, post_scale, prior_scale, free_nats, chosen
    return _categorical_kl(post_logits, prior_logits, *options)


def _empty_results(post_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *shape, G, _ = post_logits.shape
    dtype = torch.float32 if post_logits.dtype == torch.bfloat16 else post_logits.dtype
    sizes = shape, (*shape, _STATISTICS if args[-1] == "cpu" else 0, G)
    kl, statistics = (torch.empty(x, dtype=dtype, device=post_logits.device) for x in sizes)
    return kl, statistics


def _empty_gradients(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, _, *logits = args[:4]
    post, prior = (empty_again(x.shape, dtype=x.dtype, device=x.device) for x in logits)
    return post, prior


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    post_logits, prior_logits, unimix, _, _, _, backend = args
    kl, statistics = _empty_results(*args)
    if backend == "cpu":
        from fastrssm import _native

        sizes = kl.numel(), *post_logits.shape[-2:]
        tensors: Any = (post_logits, prior_logits, kl, statistics)
        call_cpu(_native.categorical_kl_forward, post_logits.dtype, sizes, tensors, unimix)
    else:
        from fastrssm.kernels import categorical_kl as kernel

        with torch.cuda.device_of(kl):
            kernel.forward(post_logits, prior_logits, kl, unimix)
    return kl, statistics


def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad, kl, statistics, post_logits, prior_logits, *options, backend = args
    gradients = _empty_gradients(*args)
    if backend == "cpu":
        from fastrssm import _native

        sizes = kl.numel(), *post_logits.shape[-2:]
        tensors: Any = (grad, post_logits, prior_logits, kl, statistics, *gradients)
        call_cpu(_native.categorical_kl_backward, post_logits.dtype, sizes, tensors, *options)
    else:
        from fastrssm.kernels import categorical_kl as kernel

        with torch.cuda.device_of(kl):
            kernel.backward(grad, kl, post_logits, prior_logits, *gradients, *options)
    return gradients


_LOGITS = "Tensor post_logits, Tensor prior_logits"
_OPTIONS = "float unimix, float post_scale, float prior_scale, float free_nats, str backend"
_categorical_kl = differentiable(
    define(f"categorical_kl({_LOGITS}, {_OPTIONS}) -> (Tensor, Tensor)", _forward, _empty_results),
    define(
        f"categorical_kl_backward(Tensor grad, Tensor kl, Tensor statistics, {_LOGITS}, {_OPTIONS})"
        " -> (Tensor, Tensor)",
        _backward,
        _empty_gradients,
    ),
    tensors=2,
)
