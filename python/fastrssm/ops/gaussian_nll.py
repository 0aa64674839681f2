"""Negative log likelihood of a diagonal Gaussian.

Saved for backward: the inputs, which live anyway, and the result: 4 bytes a row, 8 in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend, resolve
from fastrssm._library import call_cpu, check_same, define, differentiable


def gaussian_nll(
    target: Tensor,
    mean: Tensor,
    std: Tensor | None,
    *,
    weight_by_std: bool = False,
    mask: Tensor | None = None,
    constant: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """Sum the negative log likelihood of a diagonal Gaussian over the last dimension.

    target, mean and std share shape, device and dtype (float32, bfloat16; float64 on CPU); the
    result is float32, or float64 for float64. Under autocast inputs are cast to float32. The result
    can be differentiated once; twice with backend="reference".

    Args:
        target: [..., N] data.
        mean: [..., N] mean.
        std: [..., N] standard deviation, > 0; None: 1 everywhere.
        weight_by_std: multiply each element by its detached std, so that elements predicted with
            a small std do not dominate the gradient.
        mask: [..., N] or broadcastable factor on each element, without gradient; None: 1.
        constant: keep the term ln(2 pi) / 2 of each element.
        backend: None picks the fastest one for this device.

    Returns:
        [...] sum in nats.

    Raises:
        ValueError: shapes or devices differ, or the mask does not broadcast to them.
        TypeError: dtypes differ or are not supported, or mask is no tensor.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        Weighting: Seitzer et al. 2022 (2203.09168), beta = 1.
    """
    if std is None:
        target, mean = check_same(target=target, mean=mean)
    else:
        target, mean, std = check_same(target=target, mean=mean, std=std)
    if mask is not None:
        mask = _checked_mask(mask, mean)
    chosen = resolve("gaussian_nll", mean, backend)
    if chosen == "reference":
        if mean.dtype == torch.bfloat16:
            target, mean = target.float(), mean.float()
            std = None if std is None else std.float()
        return reference.gaussian_nll(
            target, mean, std, weight_by_std=weight_by_std, mask=mask, constant=constant
        )
    if target.requires_grad:
        # only the difference matters, and to the kernels the target is a constant
        mean, target = mean - target, torch.zeros_like(target)
    absent = mean.new_zeros((*mean.shape[:-1], 0))
    std, mask = absent if std is None else std, absent if mask is None else mask
    term = 0.5 * math.log(2.0 * math.pi) if constant else 0.0
    return _gaussian_nll(target, mean, std, mask, term, weight_by_std, chosen)


def _checked_mask(mask: Tensor, mean: Tensor) -> Tensor:
    """[..., 1] or [..., N] factors like `mean`."""
    if not isinstance(mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"mask is a {type(mask).__name__}, expected None or a Tensor")
    if mask.device != mean.device:
        raise ValueError(f"mask is on {mask.device}, expected {mean.device} like mean")
    sizes = zip(reversed(mask.shape), reversed(mean.shape), strict=False)
    if mask.ndim > mean.ndim or any(m not in (1, n) for m, n in sizes):
        shapes = f"{list(mask.shape)}, expected one that broadcasts to {list(mean.shape)}"
        raise ValueError(f"mask has shape {shapes} of mean")
    width = 1 if mask.ndim == 0 else mask.shape[-1]
    return mask.detach().to(mean.dtype).expand(*mean.shape[:-1], width).contiguous()


def _empty_nll(target: Tensor, *_: Any) -> Tensor:
    dtype = torch.float32 if target.dtype == torch.bfloat16 else target.dtype
    return torch.empty(target.shape[:-1], dtype=dtype, device=target.device)


def _empty_gradients(*args: Any) -> tuple[Tensor, ...]:
    _, _, target, mean, std, mask, *_ = args
    # the public function passes target and mask without a history
    zeros = (mean.new_zeros(()).expand(x.shape) for x in (target, mask))
    found = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (mean, std))
    return next(zeros), *found, next(zeros)


def _forward(*args: Any) -> Tensor:
    *inputs, constant, weight_by_std, backend = args
    mean, mask = inputs[1], inputs[3]
    nll = _empty_nll(*inputs)
    sizes = nll.numel(), mean.shape[-1], mask.shape[-1]
    tensors: Any = (*inputs, nll)
    options: Any = (constant, weight_by_std)
    match backend:
        case "cpu":
            from fastrssm import _native

            call_cpu(_native.gaussian_nll_forward, mean.dtype, sizes, tensors, *options)
        case _:
            from fastrssm.kernels import gaussian_nll as triton

            with torch.cuda.device_of(nll):
                triton.forward(*tensors, *options)
    return nll


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grad, nll, *inputs, _, weight_by_std, backend = args
    mean, mask = inputs[1], inputs[3]
    gradients = _empty_gradients(*args)
    sizes = nll.numel(), mean.shape[-1], mask.shape[-1]
    tensors: Any = (grad, *inputs, *gradients[1:3])
    match backend:
        case "cpu":
            from fastrssm import _native

            call_cpu(_native.gaussian_nll_backward, mean.dtype, sizes, tensors, weight_by_std)
        case _:
            from fastrssm.kernels import gaussian_nll as triton

            with torch.cuda.device_of(grad):
                triton.backward(*tensors, weight_by_std=weight_by_std)
    return gradients


# std and mask are absent when their last dimension is empty
_INPUTS = "Tensor target, Tensor mean, Tensor std, Tensor mask"
_OPTIONS = "float constant, bool weight_by_std, str backend"
_gaussian_nll = differentiable(
    define(f"gaussian_nll({_INPUTS}, {_OPTIONS}) -> Tensor", _forward, _empty_nll),
    define(
        f"gaussian_nll_backward(Tensor grad, Tensor nll, {_INPUTS}, {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _empty_gradients,
    ),
    tensors=4,
)
